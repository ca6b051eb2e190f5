"""A comparison as a PNG: differences with their intervals, and a heat map of languages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_embed_core.errors import UserError


def pyplot_or_refuse() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("plot needs matplotlib: pip install 'nemo_embed_core[demo]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(report: Mapping[str, Any], file: Path, label: Mapping[str, str]) -> None:
    """Differences from the first model with their intervals; scores by language as a heat map beside them."""
    pyplot = pyplot_or_refuse()
    pairs = [entry for entry in report["pairs"] if entry["a"] == report["models"][0] and entry["tasks"]]
    spoken = [(f"{n} {lang}", s) for n, t in report["tasks"].items() for lang, s in t["languages"].items()]
    bars = [(title, found, i) for i, entry in enumerate(pairs) for title, found in _bars(entry)]
    height = 1.5 + 0.3 * max(len(bars), len(spoken))
    figure, axes = pyplot.subplots(
        1, 2 if spoken else 1, figsize=(14 if spoken else 7, height), squeeze=False
    )
    axis = axes[0, 0]
    for place, (_, found, i) in enumerate(bars):
        axis.plot([found["low"], found["high"]], [place, place], color=f"C{i}", linewidth=2)
        name = label[pairs[i]["b"]] if place == next(p for p, bar in enumerate(bars) if bar[2] == i) else None
        axis.plot(found["score"], place, "o", color=f"C{i}", label=name)
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.set_yticks(range(len(bars)), [title for title, _, _ in bars])
    axis.invert_yaxis()
    axis.set_xlabel(f"minus {label[report['models'][0]]}, {report['settings']['level']:.0%} intervals")
    axis.legend(fontsize="small")
    if spoken:
        values = [[(s["scores"].get(m) or {}).get("score") for m in report["models"]] for _, s in spoken]
        heat = axes[0, 1]
        heat.imshow(
            [[float("nan") if v is None else v for v in row] for row in values], aspect="auto", vmin=0, vmax=1
        )
        heat.set_yticks(range(len(spoken)), [f"{title} ({s['queries']})" for title, s in spoken])
        heat.set_xticks(range(len(label)), label.values(), rotation=30, ha="right")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                heat.text(
                    x,
                    y,
                    "-" if value is None else f"{value:.4f}",
                    ha="center",
                    va="center",
                    color="white" if (value or 0) < 0.6 else "black",
                )
    figure.tight_layout()
    with file.open("wb") as out:
        figure.savefig(out, format="png", dpi=120)
    pyplot.close(figure)


def _bars(entry: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from ((name, found) for name, found in entry["tasks"].items() if found["low"] is not None)
    for title, key in (("mean, over queries", "over_queries"), ("mean, over tasks", "over_tasks")):
        if entry[key] and entry[key]["low"] is not None:
            yield title, {"score": entry["difference"], **entry[key]}
