"""A comparison to read: tables in a terminal, in Markdown with the queries that differ most, and a PNG."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.compare import Log, compared
from nemo_embed_core.evaluation.compare_plot import plot, pyplot_or_refuse
from nemo_embed_core.files.durable import probe_file, write_atomically

Table = tuple[str, list[str], list[list[str]]]  # title, head, rows
LABEL = 32  # characters of a model's name in a table


def present(config: EvaluateConfig, say: Log = print) -> dict[str, Any]:
    """The comparison: printed, and written where output (JSON, and .md beside it) and plot say."""
    for file in filter(None, (config.output, config.plot)):
        probe_file(Path(file))
    if config.output.endswith(".md"):
        raise UserError(
            f"output {config.output}: give the name of a JSON file; the tables stand in .md beside it"
        )
    if config.plot:
        pyplot_or_refuse()
    report = compared(config, say)
    for line in report["settings"]["notes"]:
        say(f"note: {line}")
    for title, head, rows in tables(report):
        say(f"{title}:")
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in (head, *rows):
            first, *others = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
            say("  " + "  ".join([first, *others]).rstrip())
    if config.output:
        output = Path(config.output)
        write_atomically(output, f"{json.dumps(report, indent=1, ensure_ascii=False)}\n".encode())
        write_atomically(output.with_suffix(".md"), markdown(report).encode())
        say(
            f"{output} has all of it, {output.with_suffix('.md')} the tables and the queries that differ most"
        )
    if config.plot:
        plot(report, Path(config.plot), labels(report["models"]))
        say(f"{config.plot} has the intervals")
    return report


# ------------------------------------------------------------------------------------------ tables


def tables(report: Mapping[str, Any]) -> list[Table]:
    label = labels(report["models"])
    head = list(label.values())
    first, *others = report["models"]
    found: list[Table] = []
    if any(label[model] != model for model in label):
        found.append(("models", ["", ""], [[short, model] for model, short in label.items()]))
    rows = [
        [name, task["type"], task["main_score"], str(task["queries"])]
        + [bounded(task["scores"].get(model)) for model in label]
        for name, task in report["tasks"].items()
    ]
    own = report["overall"]
    for title, key in (("mean over tasks", "mean"), ("mean over task types", "mean_of_types")):
        rows.append([title, "", "", "", *(bounded(own[model][key]) for model in label)])
    for kind in own[first]["types"] if len(own[first]["types"]) > 1 else ():
        rows.append(
            [f"mean of {kind}", kind, "", "", *(figure(own[model]["types"][kind]) for model in label)]
        )
    borda = [own[model]["borda"] for model in label]
    rows.append(["Borda points", "", "", "", *(f"{entry['points']:g}" for entry in borda)])
    ranked = (f"{entry['rank']} [{entry['low']}, {entry['high']}]" for entry in borda)
    rows.append(["Borda rank", "", "", "", *ranked])
    found.append(("scores", ["task", "type", "score", "queries", *head], rows))
    for entry in report["pairs"]:
        title = f"{label[entry['b']]} minus {label[entry['a']]}"
        found.append((title, ["task", "difference", "p", "p (Holm)"], list(_differences(entry))))
    left = report["leave_one_task_out"]
    rows = [
        [
            *(name, *(f"{out['ranks'][model]} ({figure(out['means'][model])})" for model in label)),
            ", ".join(label[model] for model in out["changed"]) or "none",
        ]
        for name, out in left.items()
    ]
    if rows:
        found.append(("Borda rank (mean) without a task", ["without", *head, "changed"], rows))
    rows = [
        [name, language, str(spoken["queries"]), *(bounded(spoken["scores"].get(model)) for model in label)]
        + [bounded(spoken["differences"].get(model), "+") for model in others]
        for name, task in report["tasks"].items()
        for language, spoken in task["languages"].items()
    ]
    if rows:
        minus = [f"{label[model]} minus {label[first]}" for model in others]
        found.append(("languages", ["task", "language", "queries", *head, *minus], rows))
    rows = [
        [d["task"], f"{label[d['b']]} against {label[d['a']]}", str(d["better"]), str(d["worse"])]
        for d in report["differ_most"]
    ]
    found.append(("queries that are better or worse", ["task", "", "better", "worse"], rows))
    return found


def _differences(entry: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, found in entry["tasks"].items():
        yield [name, bounded(found, "+"), p_of(found["p"]), p_of(found["p_holm"])]
    for title, key in (("over queries", "over_queries"), ("over tasks", "over_tasks")):
        if found := entry[key]:
            shown = bounded({"score": entry["difference"], **found}, "+")
            yield [f"mean, {title}", shown, p_of(found["p"]), p_of(found["p_holm"])]


def labels(models: Sequence[str]) -> dict[str, str]:
    """{model: what it is called in tables}: the end of a long name, a number where two ends are the same."""
    short = {m: m if len(m) <= LABEL else f"...{m[3 - LABEL :]}" for m in models}
    if len(set(short.values())) < len(models):
        return {model: f"model {number}" for number, model in enumerate(models, 1)}
    return short


def figure(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def bounded(found: Mapping[str, Any] | None, sign: str = "") -> str:
    """0.4312 [0.4201, 0.4420]; - where nothing was measured."""
    if found is None or found["score"] is None:
        return "-"
    has_ends = found.get("low") is not None
    ends = f" [{found['low']:{sign}.4f}, {found['high']:{sign}.4f}]" if has_ends else ""
    return figure(found["score"], sign) + ends


def p_of(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.0002" if value < 2e-4 else f"{value:.4f}"


# ------------------------------------------------------------------------------------------ Markdown


def markdown(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    lines = [
        f"# {', '.join(map(_cell, report['models']))}",
        "",
        f"Brackets: {settings['level']:.0%} intervals of a paired bootstrap over queries, of the Borda rank "
        f"over tasks and their queries ({settings['draws']:,} draws, seed {settings['seed']}). p: two-sided, "
        "of paired sign flips; Holm's correction over its family (docs/evaluation.md).",
        "",
        *(f"- {_cell(line)}" for line in settings["notes"]),
    ]
    for title, head, rows in tables(report):
        lines += ["", f"## {_cell(title)}", ""]
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in (head, ["---"] * len(head), *rows)]
    label = labels(report["models"])
    for found in report["differ_most"]:
        for what in ("losses", "gains"):
            if found[what]:
                title = f"{found['task']}: largest {what} of {label[found['b']]} against {label[found['a']]}"
                lines += ["", f"## {_cell(title)}", ""]
                lines += [line for query in found[what] for line in _query(query, found, label)]
    return "\n".join(lines) + "\n"


def _query(query: Mapping[str, Any], found: Mapping[str, Any], label: Mapping[str, str]) -> Iterator[str]:
    language = f" ({query['language']})" if query["language"] else ""
    yield f"- **{_cell(query['text'])}** {_cell(query['id'])}{language}"
    for model in (found["a"], found["b"]):
        side = query["models"][model]
        best = side["found"][0] if side["found"] else None
        text = f": {_cell(query['texts'][best])}" if best in query["texts"] else ""
        ids = f", found {', '.join(map(_cell, side['found'])) or 'nothing'}" if query["judged"] else ""
        yield f"  - {_cell(label[model])} {side['score']:.4f}{ids}{text}"
    if not query["judged"]:
        yield f"  - {_cell(query['other'] or '')} {_cell(query['gold'] or '')}"
        return
    judged = ", ".join(f"{_cell(i)} ({grade:g})" for i, grade in query["judged"].items())
    shown = sorted((i for i in query["judged"] if i in query["texts"]), key=lambda i: -query["judged"][i])[:1]
    texts = "".join(_cell(query["texts"][i]) for i in shown)
    yield f"  - relevant {judged}{': ' if texts else ''}{texts}"


def _cell(text: object) -> str:
    """On one line, with nothing that Markdown would obey."""
    text = " ".join(str(text).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
