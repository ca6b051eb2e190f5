"""The loss by its definition, its masks, and its statistics (one process; other layouts:
parallel/test_equivalence)."""

import contextlib
import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nemo_embed_core.config import DataConfig, LossConfig, ParallelConfig, TrainConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.loss.contrastive import Groups, contrastive_loss, gather_columns, retrieval_stats
from nemo_embed_core.loss.objective import figures, objective, sum_names
from nemo_embed_core.parallel.mesh import distributed


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with distributed(ParallelConfig(), "cpu"):
        yield dist.group.WORLD


def random_groups(B: int = 5, M: int = 4, D: int = 16) -> Groups:
    q = F.normalize(torch.randn(B, D, dtype=torch.float64), dim=-1)
    docs = F.normalize(torch.randn(B, M, D, dtype=torch.float64), dim=-1)
    mask = torch.rand(B, M) > 0.3
    mask[:, 0] = True
    ids = torch.arange(B * M).view(B, M).masked_fill(~mask, -1)
    return Groups(q, docs, mask, ids)


def loss_of(g: Groups, temperature: float, in_batch: str, group, **options) -> torch.Tensor:
    loss = LossConfig(temperature=temperature, in_batch=in_batch, **options)  # type: ignore[arg-type]
    return contrastive_loss(g, gather_columns(g, loss, group, 0, g.q_BD.dtype), loss, temperature)


def by_definition(
    g: Groups, temperature: float, in_batch: str, query_query: bool = False, document_document: bool = False,
    false_negative_margin: float = 9.0,
) -> torch.Tensor:  # fmt: skip
    B, M = g.mask_BM.shape
    losses = []
    for b in range(B):
        right = {int(g.ids_BM[b, 0]), *([] if g.known_BJ is None else g.known_BJ[b].tolist())}
        own = {int(i) for i in g.ids_BM[b] if i >= 0}
        positive = g.q_BD[b] @ g.docs_BMD[b, 0]
        scores = [
            g.q_BD[b] @ g.docs_BMD[b, m]
            for m in range(1, M)
            if g.mask_BM[b, m] and int(g.ids_BM[b, m]) not in right
        ]
        for other in set(range(B)) - {b}:
            if query_query and int(g.ids_BM[other, 0]) not in right:
                scores.append(g.q_BD[b] @ g.q_BD[other])
            for m in range(M if in_batch == "all" else 1):
                usable = g.mask_BM[other, m] and int(g.ids_BM[other, m]) not in right
                if in_batch != "none" and usable:
                    scores.append(g.q_BD[b] @ g.docs_BMD[other, m])
                if document_document and usable and int(g.ids_BM[other, m]) not in own:
                    scores.append(g.docs_BMD[b, 0] @ g.docs_BMD[other, m])
        kept = [positive, *(s for s in scores if s <= positive + false_negative_margin)]
        losses.append(torch.stack(kept).div(temperature).logsumexp(0) - positive / temperature)
    return torch.stack(losses)


@pytest.mark.parametrize("in_batch", ["none", "positives", "all"])
@pytest.mark.parametrize("temperature", [0.005, 0.02, 1.0])
def test_loss_is_its_definition(group, in_batch: str, temperature: float) -> None:
    g = random_groups()
    got = loss_of(g, temperature, in_batch, group)
    assert (got - by_definition(g, temperature, in_batch)).abs().max() < 1e-10


@pytest.mark.parametrize("in_batch", ["positives", "all"])
def test_the_same_document_is_never_a_negative(group, in_batch: str) -> None:
    g = random_groups()
    g.ids_BM[3, 0] = g.ids_BM[1, 0]  # rows 1 and 3 share their positive
    g.docs_BMD[3, 0] = g.docs_BMD[1, 0]
    got = loss_of(g, 0.05, in_batch, group)
    assert (got - by_definition(g, 0.05, in_batch)).abs().max() < 1e-10
    g.ids_BM[3, 0] = 999
    assert loss_of(g, 0.05, in_batch, group)[1] > got[1] + 1e-3, "the mask made no difference"


