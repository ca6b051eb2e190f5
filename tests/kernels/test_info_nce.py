import math

import pytest
import torch
import torch.nn.functional as F

from nemo_embed_core.kernels import info_nce
from nemo_embed_core.kernels.info_nce import in_batch_logsumexp, info_nce_hard, info_nce_in_batch

# --------------------------------------------------------------------------------------- kernels, interpreted


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("B", "M", "D", "dtype"),
    [(1, 1, 64, "fp32"), (9, 3, 100, "fp32"), (9, 3, 100, "fp16"), (5, 9, 64, "fp16"), (3, 2, 1100, "fp32")],
)
def test_hard_within_budget(passes, B, M, D, dtype, normalize):
    passes("info_nce_hard", B=B, M=M, D=D, normalize=normalize, dtype=dtype)


@pytest.mark.parametrize("temperature", [0.005, 1.0])
def test_hard_at_extreme_temperatures(passes, temperature):
    passes("info_nce_hard", B=6, M=5, D=64, temperature=temperature)


@pytest.mark.parametrize(
    ("B", "P", "D", "dtype"),
    [(1, 1, 64, "fp32"), (5, 37, 100, "fp32"), (5, 37, 100, "fp16"), (17, 129, 64, "fp32")],
)
def test_in_batch_within_budget(passes, B, P, D, dtype):
    passes("info_nce_in_batch", B=B, P=P, D=D, dtype=dtype)
    passes("info_nce_in_batch", B=B, P=P, D=D, dtype=dtype, ids=True, valid=True, own=3, extra=True)
    passes("info_nce_in_batch", B=B, P=P, D=D, dtype=dtype, ids=True, valid=True, known=1)
    passes("info_nce_in_batch", B=B, P=P, D=D, dtype=dtype, ids=True, known=5, limits=True)
    passes("info_nce_in_batch", B=B, P=P, D=D, dtype=dtype, limits=True)


@pytest.mark.parametrize("temperature", [0.005, 1.0])
def test_in_batch_at_extreme_temperatures(passes, temperature):
    passes("info_nce_in_batch", B=6, P=70, D=64, temperature=temperature, valid=True)


def test_in_batch_with_several_row_blocks_splits_and_chunks(passes):
    # 2 row blocks of 128; 12 tiles of columns in splits; a workspace of 128 columns makes 2 chunks of the
    # backward.
    passes("info_nce_in_batch", B=130, P=1500, D=32, ids=True, constants={"_WORKSPACE": 130 * 4 * 800})


# Tiles of 16 rows of which two stand side by side, and little work for a split: 70 rows are three groups, the
# last one short.
SMALL_GROUPS = {
    "_COLUMNS": {size: [[2**40, 16, 32, 32, 4, 3]] for size in (2, 4)},
    "_GROUP": 2,
    "_PROGRAMS": 4,
}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_in_batch_beyond_one_group_of_row_blocks(passes, dtype):
    """As beyond 1,024 rows, where a group of eight blocks of 128 ends; D of two steps, with and without
    16-byte rows."""
    for D in (48, 33):
        passes("info_nce_in_batch", B=70, P=67, D=D, dtype=dtype, constants=SMALL_GROUPS)
    small = SMALL_GROUPS | {"_WORKSPACE": 70 * 4 * 64}
    passes(
        "info_nce_in_batch",
        B=70,
        P=67,
        D=48,
        dtype=dtype,
        ids=True,
        valid=True,
        own=2,
        extra=True,
        constants=small,
    )
    passes("in_batch_logsumexp", B=70, P=67, D=48, dtype=dtype, ids=True, constants=SMALL_GROUPS)


@pytest.mark.parametrize("normalize", [False, True])
def test_hard_beyond_one_block_of_documents_and_of_columns(passes, normalize):
    """As beyond 8 documents, 2,048 columns forward and 4,096 backward; a program is one row, however many
    there are."""
    small = {"_OWN_FORWARD": [2, 16, 1], "_OWN_BACKWARD": [4, 32, 1]}
    passes("info_nce_hard", B=9, M=7, D=70, normalize=normalize, constants=small)


def test_in_batch_split_of_several_tiles(passes):
    passes("info_nce_in_batch", B=3, P=11 * 2 * 64 + 1, D=32, valid=True)


