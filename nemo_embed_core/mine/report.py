"""Is the threshold right for this corpus? The numbers, a table, and a histogram that a plot can use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nemo_embed_core.mine.topk import SearchStats

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
NUM_BINS = 60


def build_report(
    *,
    positive_scores: np.ndarray,
    lowest: np.ndarray,
    scores: np.ndarray,
    settings: dict[str, Any],
    stats: SearchStats,
) -> dict[str, Any]:
    """positive_scores: all pairs; lowest [Q]: each query's lowest; scores [Q, k]: mined, -inf where there is none."""
    found = np.isfinite(scores)
    counts = found.sum(1)
    k = scores.shape[1]
    negatives = scores[found]
    low, high = float(positive_scores.min()), float(positive_scores.max())
    if len(negatives):
        low, high = min(low, float(negatives.min())), max(high, float(negatives.max()))
    edges = np.linspace(low, high if high > low else low + 1e-6, NUM_BINS + 1)
    return {
        **settings,
        "with_no_negatives": int((counts == 0).sum()),
        "with_fewer_than_k": int(((counts > 0) & (counts < k)).sum()),
        "with_k_negatives": int((counts == k).sum()),
        "negatives": int(counts.sum()),
        "positive_score_quantiles": _quantiles(positive_scores),
        "negative_score_quantiles": _quantiles(negatives),
        "hardest_negative_to_positive": _quantiles((scores[:, 0] / lowest)[found[:, 0] & (lowest > 0)]),
        "negative_positive_scores": int((lowest < 0).sum()),  # queries for which threshold * s would have been wrong
        "histogram": {
            "edges": [float(e) for e in edges],
            "positives": np.histogram(positive_scores, edges)[0].tolist(),
            "negatives": np.histogram(negatives, edges)[0].tolist(),
        },
        "search": {
            "method": stats.method,
            "certified_share": stats.num_certified / max(1, stats.num_queries),
            "exhaustive": stats.num_exhaustive,
        },
    }


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    return {f"{q:g}": round(float(v), 6) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def print_report(report: dict[str, Any], log: Callable[[str], None] = print) -> None:
    total, k = report["queries"], report["num_negatives"]
    log(f"{total:,} queries, {report['documents']:,} documents, threshold {report['threshold']}")
    for key, words in [
        ("with_no_negatives", "no negative below the ceiling"),
        ("with_fewer_than_k", f"1 to {k - 1} negatives"),
        ("with_k_negatives", f"{k} negatives"),
    ]:
        if key != "with_fewer_than_k" or k > 1:
            log(f"  {words:<32}{report[key]:>10,}  {report[key] / total:>7.1%}")
    log(f"  {'scores':<22}" + "".join(f"{'q' + q:>9}" for q in map("{:g}".format, QUANTILES)))
    for key, words in [
        ("positive_score_quantiles", "positives"),
        ("negative_score_quantiles", "mined negatives"),
        ("hardest_negative_to_positive", "hardest / positive"),
    ]:
        if report[key] is not None:
            log(f"  {words:<22}" + "".join(f"{v:>9.3f}" for v in report[key].values()))
    if report["negative_positive_scores"]:
        log(
            f"  {report['negative_positive_scores']:,} queries have a positive that scores below 0: is the model trained?"
        )


def plot_report(report: dict[str, Any], path: str) -> None:
    """The two histograms as a PNG (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    histogram = report["histogram"]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key in ("positives", "negatives"):
        total = max(1, sum(histogram[key]))
        axes.stairs([100 * c / total for c in histogram[key]], histogram["edges"], label=key, fill=True, alpha=0.5)
    axes.set_xlabel("score")
    axes.set_ylabel("% of pairs")
    title = f"{report['queries']:,} queries, {report['documents']:,} documents, threshold {report['threshold']}"
    axes.set_title(f"{title}: {report['with_no_negatives'] / report['queries']:.1%} without a negative")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
