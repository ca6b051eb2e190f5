"""Plots of a pipeline's page, as SVG in it: scores with their intervals, a figure over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_embed_core.files.html import WIDTH, escaped, svg

HEIGHT = 150  # of a curve


def intervals(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A bar for each model, with its interval."""
    most = max(score["high"] or score["score"] for score in scores.values()) or 1.0
    width, parts = WIDTH - 200, list[str]()
    for i, (name, score) in enumerate(scores.items()):
        y, x = 26 * i, 110 + width * score["score"] / most
        parts.append(f'<text x="100" y="{y + 16}" text-anchor="end">{escaped(name)}</text>')
        parts.append(f'<rect x="110" y="{y + 5}" width="{x - 110:.1f}" height="14"/>')
        if score["low"] is not None:
            ends = [110 + width * score[end] / most for end in ("low", "high")]
            line = f'x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y + 12}" y2="{y + 12}"'
            parts.append(f'<line {line} stroke="#1f2328" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH}" y="{y + 16}" text-anchor="end">{score["score"]:.4f}</text>')
    return svg(26 * len(scores) + 4, parts, "scores with their intervals")


def curve(label: str, x: Sequence[float], y: Sequence[float | None]) -> str:
    known = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    if not known:
        return ""
    low, high = min(b for _, b in known), max(b for _, b in known)
    first, last = known[0][0], known[-1][0]

    def place(a: float, b: float) -> str:
        across = (a - first) / ((last - first) or 1)
        return f"{WIDTH * across:.1f},{HEIGHT - HEIGHT * (b - low) / ((high - low) or 1):.1f}"

    points = " ".join(place(a, b) for a, b in known)
    parts = [f'<path d="M0,0V{HEIGHT}H{WIDTH}" fill="none" stroke="#d1d9e0"/>']
    parts.append(f'<polyline points="{points}" fill="none" stroke="#0969da" stroke-width="1.5"/>')
    said = f"{label}: {known[0][1]:.4g} to {known[-1][1]:.4g}, least {low:.4g}, most {high:.4g}"
    parts.append(f'<text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end">{escaped(said)}</text>')
    parts.append(f'<text x="0" y="{HEIGHT + 14}">steps {first:,} to {last:,}</text>')
    return svg(HEIGHT + 18, parts, label)
