"""What tells that a run, a model or its data is going wrong: a figure, a limit, and what to do about it.

    no_negatives, trivial_negatives, apart, collapse      of a run (train/watch.py) and its checkpoints
    collapse, confusion, degradation                      of a model beside its scores (evaluation/beside.py)
    strict_threshold                                      of mining

Each gives an Alarm or None; nothing is stopped by one. How often they sound where nothing is wrong:
`python -m benchmarks.alarms`.

# n rows (vectors, queries) · D hidden_size
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nemo_embed_core.evaluation.rank_statistics import statistic_of
from nemo_embed_core.evaluation.statistics import LEVEL, bootstrap, interval


class Alarm(NamedTuple):
    """kind: its name in reports and docs.  says: the figure, what it means, what to do."""

    kind: str
    says: str


WINDOW, FEWEST = 100, 20  # steps that a figure of training is the mean of, and the least of them
FEWEST_ROWS = 64  # vectors of which a spread is judged
FEWEST_QUERIES = 10  # of a language: an interval of fewer holds less than its level

# ------------------------------------------------------------------------------------------ negatives

WITHOUT = 0.05  # of the rows: as many steps of every hundred would teach nothing
TRIVIAL = 0.01  # nats


def no_negatives(without: Sequence[float], rows: Sequence[float]) -> Alarm | None:
    """sum(without) / sum(rows) > 0.05: rows of the last WINDOW steps that had no candidate.

    without: rows_without_candidates of each step; rows: of each, but for graded pairs. A row without a
    candidate, because its negatives are missing, equal to a positive or of its class, has loss 0 and
    gradient 0. Rows that have none in the data are left out before the first step, so what is counted is
    lost in the batch: healthy runs have 0.
    """
    share = sum(without) / max(1, sum(rows))
    if len(without) < FEWEST or share <= WITHOUT:
        return None
    return Alarm(
        "no_negatives",
        f"{share:.1%} of the rows of the last {len(without)} steps have no negative, or only texts that are "
        "right for them, and teach nothing: mine them again with a higher threshold or a larger corpus, or "
        "set loss.in_batch",
    )


def trivial_negatives(losses: Sequence[float]) -> Alarm | None:
    """mean(losses) < 0.01 over the last WINDOW steps: the positive has 99 % of the softmax.

    losses: of InfoNCE, without its weight; of several widths the largest. Its gradient in the logits is p - 1
    at the positive and p elsewhere, with 1 - p <= loss: below 0.01 a row moves the weights by less than a
    hundredth of what an open one does. So it is with negatives that are empty, of another language or topic,
    or learnt by heart.
    """
    mean = math.fsum(losses) / max(1, len(losses))
    if len(losses) < FEWEST or not mean < TRIVIAL:
        return None
    return Alarm(
        "trivial_negatives",
        f"the mean InfoNCE of the last {len(losses)} steps is {mean:.4f}: every negative is told from its "
        "positive at once and the steps teach next to nothing: mine harder negatives (docs/mining.md), set "
        "loss.in_batch, or stop if the rows are known by heart",
    )


FEW_SHARE = 0.5  # of the queries


def strict_threshold(report: Mapping[str, Any]) -> Alarm | None:
    """(with_no_negatives + with_fewer_than_k) / queries > 0.5 of mining's report, where the corpus has more
    documents than were asked for.

    Every candidate at or above threshold * positive is refused. Where most queries are left with fewer than k
    out of a whole corpus, the threshold, not the corpus, decides what is trained on. In a corpus of at
    most 10 k documents it may be the corpus.
    """
    few, k = report["with_no_negatives"] + report["with_fewer_than_k"], report["num_negatives"]
    share = few / max(1, report["queries"])
    if share <= FEW_SHARE or report["documents"] <= 10 * k:
        return None
    return Alarm(
        "strict_threshold",
        f"{share:.1%} of the queries have fewer than {k} negatives below the ceiling in a corpus of "
        f"{report['documents']:,}: threshold={report['threshold']} is too strict for this corpus and "
        "teacher: raise it (--sweep shows how far), or ask for fewer",
    )


# ------------------------------------------------------------------------------------------ train and dev

RISE, EVALUATIONS = 0.05, 2


def apart(dev: Sequence[float], train: Sequence[float]) -> Alarm | None:
    """dev[-1] > 1.05 * min(dev), the minimum 2 evaluations or more ago, and train[-1] < train at the minimum.

    dev: the held-out loss of each evaluation; train: the mean training loss of the steps before each. Losses
    with other candidates are not compared with one another, but each with itself: one falls, one rises. The
    limit and the wait leave out the noise between two evaluations; what that is depends on the dev set.
    """
    if len(dev) <= EVALUATIONS:
        return None
    best = int(np.argmin(dev))
    is_apart = dev[-1] > (1 + RISE) * dev[best] and train[-1] < train[best]
    if len(dev) - 1 - best < EVALUATIONS or not is_apart:
        return None
    return Alarm(
        "apart",
        f"the held-out loss is {dev[-1]:.4f}, {dev[-1] / dev[best] - 1:.1%} above its best of "
        f"{len(dev) - 1 - best} evaluations ago, while the training loss fell from {train[best]:.4f} to "
        f"{train[-1]:.4f}: take the best checkpoint, train for fewer epochs, lower optim.lr or add data",
    )


# ------------------------------------------------------------------------------------------ collapse

MEAN_NORM = 0.95  # two texts at random then have a cosine of 0.9
EFFECTIVE_RANK = 4.0


def spread(rows_nD: np.ndarray) -> dict[str, float]:
    """How much of the sphere the vectors use, of unit rows u, their mean m and the eigenvalues s of their
    covariance:

        mean_norm       |m|; |m|^2 is the mean cosine of two rows, up to 1 / n
        effective_rank  exp(-sum p log p), p = s / sum(s) (Roy and Vetterli 2007); at most n - 1 and D
        isotropy        min Z(c) / max Z(c), Z(c) = sum exp(c . u) over the principal directions c and -c of
                        the rows (Mu and Viswanath, arXiv:1702.01417); 1: no direction is preferred

    From the [n, n] products: 2 n^2 D FLOP, and an eigendecomposition of n^3. Rows of length 0 stay it.
    """
    rows = rows_nD.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    n, mean_D = len(rows), rows.mean(0)
    products = rows @ rows.T
    centred = products - products.mean(0) - products.mean(1)[:, None] + products.mean()
    values = np.linalg.eigvalsh(centred)
    values = values[values > 1e-12 * n]  # below: what subtracting the means of equal rows rounds to
    shares = values / values.sum()
    lengths, vectors = np.linalg.eigh(products)
    kept = lengths > 1e-10 * n
    along = vectors[:, kept] * np.sqrt(lengths[kept])  # c . u of each row and direction
    across = [float(n)] if kept.sum() < rows.shape[1] else []  # directions that no row has
    sums = np.concatenate([np.exp(along).sum(0), np.exp(-along).sum(0), across])
    return {
        "mean_norm": float(np.linalg.norm(mean_D)),
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 1.0,
        "isotropy": float(sums.min() / sums.max()),
        "rows": n,
    }


def collapse(figures: Mapping[str, float], what: str) -> Alarm | None:
    """mean_norm > 0.95, or effective_rank < 4, of spread() of 64 rows or more of different texts.

    At 0.95 two texts at random have a cosine of 0.9, and all scores lie in what is left: at temperature 0.02
    in 5 units of a logit. Below rank 4 the vectors lie on a line, a plane or a room, whatever D is. Random
    weights have cosines of 0.9999 (docs/log.md): a run is judged from its second look on.
    """
    if figures["rows"] < FEWEST_ROWS:
        return None
    if figures["mean_norm"] <= MEAN_NORM and figures["effective_rank"] >= EFFECTIVE_RANK:
        return None
    return Alarm(
        "collapse",
        f"{what} lie together: the mean of {figures['rows']:.0f} unit rows has length "
        f"{figures['mean_norm']:.3f}, their effective rank is {figures['effective_rank']:.1f}: lower "
        "optim.lr, raise the batch or the number of negatives, and look whether texts reach the model whole",
    )


# ------------------------------------------------------------------------------------------ two scores


def differences(
    base_n: np.ndarray,
    model_n: np.ndarray,
    gold_n: np.ndarray | None,
    statistic: str,
    groups: Sequence[str],
    draws: int,
    seed: Sequence[int],
) -> list[dict[str, Any]]:
    """score(model) - score(base) of each group of queries that has FEWEST_QUERIES, and its paired interval.

    The interval has level 1 - 0.05 / m, of m groups (Bonferroni): the chance that a group whose scores are
    alike has an interval that leaves out 0 is 0.05 for all of them together, half of it for the worse.
    statistic, gold_n: of a report's task (rank_statistics.py).
    """
    labels = np.array(groups)
    names = [name for name in dict.fromkeys(groups) if (labels == name).sum() >= FEWEST_QUERIES]
    found = []
    for name in names:
        part = np.flatnonzero(labels == name)
        values_2n = np.stack([base_n[part], model_n[part]])
        one = statistic_of(statistic, values_2n, None if gold_n is None else gold_n[part])
        base, score = one(np.ones((1, len(part)), np.int64))[0]
        drawn = bootstrap(one, len(part), draws, [*seed, zlib.crc32(name.encode())])
        level = 1 - (1 - LEVEL) / len(names)
        low, high = interval(drawn[:, 1] - drawn[:, 0], len(part), level)
        found.append(
            {"group": name, "queries": len(part), "base": float(base), "score": float(score),
             "difference": float(score - base), "low": float(low), "high": float(high)}
        )  # fmt: skip
    return found


def degradation(found: Sequence[Mapping[str, Any]], base: str) -> Alarm | None:
    """Of the groups (languages) of differences(): some interval lies below 0.

    On two models of the same scores it sounds in 2.5 % of the tasks, whatever the number of languages.
    """
    worse = [one for one in found if one["high"] < 0]
    if not worse:
        return None
    named = "; ".join(
        f"{one['group'] or 'all queries'} {one['base']:.4f} to {one['score']:.4f} "
        f"[{one['low']:+.4f}, {one['high']:+.4f}]"
        for one in sorted(worse, key=lambda one: one["difference"])
    )
    return Alarm(
        "degradation",
        f"worse than {base} in {len(worse)} of {len(found)}: {named}: add rows of these languages and of "
        "this kind of task, lower optim.lr, or average with the base (launch/merge.py)",
    )


def confusion(found: Mapping[str, Any], task: str) -> Alarm | None:
    """score(under another task type's instruction) - score(under its own): the interval of differences()
    lies above 0, or the two scores are equal in every query.

    An instruction tells the model what is asked. One that helps less than a wrong one was learnt for another
    task; one that changes no score is not read. 2.5 % of the models without a preference sound.
    """
    if found["difference"] == found["low"] == found["high"] == 0:
        says = "is the same in every query: the model does not read instructions"
    elif found["low"] > 0:
        says = (
            f"is {found['difference']:.4f} higher [{found['low']:+.4f}, {found['high']:+.4f}]: the task "
            "types are confused: check the instruction (--task), and train each task with its own"
        )
    else:
        return None
    return Alarm("confusion", f"under the instruction {task!r} the score {says}")
