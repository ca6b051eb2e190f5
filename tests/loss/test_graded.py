"""CoSENT against sentence-transformers, in any division of the batch, from a table to its metrics."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import Server
from tiny import MODEL, WORDS, train_config

from nemo_embed_core.config import DatasetConfig, LossConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.loss.contrastive import Groups
from nemo_embed_core.loss.graded import cosent
from nemo_embed_core.loss.objective import figures, objective, sum_names
from nemo_embed_core.train.preflight import prepare


class OneRank:
    @staticmethod
    def size() -> int:
        return 1


def graded(grades: list[float], M: int = 1, D: int = 16) -> Groups:
    B = len(grades)
    q, docs = (F.normalize(torch.randn(*shape, D, dtype=torch.float64), dim=-1) for shape in ((B,), (B, M)))
    ids, mask = torch.arange(B * M).view(B, M), torch.ones(B, M, dtype=torch.bool)
    return Groups(q.requires_grad_(), docs.requires_grad_(), mask, ids, grade_B=torch.tensor(grades))


def test_sentence_transformers_says_the_same() -> None:
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    g = graded([0.0, 2.5, 2.5, 5.0, 1.0, 0.0, 4.0])
    got = cosent(g, 0.1, OneRank)
    want = CoSENTLoss(None, scale=10.0).compute_loss_from_embeddings([g.q_BD, g.docs_BMD[:, 0]], g.grade_B)
    assert abs(got / want - 1) < 1e-12 and want > 0.1
    # The peer takes cosines of rows of any length: its gradient has no radial part.
    for x, y, rows in zip(
        *(torch.autograd.grad(loss, [g.q_BD, g.docs_BMD]) for loss in (got, want)), (g.q_BD, g.docs_BMD),
        strict=True,
    ):  # fmt: skip
        across = x - (x * rows).sum(-1, keepdim=True) * rows
        assert (across - y).abs().max() < 1e-12 and y.abs().max() > 1e-3


def test_what_has_no_order_has_no_loss_and_no_gradient() -> None:
    for grades in ([3.0], [2.0, 2.0, 2.0], [torch.nan, torch.nan], [torch.nan, 1.0, torch.nan]):
        g = graded(grades)
        loss = cosent(g, 0.05, OneRank)
        assert loss == 0 and all((x == 0).all() for x in torch.autograd.grad(loss, [g.q_BD, g.docs_BMD]))


def test_a_graded_pair_is_in_no_other_term() -> None:
    """Beside rows of the contrastive term, whose loss and metrics are as if it were not there."""
    g = graded([torch.nan, 1.0, torch.nan, 0.0], M=3)
    loss = LossConfig(temperature=0.1, cosent_weight=2.0, margin_mse_weight=1.0)
    g = dataclasses.replace(g, teacher_BM=torch.rand(4, 3))
    losses_B, sums = objective(g, loss, torch.float64, OneRank, 0)
    plain_B, _ = objective(
        dataclasses.replace(g, grade_B=None), dataclasses.replace(loss, cosent_weight=0.0), torch.float64,
        OneRank, 0,
    )  # fmt: skip
    whole = cosent(g, 0.05, OneRank)
    want = torch.stack([plain_B[0], 0 * whole, plain_B[2], 0 * whole]) + 2 * whole
    assert (losses_B - want).abs().max() < 1e-12 and whole > 0
    totals = {**dict(zip(sum_names(loss), sums.tolist(), strict=True)), "rows": 4.0, "loss": 0.0}
    found = figures(totals, loss)
    assert found["graded_rows"] == found["scored_rows"] == 2 and totals["ranked_rows"] == 2
    assert found["rows_without_candidates"] == 0, "graded pairs have none by design"
    assert found["losses"]["cosent"] == pytest.approx(2 * whole.item())  # of a batch, whose rows all have it


def write_table(path: Path) -> None:
    rng, lines = random.Random(3), []
    for i in range(40):
        one = rng.choices(WORDS, k=rng.randint(3, 12))
        shared = rng.randint(0, len(one))
        two = one[:shared] + rng.choices(WORDS, k=rng.randint(1, 8))
        lines.append(
            json.dumps(
                {"sentence1": " ".join(one), "sentence2": " ".join([*two, str(i)]), "score": shared % 6}
            )
        )
    path.write_text("\n".join(lines) + "\n")


def configure(folder: Path, **changes: Any):
    datasets = [DatasetConfig(path=str(folder / "sts.jsonl"), task_type="sts", grades=True)]
    options = {
        "loss": {"cosent_weight": 1.5, "matryoshka_dims": [64, 8], "cosent_temperature": 0.1},
        "data": {"datasets": datasets, "max_tokens": 60}, "steps": 3, **changes,
    }  # fmt: skip
    return train_config(folder, **options)


def train(folder: str, layouts: list[tuple[int, bool, int]]) -> list[list[dict]]:
    import torch.distributed as dist

    from nemo_embed_core.data.tokenizer import load_tokenizer
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train.preflight import Prepared
    from nemo_embed_core.train.trainer import Trainer

    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float64)
    found = []
    for tp, sp, dp in layouts:
        mesh = build_mesh(torch.device("cpu"), dp, tp, sp)
        parallel = {"tp_size": tp, "sequence_parallel": sp}
        config = configure(Path(folder), output_dir=f"{folder}/{tp}{sp}{dp}", parallel=parallel)
        prepared = Prepared(MODEL, load_tokenizer(config.tokenizer))
        trainer = Trainer(config, mesh, prepared, log=lambda message: None, dtype=torch.float64)
        found.append([trainer.train_step()[0] for _ in range(3)])
        trainer.close()
    torch.set_default_dtype(torch.float32)
    return found


@pytest.mark.dist
def test_grades_train_alike_in_every_layout(tmp_path: Path, server: Server) -> None:
    """Micro-batches of some 3 of 8 pairs, and ranks with 4 each, are one batch for the loss."""
    train_config(tmp_path)
    write_table(tmp_path / "sts.jsonl")
    prepare(configure(tmp_path, output_dir=str(tmp_path / "built")))
    (alone,) = server.results(train, 1, str(tmp_path), [(1, False, 1)])[0]
    split, parted = server.results(train, 2, str(tmp_path), [(1, False, 2), (2, True, 1)])[0]
    assert alone[0]["micro_batches"] > 2
    for step, truth in enumerate(alone):
        assert truth["graded_rows"] == 8 and truth["rows_without_candidates"] == 0
        assert truth["losses"]["info_nce@64"] is None
        assert truth["loss"] == pytest.approx(1.5 * sum(truth["losses"][f"cosent@{n}"] for n in (64, 8)))
        for got in (split[step], parted[step]):
            for name in ("loss", "grad_norm"):
                assert abs(got[name] / truth[name] - 1) < 1e-10, (step, name)
            assert got["losses"]["cosent@8"] == pytest.approx(truth["losses"]["cosent@8"], rel=1e-10)


def test_grades_without_a_term_and_a_term_without_grades_are_refused(tmp_path: Path) -> None:
    config = configure(tmp_path)
    write_table(tmp_path / "sts.jsonl")
    prepare(config)
    with pytest.raises(UserError, match=r"40 rows are graded pairs .* only loss\.cosent_weight has"):
        prepare(dataclasses.replace(config, loss=LossConfig()))
    rows = DatasetConfig(path=str(tmp_path / "train.jsonl"))
    both = dataclasses.replace(config.data, datasets=[*config.data.datasets, rows], max_tokens=400)
    with pytest.raises(UserError, match=r"40 of 101 rows are graded pairs.*data\.batches=one_source"):
        prepare(dataclasses.replace(config, data=both))
    prepare(dataclasses.replace(config, data=dataclasses.replace(both, batches="one_source")))
    plain = dataclasses.replace(both, datasets=[rows])
    with pytest.raises(UserError, match="cosent_weight needs graded pairs: set grades"):
        prepare(dataclasses.replace(config, data=plain))
    wrong = dataclasses.replace(rows, grades=True)
    with pytest.raises(UserError, match="a row without a grade, and the dataset's grades is set"):
        prepare(dataclasses.replace(config, data=dataclasses.replace(both, datasets=[wrong])))
    with pytest.raises(UserError, match="grades keeps all pairs, min_grade=3 some: set one"):
        dataclasses.replace(wrong, min_grade=3.0)
