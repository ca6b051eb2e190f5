"""Terms of a teacher's scores against sentence-transformers, and rows that lack them."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MarginMSELoss

from nemo_embed_core.config import LossConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.loss.contrastive import Groups
from nemo_embed_core.loss.distill import kl, margin_mse
from nemo_embed_core.loss.objective import figures, objective, sum_names


class OneRank:
    @staticmethod
    def size() -> int:
        return 1


def random_groups(B: int = 5, M: int = 4, D: int = 16) -> Groups:
    q, docs = (F.normalize(torch.randn(*shape, D, dtype=torch.float64), dim=-1) for shape in ((B,), (B, M)))
    ids = torch.arange(B * M).view(B, M)
    teacher = torch.rand(B, M, dtype=torch.float64)
    leaves = {"q_BD": q.requires_grad_(), "docs_BMD": docs.requires_grad_()}
    return Groups(**leaves, mask_BM=torch.ones(B, M, dtype=torch.bool), ids_BM=ids, teacher_BM=teacher)


def gradients(loss: torch.Tensor, g: Groups) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [g.q_BD, g.docs_BMD]))


@pytest.mark.parametrize("num_documents", [2, 4])
def test_sentence_transformers_says_the_same(num_documents: int) -> None:
    g = random_groups(M=num_documents)
    columns = [g.q_BD, *g.docs_BMD.unbind(1)]
    divergence = DistillKLDivLoss(None, student_temperature=0.05, teacher_temperature=0.1)
    pairs = [
        (kl(g, 0.05, 0.1), divergence.compute_loss_from_embeddings(columns, g.teacher_BM) / 0.05**2),
        (margin_mse(g), MarginMSELoss(None).compute_loss_from_embeddings(columns, g.teacher_BM)),
    ]
    for got_B, want in pairs:
        assert abs(got_B.mean() / want - 1) < 1e-12 and want > 1e-3
        for x, y in zip(gradients(got_B.mean(), g), gradients(want, g), strict=True):
            assert (x - y).abs().max() < 1e-11 * y.abs().max() and y.abs().max() > 1e-3


def test_rows_are_of_what_the_teacher_scored() -> None:
    """Row 0 lacks two scores, row 1 its positive's, row 2 all negatives', row 3 has a missing slot that holds
    NaN and a negative that is right, row 4 everything."""
    g = random_groups()
    assert g.teacher_BM is not None
    for place in ((0, 2), (0, 3), (1, 0), (2, 1), (2, 2), (2, 3)):
        g.teacher_BM[place] = torch.nan
    g.mask_BM[3, 1] = False
    g.ids_BM[3, 2] = g.ids_BM[3, 0]
    docs = g.docs_BMD.detach().masked_fill(~g.mask_BM[..., None], torch.nan).requires_grad_()
    g = dataclasses.replace(g, docs_BMD=docs)
    for term in (lambda g: kl(g, 0.05, 0.1), margin_mse):
        got_B = term(g)
        assert got_B[1] == got_B[2] == 0 and (got_B[[0, 3, 4]] > 0).all()
        for b, kept in ((0, [0, 1]), (3, [0, 3]), (4, [0, 1, 2, 3])):
            alone = Groups(
                g.q_BD[b : b + 1], g.docs_BMD[b : b + 1, kept], torch.ones(1, len(kept), dtype=torch.bool),
                torch.arange(len(kept))[None], teacher_BM=g.teacher_BM[b : b + 1, kept],
            )  # fmt: skip
            assert abs(term(alone)[0] - got_B[b]) < 1e-12
        for x in gradients(got_B.sum(), g):
            assert x.isfinite().all() and (x[1] == 0).all() and (x[2] == 0).all() and (x[4] != 0).any()


@pytest.mark.parametrize("has_scores", [True, False])
def test_terms_add_up_by_their_weights_and_are_logged_by_name(has_scores: bool) -> None:
    g = random_groups()
    if has_scores:
        assert g.teacher_BM is not None
        g.teacher_BM[1:4, 0] = torch.nan
    else:
        g = dataclasses.replace(g, teacher_BM=None)
    loss = LossConfig(
        temperature=0.05, info_nce_weight=0.25, kl_weight=2.0, kl_temperature=0.1, margin_mse_weight=3.0
    )
    losses_B, sums = objective(g, loss, torch.float64, OneRank, 0)
    totals = dict(zip(sum_names(loss), sums.tolist(), strict=True))
    found = figures({**totals, "rows": 5.0, "loss": losses_B.sum().item()}, loss)
    plain, _ = objective(g, LossConfig(temperature=0.05), torch.float64, OneRank, 0)
    want_B = 0.25 * plain + 2 * kl(g, 0.05, 0.1) + 3 * margin_mse(g)
    assert (losses_B - want_B).abs().max() < 1e-12 and found["loss"] == pytest.approx(want_B.mean().item())
    assert list(found["losses"]) == ["info_nce", "kl", "margin_mse"]
    assert found["losses"]["info_nce"] == pytest.approx(plain.mean().item())
    assert found["scored_rows"] == (2 if has_scores else 0)
    of_scored = kl(g, 0.05, 0.1).sum().item() / 2 if has_scores else None  # a mean of the rows that have it
    assert found["losses"]["kl"] == (pytest.approx(of_scored) if has_scores else None)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"info_nce_weight": 0.0}, "cosent_weight=0 must not be negative, and one of them"),
        ({"kl_weight": -1.0}, "kl_weight=-1"),
        ({"kl_temperature": 0.0}, "kl_temperature=0.0 must be positive"),
        ({"matryoshka_dims": [8, 8]}, r"matryoshka_dims=\[8, 8\] must be different widths"),
        ({"matryoshka_dims": [8], "matryoshka_weights": [1.0, 2.0]}, "one for each of"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        LossConfig(**options)
