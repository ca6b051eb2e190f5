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
from nemo_embed_core.files.html import document, escaped, histogram, table
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
    title = f"{Path(found['documents']).name}: {found['base']} tuned"
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
    yield _p(
        f"On {found['queries']:,} queries of documents that training has not seen, the tuned model {better} "
        f"its base: {name} {bounded(scores['tuned'])} against {bounded(scores['base'])}, a difference of "
        f"{bounded(against, '+')}, p {p_of(against['p_holm'])}. BM25 has {bounded(scores['BM25'])}."
    )
    if found["alarms"]:
        yield _h2("alarms")
        yield table(["of", "says"], [(alarm["of"], alarm["says"]) for alarm in found["alarms"]])
    else:
        yield _p("No alarm sounded.", "note")


def _scores(found: Mapping[str, Any]) -> Iterator[str]:
    yield _h2("scores on held-out documents")
    yield intervals(found["scores"])
    names = sorted({name for metrics in found["metrics"].values() for name in metrics}, key=_order)
    rows = [
        (model, *(f"{metrics[name]:.4f}" if name in metrics else "-" for name in names))
        for model, metrics in found["metrics"].items()
    ]
    yield table(["", *(name.replace("_at_", "@") for name in names)], rows)
    yield _h2("differences, with 95 % intervals over queries")
    rows = [(f"{e['of']} minus {e['minus']}", bounded(e, "+"), p_of(e["p"]), p_of(e["p_holm"]))
            for e in found["differences"]]  # fmt: skip
    yield table(["", found["metric"].replace("_at_", "@"), "p", "p (Holm)"], rows)
    for note in found["notes"]:
        yield _p(note, "note")
    if found["overlap"]:
        yield _p(f"Of the held-out texts in the training data: {found['overlap']}.", "note")


def _order(name: str) -> tuple[str, int]:
    kind, _, number = name.partition("_at_")
    return kind, int(number)


def _data(found: Mapping[str, Any]) -> Iterator[str]:
    yield _h2("what went in")
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
        yield _h2(f"mined negatives of {name}")
        yield _p(
            f"{mined['negatives']:,} negatives of {mined['queries']:,} queries out of {mined['documents']:,} "
            f"documents, below {mined['threshold']} x the positive's score; {mined['with_no_negatives']:,} "
            "queries have none."
        )
        edges = mined["histogram"]["edges"]
        series = {kind: {"edges": edges, "counts": mined["histogram"][kind]}
                  for kind in ("positives", "negatives") if sum(mined["histogram"][kind])}  # fmt: skip
        if series:
            yield histogram(f"cosines of {' and '.join(series)}", series)
    yield _h2("rows that were trained on")
    yield _p(f"Instruction of the queries: {found['task']}", "note")
    for row in found["samples"]:
        yield _p(f"{row['of']}: {row['query']}")
        for kind, texts in (("document", row["documents"][:1]), ("mined negative", row["negatives"][:1])):
            yield from (f"<pre>{escaped(f'{kind}: {_short(text)}')}</pre>" for text in texts)


def _training(found: Mapping[str, Any]) -> Iterator[str]:
    yield _h2("training")
    how = {"full": "all weights", "lora": "adapters", "layers": f"the first {found['layers']} layers"}
    yield _p(f"Trained: {how[found['method']]}.")
    for name, values in found["curve"].items():
        if name != "step":
            yield curve(name.replace("_", " "), found["curve"]["step"], values)


def _examples(found: Mapping[str, Any]) -> Iterator[str]:
    for what, title in (("gains", "held-out queries that gained most"), ("losses", "that lost most")):
        if not found["examples"][what]:
            continue
        yield _h2(title)
        for one in found["examples"][what]:
            yield _p(one["query"])
            yield table(
                ["", "score", "first"],
                [(who, f"{score:.4f}", _short(one["first"][who])) for who, score in one["scores"].items()],
            )


def _serving(found: Mapping[str, Any]) -> Iterator[str]:
    yield _h2("how to serve it")
    code = (
        "from sentence_transformers import SentenceTransformer\n\n"
        f"model = SentenceTransformer({found['model']!r})\n"
        'queries = model.encode(["..."], prompt_name="query")\n'
        'documents = model.encode(["..."], prompt_name="document")'
    )
    yield f"<pre>{escaped(code)}</pre>"
    yield f"<pre>{escaped(found['serving'])}</pre>"
    for name, said in found["checks"].items():
        yield _h2(name)
        yield f"<pre>{escaped(chr(10).join(said))}</pre>"


def _stages(found: Mapping[str, Any]) -> Iterator[str]:
    yield _h2("stages")
    for stage in found["stages"]:
        yield _p(f"{stage['name']}: {stage['seconds']:,.0f} s, {stage['folder']}, {stage['code']}", "note")
        yield f"<pre>{escaped(stage['command'])}</pre>"


def _short(text: str, most: int = 600) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
