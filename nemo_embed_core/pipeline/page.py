"""A pipeline's report to read: lines in a terminal, report.json, and one page that needs nothing else.

write(config, setting, stages, output)         # output/report.json, output/report.html
page(found)                                    # the page of what report.json has
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_embed_core.config import PipelineConfig
from nemo_embed_core.evaluation.compare_page import bounded, p_of
from nemo_embed_core.files.durable import write_atomically
from nemo_embed_core.files.html import document, escaped, folded, histogram, table
from nemo_embed_core.pipeline.plots import curve, intervals
from nemo_embed_core.pipeline.report import report
from nemo_embed_core.pipeline.stages import Setting, Stages


def write(
    config: PipelineConfig, setting: Setting, stages: Stages, output: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    found = report(config, setting, stages, output)
    write_atomically(output / "report.json", f"{json.dumps(found, indent=1, ensure_ascii=False)}\n".encode())
    write_atomically(output / "report.html", page(found).encode())
    for line in lines(found):
        say(line)
    say(f"{output}: report.html, report.json, model/")
    return found


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    name, chunks = found["metric"].replace("_at_", "@"), found["splits"]["test"]["documents"]
    yield f"{found['queries']:,} held-out queries over {chunks:,} chunks, {name}:"
    for model, score in found["scores"].items():
        yield f"  {model:6} {bounded(score)}"
    for entry in found["differences"]:
        yield f"  {difference(entry)}"
    for alarm in found["alarms"]:
        yield f"alarm: {alarm['of']}: {alarm['says']}"


def difference(entry: Mapping[str, Any]) -> str:
    return f"{entry['of']} minus {entry['minus']}: {bounded(entry, '+')}, p {p_of(entry['p_holm'])}"


# ------------------------------------------------------------------------------------------ HTML


def page(found: Mapping[str, Any]) -> str:
    """HTML that is XML too; all texts escaped, no script, nothing from elsewhere."""
    title = f"{Path(found['base']).name} tuned on {Path(found['documents']).name}"
    parts = (_verdict, _scores, _data, _training, _examples, _serving, _stages)
    return document(title, [f"<h1>{escaped(title)}</h1>", *(line for part in parts for line in part(found))])


def _h2(title: str) -> str:
    return f"<h2>{escaped(title)}</h2>"


def _p(text: str, kind: str = "") -> str:
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escaped(text)}</p>"


def _verdict(found: Mapping[str, Any]) -> Iterator[str]:
    name, scores = found["metric"].replace("_at_", "@"), found["scores"]
    against = next(e for e in found["differences"] if (e["of"], e["minus"]) == ("tuned", "base"))
    better = "is better than" if found["is_better"] else "is not shown to be better than"
    yield _p(f"On documents that training has not seen the tuned model {better} its base.", "strong")
    yield _p(
        f"On {found['queries']:,} queries of them {name} is {bounded(scores['tuned'])} against "
        f"{bounded(scores['base'])}, a difference of {bounded(against, '+')}, p {p_of(against['p_holm'])}. "
        f"BM25 has {bounded(scores['BM25'])}. In brackets: 95 % intervals over queries."
    )
    if found["alarms"]:
        yield _h2("Alarms")
        yield table(["of", "says"], [(alarm["of"], alarm["says"]) for alarm in found["alarms"]])
    else:
        yield _p("No alarm sounded.", "note")


def _scores(found: Mapping[str, Any]) -> Iterator[str]:
    name = found["metric"].replace("_at_", "@")
    yield _h2(f"Scores on held-out documents: {name}")
    yield intervals(found["scores"])
    names = sorted({name for metrics in found["metrics"].values() for name in metrics}, key=_order)
    rows = [
        (model, *(f"{metrics[name]:.4f}" if name in metrics else "-" for name in names))
        for model, metrics in found["metrics"].items()
    ]
    yield table(["", *(name.replace("_at_", "@") for name in names)], rows)
    yield _h2("Differences, with 95 % intervals over queries")
    rows = [(f"{e['of']} minus {e['minus']}", bounded(e, "+"), p_of(e["p"]), p_of(e["p_holm"]))
            for e in found["differences"]]  # fmt: skip
    yield table(["", name, "p", "p (Holm)"], rows)
    for note in found["notes"]:
        yield _p(note, "note")
    if found["overlap"]:
        yield _p(f"Held-out texts that stand in the training data too: {found['overlap']}.", "note")


def _order(name: str) -> tuple[str, int]:
    kind, _, number = name.partition("_at_")
    return kind, int(number)


def _data(found: Mapping[str, Any]) -> Iterator[str]:
    yield _h2("What went in")
    rows = [(name, f"{c['files']:,}", f"{c['documents']:,}", f"{c['queries']:,}")
            for name, c in found["splits"].items()]  # fmt: skip
    yield table(["", "documents", "chunks", "queries"], rows)
    yield _p(f"Held out: {found['held_out']:.0%} of the documents, by their paths; none is in both.", "note")
    if found["written"]:
        written = found["written"]
        yield _p(
            f"Written by models: {written['replies']:,} replies, {written['spent']:.4f} spent at most; "
            + ", ".join(f"{what} {count:,}" for what, count in written["requests"].items())
        )
    for name, mined in found["mining"].items():
        yield _h2(f"Mined negatives of {name}")
        yield _p(
            f"{mined['negatives']:,} negatives of {mined['queries']:,} queries out of {mined['documents']:,} "
            f"documents, below {mined['threshold']} x the positive's score; {mined['with_no_negatives']:,} "
            "queries have none."
        )
        edges = mined["histogram"]["edges"]
        series = {kind: {"edges": edges, "counts": mined["histogram"][kind]}
                  for kind in ("positives", "negatives") if sum(mined["histogram"][kind])}  # fmt: skip
        if series:
            yield histogram("cosines with the query", series)
    yield _h2("Rows that were trained on")
    yield _p(f"Instruction of the queries: {found['task']}", "note")
    for row in found["samples"]:
        yield _p(row["query"], "strong")
        yield _p(row["of"], "note")
        texts = {"document": row["documents"][:1], "mined negative": row["negatives"][:1]}
        yield table(["", ""], [(kind, _short(text)) for kind, first in texts.items() for text in first])


def _training(found: Mapping[str, Any]) -> Iterator[str]:
    yield _h2("Training")
    how = {"full": "all weights", "lora": "adapters", "layers": f"the first {found['layers']} layers"}
    yield _p(f"Trained: {how[found['method']]}.")
    steps = found["curve"]["step"]
    plots = (curve(name.replace("_", " "), steps, y) for name, y in found["curve"].items() if name != "step")
    yield f'<div class="plots">{"".join(plots)}</div>'


def _examples(found: Mapping[str, Any]) -> Iterator[str]:
    for what, did in (("gains", "gained"), ("losses", "lost")):
        if not found["examples"][what]:
            continue
        yield _h2(f"Held-out queries that {did} most")
        for one in found["examples"][what]:
            yield _p(one["query"], "strong")
            yield table(
                ["", found["metric"].replace("_at_", "@"), "found first"],
                [(who, f"{score:.4f}", _short(one["first"][who])) for who, score in one["scores"].items()],
            )


def _serving(found: Mapping[str, Any]) -> Iterator[str]:
    yield _h2("How to serve it")
    code = (
        "from sentence_transformers import SentenceTransformer\n\n"
        f"model = SentenceTransformer({found['model']!r})\n"
        'queries = model.encode(["..."], prompt_name="query")\n'
        'documents = model.encode(["..."], prompt_name="document")'
    )
    yield f"<pre>{escaped(code)}</pre>"
    yield f"<pre>{escaped(found['serving'])}</pre>"
    for name, said in found["checks"].items():
        yield folded(f"What {name} said", [f"<pre>{escaped(chr(10).join(said))}</pre>"])


def _stages(found: Mapping[str, Any]) -> Iterator[str]:
    yield _h2("Stages")
    rows = [(s["name"], f"{s['seconds']:,.0f}", s["folder"], s["code"]) for s in found["stages"]]
    yield table(["", "seconds", "folder", "code"], rows)
    yield folded("Their commands", (f"<pre>{escaped(stage['command'])}</pre>" for stage in found["stages"]))


def _short(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