# The four losses of the paper's ablation, and what else the terms can be.
TERMS = [
    {"in_batch": "positives", "query_query": True},
    {"in_batch": "positives", "query_query": True, "document_document": True, "false_negative_margin": 0.1},
    {"in_batch": "all", "query_query": True, "document_document": True, "false_negative_margin": 0.0},
    {"in_batch": "none", "query_query": True, "false_negative_margin": 0.2},
    {"in_batch": "none", "document_document": True}, {"in_batch": "all", "document_document": True},
    {"in_batch": "none", "false_negative_margin": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("options", TERMS, ids=lambda o: "-".join(map(str, o.values())))
def test_terms_of_the_ablation_are_their_definition(group, options: dict) -> None:
    """Loss, and the gradient of every query and document, with rows that know of one another, copies, and
    missing slots that hold NaN."""
    g = some_known(random_groups())
    g.ids_BM[3, 0], g.ids_BM[4, 3], g.mask_BM[4, 3] = g.ids_BM[1, 0], g.ids_BM[2, 1], True
    leaves = [g.q_BD.requires_grad_(), g.docs_BMD.requires_grad_()]
    got = loss_of(g, 0.05, group=group, **options)
    want = by_definition(g, 0.05, **options)
    assert (got - want).abs().max() < 1e-10
    weights = torch.rand(5, dtype=torch.float64)
    for x, y in zip(
        *(torch.autograd.grad((each * weights).sum(), leaves) for each in (got, want)), strict=True
    ):
        assert (x - y).abs().max() < 1e-9 and y.abs().max() > 1e-3
    for name in options:  # each of them matters
        without = {
            **options,
            name: {"in_batch": "none"}.get(name, None if name.endswith("margin") else False),
        }
        if without != options:
            assert (loss_of(g, 0.05, group=group, **without) - got).abs().max() > 1e-6, name


def test_rows_that_are_left_without_a_candidate_lose_nothing(group) -> None:
    """A batch of one, and rows all of whose candidates are right or above the margin."""
    every = {"in_batch": "all", "query_query": True, "document_document": True, "false_negative_margin": 0.0}
    one = random_groups(1, 1)
    same = random_groups(3, 1)
    same.ids_BM[:] = 7
    near = random_groups(1, 3)
    near.mask_BM[:], near.ids_BM[:] = True, torch.arange(3)
    near.docs_BMD[0, 1:] = near.q_BD[0]
    for g in (one, same, near):
        leaves = [g.q_BD.requires_grad_(), g.docs_BMD.requires_grad_()]
        losses = loss_of(g, 0.02, group=group, **every)
        assert (losses == 0).all()
        assert all((x == 0).all() for x in torch.autograd.grad(losses.sum(), leaves))


@pytest.mark.parametrize("directions", [{"query_to_query"}, {"doc_to_doc"}, {"query_to_query", "doc_to_doc"}])
def test_sentence_transformers_says_the_same(group, directions: set[str]) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    g = random_groups()
    g.mask_BM[:] = True  # it has no rows with fewer negatives
    g.ids_BM[:] = torch.arange(20).view(5, 4)
    peer = MultipleNegativesRankingLoss(None, scale=20.0, directions=("query_to_doc", *sorted(directions)))
    want = peer.compute_loss_from_embeddings([g.q_BD, *g.docs_BMD.unbind(1)], torch.zeros(0))
    terms = {"query_query": "query_to_query" in directions, "document_document": "doc_to_doc" in directions}
    got = loss_of(g, 0.05, "all", group, **terms)
    assert abs(got.mean() - want) < 1e-12


@pytest.mark.parametrize("in_batch", ["none", "all"])
def test_sentence_transformers_has_the_same_matryoshka_loss(group, in_batch: str) -> None:
    """With every row's own negatives alone its loss is of one row at a time."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    class Given(torch.nn.Module):
        def forward(self, features: dict) -> dict:
            return dict(features)

        def save(self, *_: object, **__: object) -> None: ...

    g = random_groups()
    g.mask_BM[:] = True
    g.ids_BM[:] = torch.arange(20).view(5, 4)
    # The peer normalises whole rows once more, which takes the radial part of their gradient away.
    leaves = [g.q_BD.requires_grad_(), g.docs_BMD.requires_grad_()]
    g = dataclasses.replace(g, q_BD=F.normalize(leaves[0], dim=-1), docs_BMD=F.normalize(leaves[1], dim=-1))
    model, dims, weights = SentenceTransformer(modules=[Given()], device="cpu"), [16, 7, 3], [1.0, 0.5, 2.0]
    peer = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model, scale=20.0), dims, weights)
    columns = [g.q_BD, *g.docs_BMD.unbind(1)]
    batches = [columns] if in_batch == "all" else [[c[b : b + 1] for c in columns] for b in range(5)]
    want = torch.stack(
        [peer([{"sentence_embedding": c} for c in each], torch.zeros(0)) for each in batches]
    ).mean()
    options = LossConfig(
        temperature=0.05, in_batch=in_batch, matryoshka_dims=dims, matryoshka_weights=weights  # type: ignore[arg-type]
    )  # fmt: skip
    losses_B, sums = objective(g, options, torch.float64, group, 0)
    got, totals = losses_B.mean(), dict(zip(sum_names(options), sums.tolist(), strict=True))
    assert abs(got - want) < 1e-12
    gradients = [torch.autograd.grad(each, leaves, retain_graph=True) for each in (got, want)]
    for x, y in zip(*gradients, strict=True):
        assert (x - y).abs().max() < 1e-12 and y.abs().max() > 1e-3
    terms = figures(totals | {"rows": 5.0, "loss": losses_B.sum().item()}, options)["losses"]
    assert terms.keys() == {"info_nce@16", "info_nce@7", "info_nce@3"}
    assert abs(sum(w * terms[f"info_nce@{d}"] for d, w in zip(dims, weights, strict=True)) - want) < 1e-12


def some_known(g: Groups) -> Groups:
    """Row 0 knows row 1's positive and a negative of row 2, row 2 knows row 0's positive, row 4 a negative of
    its own."""
    g.mask_BM[2, 1] = g.mask_BM[4, 1:3] = True
    g.ids_BM[2, 1], g.ids_BM[4, 1], g.ids_BM[4, 2] = 801, 802, 803
    known = [[g.ids_BM[1, 0], 801], [-2, -2], [g.ids_BM[0, 0], -2], [-2, -2], [802, 99]]
    return Groups(g.q_BD, g.docs_BMD, g.mask_BM, g.ids_BM, torch.tensor(known))


@pytest.mark.parametrize("in_batch, rows", [("none", {4}), ("positives", {0, 2, 4}), ("all", {0, 2, 4})])
def test_documents_that_a_row_knows_are_none_of_its_negatives(group, in_batch: str, rows: set[int]) -> None:
    """Of no other row: that row 2 knows row 0's positive says nothing of row 0, nor of who knows row 2's."""
    g = some_known(random_groups())
    docs = g.docs_BMD.requires_grad_()
    got = loss_of(g, 0.05, in_batch, group)
    assert (got - by_definition(g, 0.05, in_batch)).abs().max() < 1e-10
    blind = loss_of(Groups(g.q_BD, g.docs_BMD, g.mask_BM, g.ids_BM), 0.05, in_batch, group)
    assert {b for b in range(5) if blind[b] > got[b] + 1e-6} == rows
    assert all(blind[b] == got[b] for b in set(range(5)) - rows)
    (grad,) = torch.autograd.grad(got[4], docs)
    assert (grad[4, 1] == 0).all() and (grad[4, 2] != 0).all(), (
        "its own negative that is right, and one that is not"
    )


def test_a_negative_that_is_the_positive_again_is_none(group) -> None:
    g = random_groups()
    g.mask_BM[3, 1] = True
    g.ids_BM[3, 1] = g.ids_BM[3, 0]
    for in_batch in ("none", "positives", "all"):
        got = loss_of(g, 0.05, in_batch, group)
        assert (got - by_definition(g, 0.05, in_batch)).abs().max() < 1e-10


def test_missing_negatives_weigh_nothing(group) -> None:
    g = random_groups()
    poisoned = Groups(
        g.q_BD, g.docs_BMD.masked_fill(~g.mask_BM[..., None], float("nan")), g.mask_BM, g.ids_BM
    )
    docs = poisoned.docs_BMD.requires_grad_()
    for in_batch in ("none", "positives", "all"):
        losses = loss_of(poisoned, 0.02, in_batch, group)
        assert (losses - loss_of(g, 0.02, in_batch, group)).abs().max() < 1e-12
        (grad,) = torch.autograd.grad(losses.sum(), docs)
        assert bool(grad.isfinite().all()) and bool((grad[~g.mask_BM] == 0).all())


def test_scores_are_fp32_for_bf16_embeddings(group) -> None:
    """bf16 logits at temperature 0.02 would leave 75 distinct values of 1,280 (some tie with the
    positive)."""
    g = random_groups()
    half = Groups(g.q_BD.bfloat16(), g.docs_BMD.bfloat16(), g.mask_BM, g.ids_BM)
    exact = Groups(half.q_BD.double(), half.docs_BMD.double(), g.mask_BM, g.ids_BM)
    for in_batch in ("none", "all"):
        got = loss_of(half, 0.02, in_batch, group)
        assert got.dtype == torch.float32
        assert (got.double() - loss_of(exact, 0.02, in_batch, group)).abs().max() < 1e-4


def near_ties(D: int, first: float) -> Groups:
    """Every document is within 1e-6 to 1e-3 of every other's cosine; `first`: length of coordinate 0."""

    def rows(*shape: int) -> torch.Tensor:
        rest = F.normalize(torch.randn(*shape, D - 1, dtype=torch.float64), dim=-1)
        one = first * (1 + 0.1 * torch.rand(*shape, 1, dtype=torch.float64))
        return torch.cat([one, (1 - one.square()).sqrt() * rest], -1)

    B, M = 6, 4
    base, noise = rows(1), rows(B * M)
    sizes = torch.logspace(-6, -3, B * M, dtype=torch.float64)[torch.randperm(B * M), None]
    docs = F.normalize(base + sizes * noise, dim=-1).view(B, M, D)
    q = F.normalize(base + rows(B), dim=-1)
    fp32 = q.float(), docs.float()  # unit rows as pooling makes them
    return Groups(*fp32, torch.ones(B, M, dtype=torch.bool), torch.arange(B * M).view(B, M))


@pytest.mark.parametrize("in_batch", ["none", "positives", "all"])
@pytest.mark.parametrize("first, limit", [(0.0, 3.6e-5), (0.8, 2.0**-8)])
def test_a_bf16_run_costs_what_scored_dtype_says(group, in_batch: str, first: float, limit: float) -> None:
    """Loss and gradients of fp32 rows in a bf16 run against fp64 of the same rows. limit, of a cosine: the
    standard deviation where length is spread over the coordinates, else what it is never beyond."""
    torch.manual_seed(0)
    g, temperature = near_ties(4096, first), 0.02
    exact = Groups(g.q_BD.double(), g.docs_BMD.double(), g.mask_BM, g.ids_BM)
    leaves = [g.q_BD, g.docs_BMD, exact.q_BD, exact.docs_BMD]
    for x in leaves:
        x.requires_grad_()
    options = LossConfig(temperature=temperature, in_batch=in_batch)  # type: ignore[arg-type]
    got, _ = objective(g, options, torch.bfloat16, group, 0)
    want = by_definition(exact, temperature, in_batch)
    weights = torch.rand(6, dtype=torch.float64)
    (got.double() * weights).sum().backward()
    (want * weights).sum().backward()
    assert got.dtype == torch.float32 and g.q_BD.grad.dtype == g.docs_BMD.grad.dtype == torch.float32
    losses = (got.double() - want).abs().max().item()
    # Of dq = sum of c d: documents that are nearly equal cancel, their roundings do not.
    coefficients_B = weights * 2 * (1 - (-want.detach()).exp()) / temperature
    dq = ((g.q_BD.grad - exact.q_BD.grad).norm(dim=1) / coefficients_B).max().item()
    ddocs = ((g.docs_BMD.grad - exact.docs_BMD.grad).norm() / exact.docs_BMD.grad.norm()).item()
    if in_batch == "none":
        assert losses < 2e-4 and max(dq, ddocs) < 1e-4, "a query's own documents are scored in fp32"
    else:
        assert 2e-4 < losses < (4 if first == 0 else 2) * limit / temperature
        assert 1e-4 < dq < 2**-8 and 1e-4 < ddocs < 2**-8, (dq, ddocs)


def test_stats_count_what_they_say() -> None:
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    docs = torch.tensor([[[0.8, 0.6], [0.6, 0.8]], [[0.6, 0.8], [1.0, 0.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    g = Groups(q, docs, mask, torch.tensor([[0, 1], [2, -1]]))
    hits, positive, negative, count, ranked = retrieval_stats(g, "none").tolist()
    assert (hits, count, ranked) == (1, 1, 1), "the row without a negative is neither a hit nor a miss"
    assert math.isclose(positive, 1.6, rel_tol=1e-6) and math.isclose(negative, 0.6, rel_tol=1e-6)
    hits, _, negative, count, ranked = retrieval_stats(g, "positives").tolist()
    assert (hits, count, ranked) == (2, 3, 2) and math.isclose(negative, 0.6 + 0.6 + 0.6, rel_tol=1e-6)


def test_accuracy_is_of_rows_that_have_a_candidate() -> None:
    """A miss, a tie (a miss), a hit, and two rows that are left without a candidate by masks and by what they
    know."""
    q = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    low, high = [0.6, 0.8], [0.8, 0.6]
    docs = torch.tensor([[low, high], [low, low], [high, low], [low, high], [low, high]])
    mask = torch.tensor([[True, True]] * 3 + [[True, False], [True, True]])
    ids = torch.tensor([[0, 1], [2, 3], [4, 5], [6, -1], [7, 8]])
    known = torch.tensor([[-2, -2], [-2, -2], [-2, -2], [-2, -2], [8, -2]])
    hits, _, negative, count, ranked = retrieval_stats(Groups(q, docs, mask, ids, known), "none").tolist()
    assert (hits, count, ranked) == (1, 3, 3) and math.isclose(negative, 0.8 + 0.6 + 0.6, rel_tol=1e-6)
    # In the batch: row 0 and row 1 know all other positives, row 3 has those of others, all but row 2's low.
    known = torch.tensor([[2, 4, 6, 7], [0, 4, 6, 7], [-2] * 4, [0, 1, 4, 7], [0, 2, 4, 6]])
    mask[:, 1] = False
    hits, _, _, count, ranked = retrieval_stats(Groups(q, docs, mask, ids, known), "positives").tolist()
    assert (hits, count, ranked) == (1, 4 + 1, 2), "rows 2 (a hit over four) and 3 (a tie with row 1's)"


@pytest.mark.parametrize(
    "loss, hard, batch, says",
    [
        ({"in_batch": "positives"}, 0, 2, ""), ({"query_query": True}, 0, 2, ""), ({}, 1, 1, ""),
        ({"in_batch": "positives"}, 0, 1, "global_batch_size=1 leave the positive alone in the softmax"),
        ({}, 0, 8, "data.num_hard_negatives=0, loss.in_batch=none and global_batch_size=8 leave"),
        ({"cosent_weight": 1.0}, 0, 8, "leave the positive alone in the softmax"),
        ({"cosent_weight": 1.0, "info_nce_weight": 0.0}, 0, 8, ""),
        ({"cosent_weight": 1.0}, 1, 1, "loss.cosent_weight compares pairs of a batch"),
        ({"in_batch": "all", "kl_weight": 1.0}, 0, 8, "loss.margin_mse_weight the positive alone"),
        ({"in_batch": "all", "margin_mse_weight": 1.0, "info_nce_weight": 0.0}, 0, 8, "the positive alone"),
    ],
)  # fmt: skip
def test_a_term_that_would_be_0_in_every_step_is_refused(
    loss: dict, hard: int, batch: int, says: str
) -> None:
    options = {"loss": LossConfig(**loss), "data": DataConfig(num_hard_negatives=hard)}
    with pytest.raises(UserError, match=says) if says else contextlib.nullcontext():
        TrainConfig(output_dir="run", steps=1, global_batch_size=batch, **options)


def test_other_rows_are_gathered_for_info_nce_alone() -> None:
    """A run without that term draws, scores and sends as one without in-batch negatives."""
    options = {"in_batch": "all", "query_query": True, "document_document": True}
    with_it, without = LossConfig(**options), LossConfig(**options, info_nce_weight=0.0, kl_weight=1.0)
    assert with_it.has_in_batch and with_it.has_query_columns and with_it.columns(2) == 3
    assert not without.has_in_batch and not without.has_query_columns and without.columns(2) == 0
    assert (
        not without.couples_rows and gather_columns(random_groups(), without, None, 0, torch.float32) is None
    )
