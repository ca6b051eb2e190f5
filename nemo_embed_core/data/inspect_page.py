"""The report of data/inspect.py to read: a table in a terminal, and one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_embed_core.data.building import Log
from nemo_embed_core.data.store import limits
from nemo_embed_core.files.durable import write_atomically
from nemo_embed_core.files.html import Cells, document, escaped, histogram, svg
from nemo_embed_core.files.html import table as html_table

FEW = 12  # languages, scripts and counts that are named; the others are added up


def figures(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of every table: what is printed, and what the page has."""
    counts, settings = report["counts"], report["settings"]
    sides = ("queries", "documents")
    tables: list[tuple[str, list[str], list[list[str]]]] = []

    def table(title: str, head: Sequence[str], rows: Cells) -> None:
        if cells := [[_said(cell) for cell in row] for row in rows]:
            tables.append((title, list(head), cells))

    table(
        "sources",
        ["", "rows", "queries truncated", "at", "documents", "truncated", "at"],
        [
            (s["path"], s["rows"], s.get("truncated_queries", "-"), s["query_max_length"],
             *(s.get(name, "-") for name in ("documents", "truncated_documents")), s["document_max_length"])
            for s in report["sources"]
        ],
    )  # fmt: skip
    table("counts", ["", ""], [(name.replace("_", " "), count) for name, count in counts.items()])
    tokens, uncut = report["tokens"], report["tokens_uncut"]
    at = list(tokens["queries"]["quantiles"])
    table(
        "tokens of a text",
        ["", "mean", *(_at(q) for q in at)],
        [(side, tokens[side]["mean"], *tokens[side]["quantiles"].values()) for side in sides],
    )
    table(
        "tokens before it is cut, without instruction",
        ["", "texts", *(_at(q) for q in at)],
        [(side, uncut[side]["texts"], *uncut[side]["quantiles"].values()) for side in sides],
    )
    table(
        "truncated",
        ["", "at", "texts", "of them"],
        [
            (side, limits(settings[f"{name}_max_length"]), cut["count"], _share(cut["count"], cut["of"]))
            for side, name in zip(sides, ("query", "document"), strict=True)
            for cut in [report["truncated"][side]]
        ],
    )
    for key in ("positives_per_row", "negatives_per_row", "languages", "query_scripts", "document_scripts"):
        total = sum(report[key].values())
        named = {name or "not said": count for name, count in report[key].items()}
        if key != "languages" or list(named) != ["not said"]:
            rows = [(name, count, _share(count, total)) for name, count in _few(named).items()]
            table(
                key.replace("_", " "), ["", "texts" if key.endswith("scripts") else "rows", "of them"], rows
            )
    table(
        f"copies: exact but for case, spaces and marks; near with {report['near']:.0%} of their word pairs",
        ["", "texts", "exact", "near", "of"],
        [
            (side, d["of"], d["exact"], d["near"], d["near_of"])
            for side in sides
            for d in [report["duplicates"][side]]
        ],
    )
    table(
        "evaluation sets: their texts that the data has",
        ["", "", "texts", "exact", "near", "of"],
        [
            (name, side, o["of"], o["exact"], o["near"], o["near_of"])
            for name, found in report["against"].items()
            for side, o in found.items()
        ],
    )
    table(
        "evaluation sets: the first that the data has",
        ["id", "text", "where", "text there", "in common"],
        [
            (f"{name} {o['id']}", o["text"], o["where"], o["data"], o["similarity"])
            for name, found in report["against"].items()
            for side in sides
            for o in found[side]["first"]
        ],
    )
    table(
        "noise",
        ["", "", "of", "first"],
        [(kind, n["count"], n["of"], ", ".join(n["first"])) for kind, n in report["noise"].items()],
    )
    scores = report["scores"] or {}
    table(
        "scores",
        ["", "texts", *(_at(q) for found in list(scores.values())[:1] for q in found["quantiles"])],
        [(name, found["count"], *found["quantiles"].values()) for name, found in scores.items()],
    )
    table(
        f"packed into max_tokens={settings['max_tokens']:,}, a row's texts together",
        ["rows of a rank and step", "steps", "micro-batches", "tokens", "density"],
        [
            (p["rows_a_step"], p["steps"], p["micro_batches"], p["tokens"], p["density"])
            for p in report["packing"]
        ],
    )
    # Steps of one micro-batch each are not full for lack of rows, which says nothing about packing.
    last = report["packing"][-1] if report["packing"] else {"micro_batches": 0, "steps": 0}
    packed = last["density"] if last["micro_batches"] > last["steps"] else 0.0

    def saved(useful: float) -> str:
        return f"{1 - useful / packed:.1%}" if packed else "too few rows"

    table(
        "padded to the longest query and the longest document of a batch",
        ["rows of a batch", "tokens", "with padding", "useful", "saved by packing"],
        [
            (p["rows_a_batch"], p["tokens"], p["slots"], p["useful"], saved(p["useful"]))
            for p in report["padded"]
        ],
    )
    if report["rows_that_do_not_fit"]:
        table("rows that can be longer than max_tokens", ["rows"], [[report["rows_that_do_not_fit"]]])
    return tables


