import pytest
import torch

from nemo_embed_core.kernels.filter_scores import filter_scores


@pytest.mark.parametrize("values", ["int8", "fp16"])
@pytest.mark.parametrize(
    ("Q", "N", "D"), [(1, 1, 32), (37, 301, 96), (16, 64, 32), (17, 65, 48), (70, 90, 32)]
)
def test_kernel_appends_what_the_reference_keeps(passes, values, Q, N, D):
    for scaled in (True, False):
        passes("filter_scores", Q=Q, N=N, D=D, values=values, scaled=scaled)


def test_op_is_well_formed(passes):
    passes("opcheck", name="filter_scores")


def test_reference_is_a_mask_of_the_products():
    queries, documents = torch.randn(5, 16).half(), torch.randn(40, 16).half()
    floor, limit = torch.zeros(5), torch.full((5,), 2.0)
    keys, columns, counts = filter_scores(queries, documents, floor, limit, 40)
    products = queries.float() @ documents.float().T
    for q in range(5):
        want = ((products[q] >= 0) & (products[q] < 2)).nonzero()[:, 0]
        assert columns[q, : counts[q]].tolist() == want.tolist()
        assert torch.equal(keys[q, : counts[q]], products[q, want])


def test_rows_that_the_copy_engine_cannot_take_are_refused():
    rows = torch.zeros(2, 20, dtype=torch.int8)
    with pytest.raises(ValueError, match="16 bytes"):
        filter_scores(rows, rows, torch.zeros(2), torch.zeros(2), 4)
