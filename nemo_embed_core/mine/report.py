"""Is the threshold right for this corpus? The numbers, a table, and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nemo_embed_core.data.statistics import QUANTILES, quantiles
from nemo_embed_core.evaluation.alarms import strict_threshold
from nemo_embed_core.mine.search.engine import SearchStats

SHARES = ("with_no_negatives", "with_fewer_than_k", "with_k_negatives")
NUM_BINS = 60


def build_report(
    *,
    positive_scores: np.ndarray,
    lowest: np.ndarray,
    scores: np.ndarray,
    random_scores: np.ndarray,
    scripts: Sequence[str],
    languages: Sequence[str],
    settings: dict[str, Any],
    stats: SearchStats,
    sweep: list[dict[str, Any]],
    num_searched_again: int,
) -> dict[str, Any]:
    """positive_scores: all pairs; lowest [Q]: each query's; scores [Q, >= k]: of negatives, -inf if none.
    scripts, languages: of each query."""
    found = np.isfinite(scores)
    counts, negatives, k = found.sum(1), scores[found], settings["num_negatives"]
    both = np.concatenate([positive_scores, negatives])
    low, high = float(both.min()), float(both.max())
    edges = np.linspace(low, high if high > low else low + 1e-6, NUM_BINS + 1)
    return {
        **settings,
        **_shares(counts, k),
        "negatives": int(counts.sum()),
        # No harder than half of the documents drawn without looking at the query: they teach nothing.
        "trivial_negatives": int((negatives <= np.median(random_scores)).sum()),
        "positive_score_quantiles": quantiles(positive_scores),
        "negative_score_quantiles": quantiles(negatives),
        "random_pair_score_quantiles": quantiles(random_scores),
        "hardest_negative_to_positive": quantiles(_hardest_to_positive(scores, lowest)),
        # Queries for which threshold * s would have been wrong.
        "negative_positive_scores": int((lowest < 0).sum()),
        # As the data says, "" where it does not; empty when it never does. No language is guessed.
        "by_language": by_group(languages, counts, k) if any(languages) else {},
        "by_script": by_group(scripts, counts, k),
        "sweep": sweep,
        "histogram": {
            "edges": [float(e) for e in edges],
            "positives": np.histogram(positive_scores, edges)[0].tolist(),
            "negatives": np.histogram(negatives, edges)[0].tolist(),
        },
        "search": {
            "method": stats.method,
            "certified_share": stats.num_certified / max(1, stats.num_queries),
            "exhaustive": stats.num_exhaustive,
            "again_for_sweep": num_searched_again,
        },
    }


def sweep_entry(threshold: float, scores: np.ndarray, lowest: np.ndarray) -> dict[str, Any]:
    """The result of a run at this threshold. margin: lowest positive's - hardest negative's score."""
    found = np.isfinite(scores)
    some = found[:, 0]
    margin = lowest[some].astype(np.float64) - scores[some, 0]
    return {
        "threshold": threshold,
        **_shares(found.sum(1), scores.shape[1]),
        "negatives": int(found.sum()),
        "mean_margin": float(margin.mean()) if some.any() else None,
        "mean_negative_score": float(scores[found].mean(dtype=np.float64)) if found.any() else None,
    }


def _shares(counts: np.ndarray, k: int) -> dict[str, int]:
    groups = (counts == 0, (counts > 0) & (counts < k), counts >= k)
    return {key: int(group.sum()) for key, group in zip(SHARES, groups, strict=True)}


def by_group(labels: Sequence[str], counts: np.ndarray, k: int) -> dict[str, dict[str, int]]:
    """The same shares per label, the commonest label first."""
    array = np.array(labels)
    return {
        label: {"queries": count, **_shares(counts[array == label], k)}
        for label, count in sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))
    }


def _hardest_to_positive(scores: np.ndarray, lowest: np.ndarray) -> np.ndarray:
    hardest = scores.max(1)  # the first, unless given ones were kept
    some = np.isfinite(hardest) & (lowest > 0)
    return hardest[some] / lowest[some]


# ------------------------------------------------------------------------------------------ to read


def print_report(report: dict[str, Any], log: Callable[[str], None] = print) -> None:
    total, k = report["queries"], report["num_negatives"]
    log(f"{total:,} queries, {report['documents']:,} documents, threshold {report['threshold']}")
    fewer = "1 negative" if k == 2 else f"1 to {k - 1} negatives"
    words = ("no negative below the ceiling", fewer, f"{k} negatives")
    for key, said in zip(SHARES, words, strict=True):
        if key != "with_fewer_than_k" or k > 1:
            log(f"  {said:<32}{report[key]:>10,}  {report[key] / total:>7.1%}")
    log(f"  {'scores':<22}" + "".join(f"{'q' + q:>9}" for q in map("{:g}".format, QUANTILES)))
    for key, said in [
        ("positive_score_quantiles", "positives"),
        ("negative_score_quantiles", "mined negatives"),
        ("hardest_negative_to_positive", "hardest / positive"),
        ("random_pair_score_quantiles", "random pairs"),
    ]:
        if report[key] is not None:
            log(f"  {said:<22}" + "".join(f"{v:>9.3f}" for v in report[key].values()))
    sampled, above = report["kept_out"].values()
    log(
        f"  of {sampled:,} queries looked at {above:,} have a passage at or above the ceiling that is no "
        "known positive: read `suspects` in the report"
    )
    for line in _cautions(report):
        log(f"  {line}")
    if trivial := report["trivial_negatives"]:
        log(f"  {trivial:,} of {report['negatives']:,} negatives score no higher than a random pair")
    if below := report["negative_positive_scores"]:
        log(f"  {below:,} queries have a positive that scores below 0: is the model trained?")
    for name, groups in (("language", report["by_language"]), ("script", report["by_script"])):
        if len(groups) > 1:
            print_groups(f"{name} of the query", groups, k, log)
    if report["sweep"]:
        _header("threshold", k, log, f"{'margin':>9}")
        for entry in report["sweep"]:
            margin = f"{entry['mean_margin']:>9.4f}" if entry["mean_margin"] is not None else f"{'-':>9}"
            _share_line(f"{entry['threshold']:g}", {**entry, "queries": total}, log, margin)


NOISE = {
    "duplicate_rows": "rows stand there twice, equal in normal form",
    "same_query_rows": "rows have a query that an earlier row has; they share what is relevant",
    "query_without_content": "queries have no content (white space, control characters, U+FFFD)",
    "document_without_content": "rows have a document without content",
    "query_equals_positive": "queries are equal to their positive",
    "query_equals_negative": "queries are equal to a negative of their row",
    "negative_equals_positive": "rows have a negative equal to a positive, in normal form",
    "negative_equals_positive_when_cut": "rows have a negative equal to a positive, once both are cut",
}
NOISE_SHARE, CUT_SHARE = 0.01, 0.05  # of rows, and of texts: above these it is a warning


def _cautions(report: dict[str, Any]) -> list[str]:
    """Effects of data and lengths on the result: truncation, rows that teach nothing, rounding."""
    alarm = strict_threshold(report)
    lines = [f"warning: {alarm.says}"] if alarm is not None else []
    for model in report["models"]:
        for side, option in (("queries", "query_max_length"), ("documents", "document_max_length")):
            count, tokens = model[f"{side}_truncated"], model[option]
            total = report["queries" if side == "queries" else "documents_encoded"]
            if count is None:
                name = model["name"] or "the model"
                lines.append(f"how many {side} were cut is not known: {name} does not say")
            elif count:
                warning = "warning: " if count > CUT_SHARE * total else ""
                share = f"{count / total:.1%} of the {side}"
                lines.append(f"{warning}{share} are cut at {tokens} tokens; --{option} sets it")
        if same := model["documents_same_when_cut"]:
            lines.append(
                f"warning: {same:,} documents are the same as another one once they are cut at {tokens} "
                "tokens; where one is a positive none is a negative: raise --document_max_length"
            )
    for key, words in NOISE.items():
        if count := report["noise"][key]:
            warning = "warning: " if count > NOISE_SHARE * report["queries"] else ""
            lines.append(f"{warning}{count:,} {words}")
    if count := report["positives_excluded"]:
        lines.append(f"warning: {count:,} rows have a positive that --exclude names: does the data leak?")
    total, again, above, relevant, is_kept = report["given_negatives"].values()
    if total:
        kept = "come first" if is_kept else "are replaced; --keep_negatives keeps them"
        lines.append(
            f"{total:,} negatives were given and {kept}: {again:,} mined again, {above:,} at or above the "
            f"ceiling, {relevant:,} known to be relevant"
        )
    dtype, error, near = report["storage"].values()
    if near:
        lines.append(
            f"{near:,} negatives are nearer to the ceiling than rounding to {dtype} can move scores "
            f"({error:.1e}); --dtype float32 rounds nothing"
        )
    return lines


def print_groups(
    title: str, groups: dict[str, dict[str, Any]], k: int, log: Callable[[str], None] = print
) -> None:
    """A line for each: queries, and the shares with no, fewer than k and k negatives."""
    _header(title, k, log)
    for name, group in groups.items():
        _share_line(name, group, log)


def _header(title: str, k: int, log: Callable[[str], None], more: str = "") -> None:
    few = f"1..{k - 1}" if k > 1 else "few"
    log(f"  {title:<22}{'queries':>10}{'none':>9}{few:>9}{k:>9}{more}")


def _share_line(name: str, group: dict[str, Any], log: Callable[[str], None], more: str = "") -> None:
    shares = "".join(f"{group[key] / group['queries']:>9.1%}" for key in SHARES)
    log(f"  {name[:21]:<22}{group['queries']:>10,}{shares}{more}")


def plot_report(report: dict[str, Any], path: str) -> None:
    """The score histograms, and beside them the shares per threshold and per language or script, as a PNG.

    Needs matplotlib.
    """
    from matplotlib.figure import Figure  # not pyplot: no windows, no state, half the time to import

    total = report["queries"]
    bars = []
    if report["sweep"]:
        bars.append(("threshold", {f"{e['threshold']:g}": {**e, "queries": total} for e in report["sweep"]}))
    for name in ("language", "script"):
        if len(groups := report[f"by_{name}"]) > 1:
            bars.append((f"{name} of the query", dict(list(groups.items())[:8])))
            break
    figure = Figure(figsize=(7 + 4 * len(bars), 4), layout="constrained")
    panels = figure.subplots(1, 1 + len(bars), width_ratios=[7] + [4] * len(bars), squeeze=False)
    histogram, axes = report["histogram"], panels[0][0]
    for key in ("positives", "negatives"):
        count = max(1, sum(histogram[key]))
        axes.stairs(
            [100 * c / count for c in histogram[key]], histogram["edges"], label=key, fill=True, alpha=0.5
        )
    axes.set(xlabel="score", ylabel="% of pairs")
    title = f"{total:,} queries, {report['documents']:,} documents, threshold {report['threshold']}"
    axes.set_title(f"{title}: {report['with_no_negatives'] / total:.1%} without a negative", fontsize=10)
    axes.legend()
    for axes, (title, groups) in zip(panels[0][1:], bars, strict=True):
        plot_shares(axes, title, groups, report["num_negatives"])
    figure.savefig(path, dpi=120)


def plot_datasets(reports: dict[str, dict[str, Any]], path: str) -> None:
    """The shares of every dataset, side by side, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no windows, no state, half the time to import

    figure = Figure(figsize=(max(5, 2 + len(reports)), 4), layout="constrained")
    plot_shares(figure.subplots(), "dataset", reports, next(iter(reports.values()))["num_negatives"])
    figure.savefig(path, dpi=120)


def plot_shares(axes: Any, title: str, groups: dict[str, dict[str, Any]], k: int) -> None:
    """Stacked bars: % of the queries with no, few and k negatives, a bar for each group."""
    bottom = np.zeros(len(groups))
    labels, colors = ("none", "fewer", f"{k}"), ("tab:red", "tab:orange", "tab:green")
    for key, label, color in zip(SHARES, labels, colors, strict=True):
        share = np.array([100 * g[key] / g["queries"] for g in groups.values()])
        axes.bar(list(groups), share, bottom=bottom, label=label, color=color, alpha=0.7)
        bottom += share
    axes.set(ylabel="% of queries", ylim=(0, 100))
    axes.set_title(f"negatives per query, by {title}", fontsize=10)
    axes.tick_params(axis="x", labelrotation=30 if max(map(len, groups)) > 6 else 0)
    axes.legend(fontsize=8, loc="upper right")
