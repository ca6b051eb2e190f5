"""Scores of the weights while they train, on all ranks with the training's own forward: no second model.

    evaluation = Evaluation(config, engine, state, sets, before, log)
    evaluation.after(step)     # {"eval": {"mean": ..., "NAME/ndcg_at_10": ..., "seconds": ..., "share": ...}}
    state.evaluated            # what a checkpoint keeps of it: these figures, and the best so far

The batches of texts are the same at every number of data-parallel ranks, which take them in turn, and each is
scored alone; so are the ranks' sums of the loss but for their order, beyond the tenth digit. No random number
is drawn, and nothing of a step is left or taken: losses are bit for bit those without (tests/train).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_embed_core.config import TrainConfig
from nemo_embed_core.config.held_out import MAIN
from nemo_embed_core.data.packing import PackedBatch, pack_bin, shapes_cost_memory, text_bins
from nemo_embed_core.evaluation.dev import DevSet, RetrievalSet, Side, StsSet
from nemo_embed_core.evaluation.retrieval import MAX_SCORES, Best
from nemo_embed_core.parallel.collectives import all_reduce_, gather_objects
from nemo_embed_core.train.engine import Engine
from nemo_embed_core.train.run_state import RunState
from nemo_embed_core.train.spikes import NonFiniteError
from nemo_embed_core.train.step import Stopped, embed


class Share:
    """The batches of a side's texts that this rank encodes: every dp_size-th of them all."""

    def __init__(self, side: Side, config: TrainConfig, engine: Engine):
        mesh = engine.mesh
        self.num_texts, self.of = len(side.tokens), side.of
        self._few_shapes = shapes_cost_memory(mesh.device, engine.dtype)
        self._room = config.data.max_tokens, mesh.tp.size
        lengths = np.fromiter(map(len, side.tokens), np.int64, len(side.tokens))
        bins = list(text_bins(lengths, *self._room))
        self.rounds = -(-len(bins) // mesh.dp_size)
        mine = bins[mesh.dp_rank :: mesh.dp_size]
        self.num_mine = len(mine)
        # Every rank runs every round, as gathers of weights wait for all: where there is none left, the
        # smallest.
        self.bins = mine if len(mine) == self.rounds else [*mine, bins[-1]]
        self._tokens = {i: side.tokens[i] for bin_ in self.bins for i in bin_.tolist()}

    def batch(self, i: int) -> PackedBatch:
        arrays = [self._tokens[k] for k in self.bins[i].tolist()]
        return pack_bin(arrays, *self._room, self._few_shapes)


class Evaluation:
    """Every rank makes one, of the same sets; without any it is never due. before("evaluation 2/9", 2) is
    called before each forward, equally often on every rank; Stopped ends the evaluation there."""

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        state: RunState,
        sets: list[DevSet],
        before: Callable[[str, int], None],
        log: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.config, self.engine, self.state = config, engine, state
        self._before, self._log, self._clock = before, log, clock
        self._sets = [(dev, [Share(side, config, engine) for side in dev.sides]) for dev in sets]
        self._rounds = sum(share.rounds for _, shares in self._sets for share in shares)
        self._cost: float | None = None  # seconds of the last one
        self._is_stretched = False
        self.begin()
        if not sets:
            return
        eval_ = config.eval
        known = repr([(dev.name, dev.digest) for dev in sets]) + eval_.metric + repr(config.loss.temperature)
        digest = hashlib.sha256(known.encode()).hexdigest()
        if state.evaluated and state.evaluated["digest"] != digest:
            log(
                "WARNING: the dev sets, their texts or eval.metric changed since the checkpoint: the best so "
                "far cannot be compared, and is looked for anew"
            )
            state.evaluated = {}
        state.evaluated |= {"digest": digest, "metric": eval_.metric}
        log(
            f"evaluation on {', '.join(dev.name for dev in sets)} every {eval_.every} steps, in at most "
            f"{eval_.max_share:.0%} of the time; the best checkpoint is that of {eval_.metric}"
        )

    def begin(self) -> None:
        """The time in which evaluations have their share begins."""
        self._begun, self._spent = self._clock(), 0.0

    def after(self, step: int) -> dict[str, Any]:
        """What metrics.jsonl says of the weights after this step, where they are scored now; {} where not.
        The best of a step so far is then in the state. All ranks call it, and get the same."""
        if not self._due(step):
            return {}
        try:
            return {"eval": self._run(step)}
        except Stopped as place:
            self._log(f"asked to stop: left the evaluation of step {step} before {place}")
            return {}

    def _due(self, step: int) -> bool:
        is_last = step == self.config.num_steps
        if (
            not self._sets
            or self.state.evaluated.get("step") == step
            or (step % self.config.eval.every and not is_last)
        ):
            return False
        if step == 0 or is_last or self._cost is None:
            return True
        elapsed, share = self._clock() - self._begun, self.config.eval.max_share
        allows = self._spent + self._cost <= share * (elapsed + self._cost)
        is_due = gather_objects(share == 1 or allows)[0]
        if not is_due and not self._is_stretched:
            self._log(
                f"evaluation of step {step} is left out, as others will be: one takes {self._cost:.1f} s, "
                f"which every {self.config.eval.every} steps would be more than eval.max_share={share:g} of "
                "the time; raise it or eval.every, or sample with max_queries and max_documents"
            )
        self._is_stretched = not is_due
        return is_due

    def _run(self, step: int) -> dict[str, float]:
        start = self._clock()
        figures: dict[str, float] = {}
        self._at, self._step = 0, step
        with self.engine.encoding():
            for dev, shares in self._sets:
                found = (
                    self._retrieval(dev, *shares)
                    if isinstance(dev, RetrievalSet)
                    else self._sts(dev, *shares)
                )
                figures |= {f"{dev.name}/{name}": value for name, value in found.items()}
        main = [value for name, value in figures.items() if name.rsplit("/", 1)[1] in MAIN.values()]
        figures = {"mean": math.fsum(main) / len(main), **figures}
        metric = self.config.eval.metric
        value, best = figures[metric], self.state.evaluated.get("best")
        is_less = metric.endswith("/loss")
        if step and (best is None or (value < best["value"] if is_less else value > best["value"])):
            best = {"step": step, "value": value}
            self.state.evaluated["best"] = best
        self.state.evaluated |= {"step": step, "figures": figures}
        self._cost = self._clock() - start
        self._spent += self._cost if step else 0.0
        share = self._spent / max(self._clock() - self._begun, 1e-9)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        so_far = f"; best of step {best['step']}: {best['value']:.4f}" if best is not None else ""
        self._log(f"evaluation of step {step}: {shown}{so_far} ({self._cost:.1f} s, {share:.1%} of the time)")
        return {**figures, "seconds": self._cost, "share": share}

    def is_best(self, step: int) -> bool:
        """Whether this step's weights are the best so far."""
        best = self.state.evaluated.get("best")
        return best is not None and best["step"] == step

    # ---- vectors

    def _rows(self, share: Share) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(texts [n], their unit rows [n, D] in fp32) of each batch of this rank; all ranks go through it."""
        for i in range(share.rounds):
            self._at += 1
            self._before(f"evaluation {self._at}/{self._rounds}", self._at)
            batch = share.batch(i).to(self.engine.mesh.device)
            with torch.no_grad():
                rows_ND = embed(self.engine.model, batch)[: batch.num_sequences]
            if i < share.num_mine:
                yield share.bins[i], rows_ND.float()

    def _whole(self, share: Share) -> Tensor:
        """[texts, D] on every rank. A sum of a row and zeros is the row."""
        mesh, width = self.engine.mesh, self.engine.model_config.hidden_size
        out_ND = torch.zeros(share.num_texts, width, device=mesh.device)
        for texts, rows_ND in self._rows(share):
            out_ND[torch.from_numpy(texts).to(mesh.device)] = rows_ND
        rows_ND = all_reduce_(out_ND, mesh.dp_group)[torch.from_numpy(share.of).to(mesh.device)]
        if not bool(rows_ND.isfinite().all()):  # NaN would be sorted to the top
            raise NonFiniteError(self._broken)
        return rows_ND

    @property
    def _broken(self) -> str:
        return (
            f"evaluation of step {self._step}: embeddings are NaN or infinite, so the weights are broken; "
            "lower optim.lr and continue from an earlier checkpoint"
        )

    # ---- figures

    def _sts(self, dev: StsSet, texts: Share) -> dict[str, float]:
        first_ND, second_ND = self._whole(texts).cpu().chunk(2)
        # Bit for bit as sentence-transformers, and so mteb, does: copies of texts tie there and here.
        cosines = (F.normalize(first_ND, dim=-1) * F.normalize(second_ND, dim=-1)).sum(-1)
        return {"spearman": dev.spearman(cosines.numpy())}

    def _retrieval(self, dev: RetrievalSet, queries: Share, documents: Share) -> dict[str, float]:
        """nDCG@10, and the mean over the queries that have a p of

            mean over p of -log(e^(s_p / t) / (e^(s_p / t) + sum_n e^(s_n / t)))

        p: texts of relevant documents, n: all others, but for the text of the query's own document (own_Q),
        which is not ranked either. s: cosines; t: loss.temperature. Documents are never all in memory: a
        batch of them is scored and forgotten, by one of the tp ranks that have it.
        """
        tp, t = self.engine.mesh.tp, self.config.loss.temperature
        queries_QD = self._whole(queries)
        num_queries, num_documents = len(queries_QD), len(documents.of)
        by_text = np.argsort(documents.of, kind="stable")
        judged = np.stack(np.divmod(dev.judged_J, num_documents))  # [2, J]: queries and documents
        own = np.stack([np.flatnonzero(dev.own_Q >= 0), dev.own_Q[dev.own_Q >= 0]])
        judged_keys, own_keys = (texts * num_queries + rows for rows, texts in (
            (judged[0], documents.of[judged[1]]), (own[0], documents.of[own[1]])
        ))  # fmt: skip
        relevant = np.setdiff1d(judged_keys, own_keys)
        pairs, no_negatives = (  # [2, J]: queries and texts, by the texts
            np.stack(np.divmod(keys, num_queries))[::-1]
            for keys in (relevant, np.union1d(relevant, own_keys))
        )
        best = Best(num_queries, range(num_documents))
        negatives_Q, cosines_J = np.zeros(num_queries), np.zeros(pairs.shape[1])
        is_finite, step = True, max(1, MAX_SCORES // num_queries)
        for i, (all_texts, all_rows_ND) in enumerate(self._rows(documents)):
            if i % tp.size != tp.rank:
                continue
            for at in range(0, len(all_texts), step):
                texts, rows_ND = all_texts[at : at + step], all_rows_ND[at : at + step]
                scores_Qn = queries_QD @ rows_ND.T
                is_finite &= bool(rows_ND.isfinite().all())
                columns, places = members(documents.of[by_text], texts)
                best.add(scores_Qn[:, torch.from_numpy(columns).to(scores_Qn.device)], by_text[places])
                weights_Qn = scores_Qn.double().sub_(1).div_(t).exp_()
                weights_Qn[_entries(no_negatives, texts, weights_Qn.device)[1]] = 0
                negatives_Q += weights_Qn.sum(1).cpu().numpy()
                places, entries = _entries(pairs, texts, scores_Qn.device)
                cosines_J[places] = scores_Qn[entries].double().cpu().numpy()
        parts = gather_objects((best.rows, best.documents, best.scores, negatives_Q, cosines_J, is_finite))
        if not all(part[-1] for part in parts):
            raise NonFiniteError(self._broken)
        best = Best(num_queries, range(num_documents))
        for rows, found, scores, *_ in parts:
            best.merge(rows, found, scores)
        negatives_Q, cosines_J = (sum(part[k] for part in parts) for k in (3, 4))
        loss = _loss(negatives_Q, (cosines_J - 1) / t, pairs[0])
        return {"ndcg_at_10": dev.ndcg_at_10(best), "loss": loss}


def _entries(
    pairs: np.ndarray, texts: np.ndarray, device: torch.device
) -> tuple[np.ndarray, tuple[Tensor, ...]]:
    """(numbers of the pairs [2, J] of these texts, their rows and columns of scores [Q, len(texts)])."""
    columns, places = members(pairs[1], texts)
    return places, tuple(torch.from_numpy(x).to(device) for x in (pairs[0, places], columns))


def _loss(negatives_Q: np.ndarray, logits_J: np.ndarray, queries_J: np.ndarray) -> float:
    """Of the sums over n of e^((s_n - 1) / t), the (s_p - 1) / t and the query of each p; ten digits, as the
    order of the sums is the layout's."""
    with np.errstate(divide="ignore"):
        losses_J = np.logaddexp(logits_J, np.log(negatives_Q)[queries_J]) - logits_J
    counts_Q = np.bincount(queries_J, minlength=len(negatives_Q))
    sums_Q = np.bincount(queries_J, losses_J, minlength=len(negatives_Q))
    has = counts_Q > 0
    return float(f"{math.fsum(sums_Q[has] / counts_Q[has]) / has.sum():.10g}")


def members(sorted_N: np.ndarray, values_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(i, j) of all pairs with sorted_N[j] == values_n[i]."""
    first, end = (np.searchsorted(sorted_N, values_n, side) for side in ("left", "right"))
    counts = end - first
    before = counts.cumsum() - counts
    return np.repeat(np.arange(len(values_n)), counts), np.arange(counts.sum()) + np.repeat(
        first - before, counts
    )
