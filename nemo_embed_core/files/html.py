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
h1 { font-size: 1.5rem } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem } summary { cursor: pointer }
table { border-collapse: collapse }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; vertical-align: top }
td:first-child, th:first-child { text-align: left } th { color: #59636e; font-weight: 500 }
tr + tr td { border-top: 1px solid #e4e8ec }
td.wide, th.wide { text-align: left; max-width: 36rem; overflow-wrap: anywhere }
pre { background: #f6f8fa; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .8rem }
svg { display: block; margin: .4rem 0; max-width: 100%; height: auto }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 0 2rem }
rect, tspan.first { fill: #0969da } .second { fill: #bc4c00 } rect.second { opacity: .6 }
text { font-size: 11px; fill: #59636e } .plots text { font-size: 14px }
.note { color: #59636e } .strong { font-weight: 600 }
"""
WIDTH, HEIGHT, TOP = 640, 140, 18  # of a plot; of the line above it


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
    """Columns of figures to the right, all others to the left."""
    cells = [[str(cell) for cell in row] for row in rows]
    columns = zip(*cells, strict=True) if cells else ((name,) for name in head)
    are_figures = (all(re.fullmatch(r"[\d.,%<+-]+", cell) for cell in column) for column in columns)
    kinds = ["" if figures else ' class="wide"' for figures in are_figures]

    def line(tag: str, row: Sequence[str]) -> str:
        own = (f"<{tag}{kind}>{escaped(c)}</{tag}>" for c, kind in zip(row, kinds, strict=True))
        return f"<tr>{''.join(own)}</tr>"

    top = line("th", head) if any(head) else ""
    return f"<table>{top}{''.join(line('td', row) for row in cells)}</table>"


def folded(summary: str, lines: Iterable[str]) -> str:
    """What a reader opens who wants it."""
    return f"<details><summary>{escaped(summary)}</summary>{''.join(lines)}</details>"


def svg(height: float, parts: Iterable[str], label: str) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    says = f'xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escaped(label)}"'
    return f"<svg {says} {size}>{''.join(parts)}</svg>"


def histogram(label: str, series: Mapping[str, dict[str, list[float]]]) -> str:
    """Shares of each series over the same edges, the second one before the first; their names above."""
    edges = next(iter(series.values()))["edges"]
    shares = {name: [c / sum(one["counts"]) for c in one["counts"]] for name, one in series.items()}
    most = max(max(values) for values in shares.values())
    step = WIDTH / (len(edges) - 1)
    colours = zip(("first", "second"), series, strict=False)
    names = ", ".join(f'<tspan class="{kind}">{escaped(name)}</tspan>' for kind, name in colours)
    above = f"{escaped(label)}{f': {names}' if len(series) > 1 else ''}; highest bar {most:.1%}"
    parts = [f'<text x="{WIDTH}" y="11" text-anchor="end">{above}</text>']
    for kind, values in zip(("first", "second"), shares.values(), strict=False):
        for i, share in enumerate(values):
            height = HEIGHT * share / most
            place = f'x="{i * step:.1f}" y="{TOP + HEIGHT - height:.1f}"'
            place += f' width="{step - 1:.1f}" height="{height:.1f}"'
            said = f"{edges[i]:.4g} to {edges[i + 1]:.4g}: {share:.2%}"
            parts.append(f'<rect class="{kind}" {place}><title>{said}</title></rect>' if share else "")
    for i in range(0, len(edges), (len(edges) - 1) // 4):
        anchor = {0: "start", len(edges) - 1: "end"}.get(i, "middle")
        where = f'x="{i * step:.0f}" y="{TOP + HEIGHT + 14}" text-anchor="{anchor}"'
        parts.append(f"<text {where}>{edges[i]:.4g}</text>")
    return svg(TOP + HEIGHT + 18, parts, label)