@pytest.mark.parametrize(("B", "P"), [(1, 1), (5, 70)])
def test_logsumexp_within_budget(passes, B, P):
    passes("in_batch_logsumexp", B=B, P=P, D=64)
    passes("in_batch_logsumexp", B=B, P=P, D=64, ids=True)
    passes("in_batch_logsumexp", B=B, P=P, D=64, ids=True, valid=P > 1, known=2, limits=P > 1)


@pytest.mark.parametrize("B", [1, 4])
def test_terms_without_columns_give_no_gradient_when_joined(passes, B):
    passes("joined_empty_terms", B=B)


def test_ops_are_well_formed_and_keep_gradients_under_compile(passes):
    for name in ("info_nce_own", "info_nce_columns"):
        passes("opcheck", name=name)
        passes("compiled_gradients", name=name)


def test_renumbered_ids_exclude_the_same_columns():
    rows, columns = torch.tensor([5, -(2**50), 7, 9]), torch.tensor([7, 5, 2**50, -(2**50), 5, 7])
    valid = torch.tensor([True, True, True, True, False, True])
    row_groups, groups, _ = info_nce._groups(rows, columns, valid, 4)
    kept = (groups >= 0) & (groups != row_groups[:, None])
    assert torch.equal(kept, valid & (columns != rows[:, None]))
    known = torch.tensor([[7, -2], [-2, -2], [5, 2**50], [11, -(2**50)]])
    row_groups, groups, known_groups = info_nce._groups(rows, columns, valid, 4, known)
    kept = (groups >= 0) & (groups != row_groups[:, None]) & (groups != known_groups[:, :, None]).all(1)
    assert torch.equal(kept, valid & (columns != rows[:, None]) & (columns != known[:, :, None]).all(1))
    assert groups.dtype == torch.int32


# ------------------------------------------------------------------------------------------ references


def doubles(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


MASK = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]]).bool()
KNOWN = torch.tensor([[4, -2], [3, 2], [1, 1], [-2, 3]])
LIMITS = torch.tensor([0.5, 0.0, 1.0, 2.0])
LABELS, IDS, VALID = (
    torch.tensor([0, 3, -1, 5]),
    torch.tensor([1, 2, 1, 3, 4, 5, 3]),
    torch.tensor([1, 1, 1, 1, 1, 0, 1]).bool(),
)


@pytest.mark.parametrize("normalize", [False, True])
def test_hard_reference_gradcheck(normalize):
    inputs = [*doubles((4, 5), (4, 3, 5)), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)]
    assert torch.autograd.gradcheck(lambda q, d, t: info_nce_hard(q, d, MASK, t, normalize), inputs)


def test_in_batch_reference_gradcheck():
    inputs = [
        *doubles((4, 5), (7, 5), (4, 3, 5), (4,)),
        torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
    ]
    assert torch.autograd.gradcheck(
        lambda q, d, own, extra, t: info_nce_in_batch(
            q, d, LABELS, t, IDS, VALID, own, MASK, extra, KNOWN, LIMITS
        ),
        inputs,
    )
    rows = torch.tensor([1, 9, 2, 3])
    inputs = [inputs[0], inputs[1], inputs[4]]
    assert torch.autograd.gradcheck(
        lambda q, d, t: in_batch_logsumexp(q, d, t, rows, IDS, VALID, KNOWN, LIMITS), inputs
    )


def test_hard_equals_cross_entropy_per_row():
    q, docs = torch.randn(4, 8), torch.randn(4, 3, 8)
    loss = info_nce_hard(q, docs, MASK, 0.1)
    for row, mask in enumerate(MASK):
        scores = docs[row][mask] @ q[row] / 0.1
        expected = F.cross_entropy(scores, torch.tensor(0)) if mask[0] else torch.tensor(0.0)
        torch.testing.assert_close(loss[row], expected)


