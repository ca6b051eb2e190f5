"""Models side by side on one held-out BEIR folder, each with its own prompts, lengths and similarity.

report = evaluate(["runs/stage1", "exports/merged", "bm25"], "data/wiki", split="test")
report["bm25"]["ndcg_at_10"]
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_embed_core.checkpoint.source import Usage
from nemo_embed_core.config import DatasetConfig, EvaluateConfig
from nemo_embed_core.data.normal_form import normal_form
from nemo_embed_core.data.readers import Beir, Findings, read_beir, with_tasks
from nemo_embed_core.encoders.protocol import TextEncoder
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.labelled import Labelled
from nemo_embed_core.evaluation.models import Subject
from nemo_embed_core.evaluation.results import write_rows
from nemo_embed_core.evaluation.retrieval import METRICS, evaluate_bm25, evaluate_retrieval, mteb_imported
from nemo_embed_core.files.durable import probe_file, write_atomically
from nemo_embed_core.parallel.mesh import pick_device, pick_precision


def evaluate(models: Iterable[str | Path], data: str | Path, **options: Any) -> dict[str, dict[str, Any]]:
    """{model: figures and how its texts became vectors}; options: the further fields of EvaluateConfig."""
    return run(EvaluateConfig(models=[str(model) for model in models], data=str(data), **options))


def run(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Every model in turn; its line is printed, and the report written, as soon as it is done."""
    check_names(config)
    config = _with_tasks(config)
    subjects = {name: Subject.of(name, config) for name in config.models if name != "bm25"}
    encoder = None
    for subject in reversed(subjects.values()):  # so that what was loaded last is the first that is needed
        del encoder  # before the next one is loaded
        encoder = subject.check(config)
    task = Retrieval(config) if config.task_type == "retrieval" else Labelled(config)
    precision = pick_precision(config.precision, pick_device(config.device))
    width = max(len(model) for model in (*config.models, "model"))
    print(f"{'model':{width}}  {'  '.join(task.columns)}  seconds", flush=True)
    report: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(config.models):
        start = time.perf_counter()
        if name == "bm25":
            entry = task.bm25()
            usage = None
        else:
            encoder = encoder or subjects[name].load(config)
            usage = task.usage(subjects[name].usage_with(encoder))
            entry = task.evaluate(encoder, usage)
            entry |= {"digest": encoder.digest, "precision": precision}
            encoder = None  # before the next one is loaded
        entry["seconds"] = round(time.perf_counter() - start, 1)
        figures = [f"{entry[metric]:{len(column)}.4f}" for column, metric in task.columns.items()]
        print(f"{name:{width}}  {'  '.join(figures)}  {entry['seconds']:7.1f}", flush=True)
        if usage is not None:
            entry |= described(subjects[name], usage)
            print(f"{'':{width}}  {line_of(entry)}", flush=True)
        rows = entry.pop("per_query")
        report[name] = {**entry, "data": task.facts}
        if config.output:  # after every model: an hour of scores is not lost with the next one
            report[name] |= write_rows(Path(config.output), number, rows)
            text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            write_atomically(Path(config.output), text.encode())
    return report


SHOWN = 300  # characters of a document beside the scores of a query


class Retrieval:
    """A task: data by which models are scored, read and checked when it is made.

    columns: of the table, title -> metric.  facts: of the data, for the report.  Figures of a model have
    "per_query", a row for each query.
    """

    columns: Mapping[str, str] = {metric.replace("_at_", "@"): metric for metric in METRICS}

    def __init__(self, config: EvaluateConfig):
        self.beir, self.facts = read_data(config)
        self.options = {"ignore_identical_ids": config.ignore_identical_ids}
        with mteb_imported():
            pass  # seconds in the table are of encoding and search, not of imports

    def usage(self, usage: Usage) -> Usage:
        return usage

    def evaluate(self, encoder: TextEncoder, usage: Usage) -> dict[str, Any]:
        return self._read(evaluate_retrieval(encoder, self.beir, usage, **self.options))

    def bm25(self) -> dict[str, Any]:
        return self._read(evaluate_bm25(self.beir, **self.options))

    def _read(self, entry: dict[str, Any]) -> dict[str, Any]:
        """With texts in the rows: of the query, and of the first document found and the most relevant one how
        they begin."""
        corpus, qrels = self.beir.corpus, self.beir.qrels
        for row in entry["per_query"]:
            query = row["id"]
            judged = {document: grade for document, grade in qrels[query].items() if grade > 0}
            relevant = [document for document in judged if document in corpus]
            best = sorted(relevant, key=lambda document: -judged[document])[:1]
            texts = {document: corpus[document][:SHOWN] for document in (*row["found"][:1], *best)}
            about = {"language": self.beir.languages.get(query), "text": self.beir.queries[query]}
            row |= {**about, "judged": judged, "texts": texts}
        return entry


