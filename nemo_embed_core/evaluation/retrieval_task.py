"""Retrieval from a folder of one's own: its data read and checked, models scored on it.

task = Retrieval(TaskOptions(data="data/wiki"))
(entry,) = task.evaluate(Encoding(encoder), usage)      # of each split and pool
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_embed_core.checkpoint.source import Usage
from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.config.evaluate import TaskOptions
from nemo_embed_core.data.normal_form import normal_form
from nemo_embed_core.data.readers import Beir, Findings, read_splits
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.encoding import Encoding, say
from nemo_embed_core.evaluation.pools import Digests, Pool, pools_of, restricted
from nemo_embed_core.evaluation.retrieval import METRICS, evaluate_bm25, evaluate_parts, mteb_imported

SHOWN = 300  # characters of a document beside the scores of a query


class Retrieval:
    """Retrieval from one corpus, by one or several splits and pools; read and checked when it is made.

    columns: of the table, title -> metric.  parts: what the report says of the data of each.  Figures of a
    model have "per_query", a row for each query, and "by_language", means of the queries of each language.
    """

    columns: Mapping[str, str] = {metric.replace("_at_", "@"): metric for metric in METRICS}

    def __init__(self, options: TaskOptions, seed: int = 0):
        self.beirs: list[Beir] = []
        self.parts: list[dict[str, Any]] = []
        of_splits = [replace(options, split=split) for split in options.splits]
        findings = [Findings(log=say) for _ in of_splits]
        found = read_splits([dataset_of(one) for one in of_splits], findings)
        digests = Digests()
        for one, split, met in zip(of_splits, found, findings, strict=True):
            met.raise_bad()
            beir, facts = with_facts(split, one, seed, met, digests)
            if len(of_splits) > 1:
                facts["name"] += f"@{one.split}"
            for pool in pools_of(options.pool, beir) if options.pool else [""]:
                own, about = (beir, facts) if not pool else restricted(beir, facts, pool, digests)
                self.beirs.append(own)
                self.parts.append(about)
        pools, base = [beir.corpus for beir in self.beirs], beir.corpus
        self.corpus = pools[0]  # what any of them searches
        if len(pools) > 1:
            self.corpus = Pool(base, (key for key in base if any(key in pool for pool in pools)))
        self.options = {"ignore_identical_ids": options.ignore_identical_ids}
        with mteb_imported():
            pass  # seconds in the table are of encoding and search, not of imports

    @property
    def texts(self) -> list[Mapping[str, Mapping[str, str]]]:
        return [{"queries": beir.queries, "documents": beir.corpus} for beir in self.beirs]

    def evaluate(self, encoder: Encoding, usage: Usage) -> list[dict[str, Any]]:
        found = evaluate_parts(encoder, self.corpus, self.beirs, usage, **self.options)
        return [_read(entry, beir) for entry, beir in zip(found, self.beirs, strict=True)]

    def bm25(self) -> list[dict[str, Any]]:
        """In a pool the words are weighed by its documents alone."""
        return [_read(evaluate_bm25(beir, **self.options), beir) for beir in self.beirs]


def _read(entry: dict[str, Any], beir: Beir) -> dict[str, Any]:
    """With texts in the rows: of the query, and of the first document found and the most relevant one how
    they begin."""
    corpus, qrels = beir.corpus, beir.qrels
    by_language: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in entry["per_query"]:
        query = row["id"]
        judged = {document: grade for document, grade in qrels[query].items() if grade > 0}
        relevant = [document for document in judged if document in corpus]
        best = sorted(relevant, key=lambda document: -judged[document])[:1]
        texts = {document: corpus[document][:SHOWN] for document in (*row["found"][:1], *best)}
        about = {"language": beir.languages.get(query), "text": beir.queries[query]}
        row |= {**about, "judged": judged, "texts": texts}
        by_language[row["language"] or "unknown"].append(row)
    if beir.languages:
        entry["by_language"] = {
            language: {"queries": len(rows), **{m: sum(row[m] for row in rows) / len(rows) for m in METRICS}}
            for language, rows in sorted(by_language.items())
        }
    return entry


def dataset_of(config: TaskOptions) -> DatasetConfig:
    """As mining and training read it."""
    names = ("split", "source", "min_grade", "on_missing")
    return DatasetConfig(path=config.data, **{name: getattr(config, name) for name in names})


def sample_queries(beir: Beir, count: int, seed: int) -> Beir:
    """With `count` of the queries, in their order; all of them where 0 or as many are asked for."""
    if not 0 < count < len(beir.queries):
        return beir
    chosen = set(random.Random(seed).sample(list(beir.queries), count))
    return beir._replace(queries={query: text for query, text in beir.queries.items() if query in chosen})


def unanswerable(beir: Beir, ignore_identical_ids: bool) -> list[str]:
    """Queries that judge no document relevant that could be found."""
    return [
        query
        for query in beir.queries
        if not any(
            grade > 0 and document in beir.corpus and not (ignore_identical_ids and document == query)
            for document, grade in beir.qrels[query].items()
        )
    ]


def with_facts(
    beir: Beir, config: TaskOptions, seed: int, findings: Findings, digests: Digests
) -> tuple[Beir, dict[str, Any]]:
    """(the split, or a sample of its queries; what the report says about it)."""
    total = len(beir.queries)
    beir = sample_queries(beir, config.max_queries, seed)
    sampled = f", a sample of {total} (seed {seed})" if len(beir.queries) < total else ""
    spoken = beir.languages and [beir.languages.get(query) or "unknown" for query in beir.queries]
    languages = dict(Counter(spoken or ()).most_common())
    sizes = f"{len(beir.queries)} queries of split {config.split}{sampled}, {len(beir.corpus)} documents"
    say(f"{sizes} of {config.data}")
    if languages:
        say(f"languages of the queries: {', '.join(f'{name} {count}' for name, count in languages.items())}")
    for line in findings.lines():
        say(line)
    found = dict(findings.counts)
    if lost := unanswerable(beir, config.ignore_identical_ids):
        if len(lost) == len(beir.queries):
            raise UserError(f"{config.data}: no query of split {config.split} has a relevant document")
        found["queries without a relevant document, which count as 0"] = len(lost)
        say(
            f"{len(lost)} of {len(beir.queries)} queries have no relevant document and count as 0, as in "
            f"mteb (first: {lost[0]!r})"
        )
    # The query is in the corpus under its own id: ArguAna, Quora. In other sets two numberings only meet.
    identical = [query for query in beir.queries if query in beir.corpus]
    if identical:
        same = sum(normal_form(beir.queries[q]) in normal_form(beir.corpus[q]) for q in identical)
        judged = sum(beir.qrels[q].get(q, 0) > 0 for q in identical)
        shown = f"{len(identical)} of {len(beir.queries)} queries have the id of a document, "
        shown += f"{same} of them are in its text, {judged} judge it relevant"
        if config.ignore_identical_ids:
            say(f"{shown}: these documents are not counted as found (ignore_identical_ids)")
        else:
            own = "where the query is its own document (mteb: ArguAna, Quora)"
            say(f"warning: {shown}; {own} --ignore_identical_ids true")
    elif config.ignore_identical_ids:
        say("ignore_identical_ids changes nothing: no query has the id of a document")
    facts = {
        "name": config.name or Path(config.data).resolve().name,
        "type": "Retrieval",  # as mteb calls it
        "main_score": METRICS[0],
        "statistic": "mean",
        "digest": digests.of(beir, ""),
        "path": config.data,
        "split": config.split,
        "queries": len(beir.queries),
        "queries_of_the_split": total,
        "seed": seed if sampled else None,
        "documents": len(beir.corpus),
        "languages": languages,  # of the queries, where they say it
        "found": found,
        "ignore_identical_ids": config.ignore_identical_ids,
        "identical_ids": len(identical),
    }
    return beir, facts