def test_in_batch_equals_cross_entropy_over_the_columns_that_count():
    q, docs, own = torch.randn(4, 8), torch.randn(7, 8), torch.randn(4, 3, 8)
    loss = info_nce_in_batch(q, docs, LABELS, 0.1, IDS, VALID, own, MASK, None, KNOWN, LIMITS)
    left_out = 0
    for row, label in enumerate(LABELS.tolist()):
        if label < 0 or not VALID[label]:
            assert loss[row] == 0
            continue
        right = {int(IDS[label]), *KNOWN[row].tolist()}
        columns = [p for p in range(7) if p != label and VALID[p] and int(IDS[p]) not in right]
        left_out += sum((docs[p] @ q[row] > LIMITS[row]).item() for p in columns)
        columns = [label] + [p for p in columns if docs[p] @ q[row] <= LIMITS[row]]
        scores = torch.cat([docs[columns] @ q[row], own[row][MASK[row]] @ q[row]]) / 0.1
        torch.testing.assert_close(loss[row], F.cross_entropy(scores, torch.tensor(0)))
    assert left_out, "no column was above its row's limit"


def test_query_query_and_document_document_terms():
    """The two ways that the docstring offers for the terms of the paper's ablation, against the formula."""
    num_rows, temperature = 5, 0.2
    q, docs, ids = torch.randn(num_rows, 8), torch.randn(9, 8), torch.tensor([0, 1, 2, 3, 0, 5, 6, 1, 8])
    labels = torch.arange(num_rows)  # rows 0 and 4 have the same document
    own_ids = ids[labels]
    positives = docs[labels]
    document_document = in_batch_logsumexp(positives, docs, temperature, own_ids, ids)
    loss = info_nce_in_batch(
        q, torch.cat([docs, q]), labels, temperature, torch.cat([ids, own_ids]), extra_lse_B=document_document
    )
    for row in range(num_rows):
        other = ids != ids[row]
        other_rows = own_ids != own_ids[row]
        terms = [
            positives[row] @ q[row],
            *(docs[other] @ q[row]),
            *(q[other_rows] @ q[row]),
            *(docs[other] @ positives[row]),
        ]
        scores = torch.stack(terms) / temperature
        torch.testing.assert_close(loss[row], scores.logsumexp(0) - scores[0])


def test_rows_without_a_positive_have_no_loss_and_no_gradient():
    q, docs, own = (torch.randn(shape, requires_grad=True) for shape in ((3, 8), (4, 8), (3, 2, 8)))
    temperature = torch.tensor(0.02, requires_grad=True)
    nothing = torch.zeros(3, 2, dtype=torch.bool)
    labels, valid = torch.tensor([-1, 2, 3]), torch.tensor([False, False, False, False])
    extra = torch.full((3,), -math.inf)
    loss = info_nce_in_batch(q, docs, labels, temperature, None, valid, own, nothing, extra)
    loss.sum().backward()
    hard = info_nce_hard(q, own.detach().fill_(math.nan).requires_grad_(), nothing, temperature)
    hard.sum().backward()
    assert (loss == 0).all() and (hard == 0).all()
    for x in (q, docs, own, temperature):
        assert (x.grad == 0).all()


def test_bf16_inputs_are_scored_in_fp32():
    q, docs = (F.normalize(torch.randn(shape), dim=-1).bfloat16() for shape in ((64, 256), (64, 5, 256)))
    mask = torch.ones(64, 5, dtype=torch.bool)
    exact = info_nce_hard(q.double(), docs.double(), mask, 0.02)
    loss = info_nce_hard(q, docs, mask, 0.02)
    assert loss.dtype == torch.float32
    assert (loss - exact).abs().max() < 1e-4  # bf16 scores would be off by 0.1 and more


def test_wrong_shapes_say_what_is_wanted():
    q, docs, mask = torch.zeros(2, 8), torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask \[B, M\]"):
        info_nce_hard(q, docs, mask[:, :2], 0.1)
    with pytest.raises(ValueError, match="same D and dtype"):
        info_nce_hard(q, docs.bfloat16(), mask, 0.1)
    with pytest.raises(ValueError, match="bool mask"):
        info_nce_hard(q, docs, mask.float(), 0.1)
    with pytest.raises(ValueError, match="labels"):
        info_nce_in_batch(q, docs[0], torch.zeros(3, dtype=torch.int64), 0.1)
    with pytest.raises(ValueError, match=r"known_ids \[B, J\]"):
        info_nce_in_batch(q, docs[0], torch.zeros(2, dtype=torch.int64), 0.1, known_ids_BJ=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="both or neither"):
        in_batch_logsumexp(q, docs[0], 0.1, torch.zeros(2, dtype=torch.int64))