def _said(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:,.4f}".rstrip("0").rstrip(".")
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def _at(quantile: str) -> str:
    return {"0": "least", "1": "most", "0.5": "median"}.get(quantile, f"{float(quantile):.0%}")


def _share(count: int, of: int) -> str:
    return f"{count / of:.2%}" if of else "-"


def _few(counts: Mapping[str, int]) -> dict[str, int]:
    items = list(counts.items())
    if len(items) <= FEW:
        return dict(items)
    rest = sum(count for _, count in items[FEW - 1 :])
    return {**dict(items[: FEW - 1]), f"{len(items) - FEW + 1} others": rest}


def print_report(report: dict[str, Any], log: Log = print) -> None:
    for title, head, rows in figures(report):
        log(f"{title}:")
        cells = [[_one_line(cell) for cell in row] for row in ([head] if any(head) else []) + rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            first, *others = zip(row, widths, strict=True)
            log("  " + "  ".join([f"{first[0]:<{first[1]}}", *(f"{c:>{w}}" for c, w in others)]).rstrip())
    for sample in report["samples"]:
        log(f"as the model sees {sample['where']}:")
        for text in sample["texts"]:
            log(f"  {text['is']:<8} {text['tokens']:>5} tokens  {_one_line(text['text'], 160)}")


def _one_line(text: str, most: int = 48) -> str:
    """Nothing that a terminal would obey; the end stays, as it has the line of a path."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else f"{text[: most - 23]}...{text[-20:]}"


def present(report: dict[str, Any], output: str = "") -> None:
    """Printed; output: also as a JSON file, with the page beside it."""
    print_report(report)
    if not output:
        return
    file = Path(output)
    write_atomically(file, f"{json.dumps(report, indent=1, ensure_ascii=False)}\n".encode())
    write_atomically(file.with_suffix(".html"), page(report).encode())


# ------------------------------------------------------------------------------------------ HTML


def page(report: dict[str, Any]) -> str:
    """HTML that is XML too; all texts escaped, no script, nothing from elsewhere."""
    tokens, scores = report["tokens"], report["scores"] or {}
    plots = {
        "tokens of a text": [
            histogram(f"{side}, tokens", {side: found["histogram"]}) for side, found in tokens.items()
        ]
    }
    if scores:
        both = {name: found["histogram"] for name, found in scores.items()}
        plots["scores"] = [histogram("scores", both)]
    body = [f"<h1>{report['counts']['rows']:,} rows, {report['counts']['documents']:,} documents</h1>"]
    body.append(f'<p class="note">Token store {escaped(report["store"])}.</p>')
    for title, head, rows in figures(report):
        body += [f"<h2>{escaped(title)}</h2>", *plots.get(title, ())]
        if len(head) == 3 and head[-1] == "of them":
            body.append(_bars(rows))
        body.append(html_table(head, rows))
    body.append("<h2>as the model sees them</h2>")
    for sample in report["samples"]:
        body.append(f'<p class="note">{escaped(sample["where"])}</p>')
        for text in sample["texts"]:
            said = f"{text['is']}, {text['tokens']:,} tokens"
            body.append(f"<div>{escaped(said)}</div><pre>{escaped(text['text'])}</pre>")
    return document("Data", body)


def _bars(rows: Sequence[Sequence[str]]) -> str:
    """A bar for each row of (name, count, share)."""
    counts = [int(row[1].replace(",", "")) for row in rows]
    parts = []
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        width, y = 440 * count / max(1, *counts), 18 * i
        parts.append(f'<text x="148" y="{y + 13}" text-anchor="end">{escaped(row[0][:24])}</text>')
        parts.append(f'<rect x="156" y="{y + 3}" width="{width:.1f}" height="12"/>')
    return svg(18 * len(rows), parts, "bars")