def _with_tasks(config: EvaluateConfig) -> EvaluateConfig:
    """With the instructions that the data itself has, where no option says any."""
    if config.prompt_name:
        return config
    own = with_tasks(_data(config))
    task = config.task if config.task is not None else own.task or None
    document_task = config.document_task if config.document_task is not None else own.document_task or None
    return replace(config, task=task, document_task=document_task)


def _data(config: EvaluateConfig) -> DatasetConfig:
    """As mining and training read it."""
    names = ("split", "source", "min_grade", "on_missing")
    return DatasetConfig(path=config.data, **{name: getattr(config, name) for name in names})


def check_names(config: EvaluateConfig) -> None:
    """What can be wrong without opening a folder."""
    if not config.data:
        raise UserError("data is missing: give the folder to evaluate on, or --compare REPORT ...")
    if not config.models:
        raise UserError('no models to evaluate: give checkpoints, runs or folders, or "bm25"')
    if len(set(config.models)) < len(config.models):
        raise UserError(f"models={config.models} names one twice; the report has one entry per name")
    if config.output:
        probe_file(Path(config.output))


def read_data(config: EvaluateConfig) -> tuple[Any, dict[str, Any]]:
    """(the split, or a sample of its queries; what the report says about it)."""
    findings = Findings(log=print)
    beir = read_beir(_data(config), findings)
    findings.raise_bad()
    total, sampled = len(beir.queries), ""
    if 0 < config.max_queries < total:
        chosen = set(random.Random(config.seed).sample(list(beir.queries), config.max_queries))
        queries = {query: text for query, text in beir.queries.items() if query in chosen}
        beir = Beir(beir.corpus, queries, beir.qrels, beir.languages)
        sampled = f", a sample of {total} (seed {config.seed})"
    spoken = beir.languages and [beir.languages.get(query) or "unknown" for query in beir.queries]
    languages = dict(Counter(spoken or ()).most_common())
    sizes = f"{len(beir.queries)} queries of split {config.split}{sampled}, {len(beir.corpus)} documents"
    print(f"{sizes} of {config.data}", flush=True)
    if languages:
        print(
            f"languages of the queries: {', '.join(f'{name} {count}' for name, count in languages.items())}"
        )
    for line in findings.lines():
        print(line)
    # The query is in the corpus under its own id: ArguAna, Quora. In other sets two numberings only meet.
    identical = [query for query in beir.queries if query in beir.corpus]
    if identical:
        same = sum(normal_form(beir.queries[q]) in normal_form(beir.corpus[q]) for q in identical)
        judged = sum(beir.qrels[q].get(q, 0) > 0 for q in identical)
        shown = f"{len(identical)} of {len(beir.queries)} queries have the id of a document, "
        shown += f"{same} of them are in its text, {judged} judge it relevant"
        if config.ignore_identical_ids:
            print(f"{shown}: these documents are not counted as found (ignore_identical_ids)")
        else:
            own = "where the query is its own document (mteb: ArguAna, Quora)"
            print(f"warning: {shown}; {own} --ignore_identical_ids true")
    elif config.ignore_identical_ids:
        print("ignore_identical_ids changes nothing: no query has the id of a document")
    facts = {
        "name": config.name or Path(config.data).resolve().name,
        "type": "Retrieval",  # as mteb calls it
        "main_score": METRICS[0],
        "statistic": "mean",
        "digest": digest_of(beir),
        "path": config.data,
        "split": config.split,
        "queries": len(beir.queries),
        "queries_of_the_split": total,
        "seed": config.seed if sampled else None,
        "documents": len(beir.corpus),
        "languages": languages,  # of the queries, where they say it
        "found": findings.counts,
        "ignore_identical_ids": config.ignore_identical_ids,
        "identical_ids": len(identical),
    }
    return beir, facts


def digest_of(beir: Beir) -> str:
    """sha256 of ids, texts and judgements in the order in which they are read."""
    digest = hashlib.sha256()
    judged = ((query, beir.qrels.get(query)) for query in beir.queries)
    for part in (beir.corpus.items(), beir.queries.items(), judged):
        for item in part:
            digest.update(f"{json.dumps(item)}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def described(subject: Any, usage: Any) -> dict[str, Any]:
    return {
        "prompts": usage.default._asdict(),
        "query_max_length": usage.query_max_length,
        "document_max_length": usage.document_max_length,
        "similarity": usage.similarity,
        "pooling": usage.pooling if subject.is_ours else "of its modules",
        "overridden": subject.overridden,
    }


def line_of(entry: dict[str, Any]) -> str:
    """How the texts became vectors, on one line of the table."""
    sides = []
    for side in ("query", "document"):
        length, share = entry[f"{side}_max_length"], entry["truncated"][side]
        cut = "an unknown share" if share is None else f"{share:.1%}"
        cut = "whole texts" if length is None else f"{length} tokens, {cut} truncated"
        sides.append(f"{side} {json.dumps(entry['prompts'][side], ensure_ascii=False)} {cut}")
    own = f"; overridden: {', '.join(entry['overridden'])}" if entry["overridden"] else ""
    return f"{'; '.join(sides)}; {entry['similarity']}, {entry['precision']}, {entry['digest'][:12]}{own}"
