"""HTML that is XML too and needs nothing else: no script, nothing from elsewhere, all texts escaped.

file.write_text(document("Data", [f"<h2>{escaped(title)}</h2>", table(head, rows), plot(...)]))
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

Cells = Iterable[Sequence[object]]
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem }
table { border-collapse: collapse }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; vertical-align: top }
td:first-child, th:first-child { text-align: left } th { color: #59636e; font-weight: 500 }
tr + tr td { border-top: 1px solid #e4e8ec }
td.wide { text-align: left; max-width: 26rem; overflow-wrap: anywhere }
pre { background: #f6f8fa; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .8rem }
svg { display: block; margin: .4rem 0 } rect { fill: #0969da } rect.second { fill: #bc4c00; opacity: .6 }
text { font-size: 11px; fill: #59636e } .note { color: #59636e }
"""
WIDTH, HEIGHT = 640, 140  # of a plot


def document(title: str, body: Iterable[str]) -> str:
    meta = '<meta charset="utf-8"/><meta name="viewport" content="width=device-width"/>'
    meta += f"<title>{escaped(title)}</title>"
    top, content = f"<head>{meta}<style>{STYLE}</style></head>", "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en">{top}\n<body>\n{content}\n</body></html>\n'


def escaped(text: str) -> str:
    """Also what XML has no place for: control characters as their pictures (U+2400 and on)."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
    return html.escape(re.sub(r"[\x7f-\x9f\ufffe\uffff]", "\ufffd", text))


def table(head: Sequence[str], rows: Cells) -> str:
    lines = ["<tr>" + "".join(f"<th>{escaped(name)}</th>" for name in head) + "</tr>"] if any(head) else []
    for row in rows:
        wide = ("" if re.fullmatch(r"[\d.,%-]+", str(cell)) else ' class="wide"' for cell in row)
        lines.append(
            "<tr>"
            + "".join(f"<td{w}>{escaped(str(c))}</td>" for c, w in zip(row, wide, strict=True))
            + "</tr>"
        )
    return f"<table>{''.join(lines)}</table>"


def svg(height: float, parts: Iterable[str], label: str) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    says = f'xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escaped(label)}"'
    return f"<svg {says} {size}>{''.join(parts)}</svg>"


def histogram(label: str, series: Mapping[str, dict[str, list[float]]]) -> str:
    """Shares of each series over the same edges, the second one before the first."""
    parts: list[str] = []
    edges = next(iter(series.values()))["edges"]
    shares = {name: [c / sum(one["counts"]) for c in one["counts"]] for name, one in series.items()}
    most = max(max(values) for values in shares.values())
    step = WIDTH / (len(edges) - 1)
    for kind, values in zip(("first", "second"), shares.values(), strict=False):
        for i, share in enumerate(values):
            height = HEIGHT * share / most
            place = (
                f'x="{i * step:.1f}" y="{HEIGHT - height:.1f}" width="{step - 1:.1f}" height="{height:.1f}"'
            )
            said = f"{edges[i]:.4g} to {edges[i + 1]:.4g}: {share:.2%}"
            parts.append(f'<rect class="{kind}" {place}><title>{said}</title></rect>' if share else "")
    for i in range(0, len(edges), (len(edges) - 1) // 4):
        anchor = {0: "start", len(edges) - 1: "end"}.get(i, "middle")
        where = f'x="{i * step:.0f}" y="{HEIGHT + 14}" text-anchor="{anchor}"'
        parts.append(f"<text {where}>{edges[i]:.4g}</text>")
    parts.append(
        f'<text x="{WIDTH}" y="10" text-anchor="end">{escaped(label)}; highest bar {most:.1%}</text>'
    )
    return svg(HEIGHT + 18, parts, label)
