"""Dev sets: held-out data that a training run is scored by, as arrays, and the scores of what a model says of
them. Read and tokenised once; no mteb, whose figures these are (tests/train/test_evaluate.py).

    nDCG@10 of a query = sum of grade / log2(1 + rank) over the ten nearest documents / that of the best order
    loss of a query    = mean over its relevant p of -log(e^(s_p / t) / (e^(s_p / t) + sum_n e^(s_n / t)))

s: cosines; n: every document of the corpus that the query does not judge relevant; t: loss.temperature. With
ignore_identical_ids a query's own document is neither found nor p nor n. Of equal scores the document with
the greater id comes first, and texts of the same tokens are one text: they tie at every layout. Spearman's
correlation is of midranks.

Q queries · N documents · J relevant pairs · n texts
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nemo_embed_core.checkpoint.source import Usage
from nemo_embed_core.config import DatasetConfig, EvalConfig, EvalDatasetConfig, EvaluateConfig
from nemo_embed_core.data.lines import Findings
from nemo_embed_core.data.readers import Beir, read_beir, with_tasks
from nemo_embed_core.data.tokenizer import Tokenizer
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation import labelled
from nemo_embed_core.evaluation.rank_statistics import spearman
from nemo_embed_core.evaluation.retrieval import Best, rank_of_ids
from nemo_embed_core.evaluation.retrieval_task import sample_queries, unanswerable


@dataclass(frozen=True)
class Side:
    """Texts as token ids, those of the same tokens once; of: of each text its place among them."""

    tokens: list[np.ndarray]
    of: np.ndarray  # [n] int64


@dataclass(frozen=True)
class RetrievalSet:
    """Documents stand in the order of their ids, so that of equal scores the greater number comes first."""

    name: str
    queries: Side
    documents: Side
    judged_J: np.ndarray  # int64: query * N + document of the relevant ones, ascending
    grades_J: np.ndarray  # int64
    ideal_Q: np.ndarray  # of the best order; what is judged and does not exist counts
    own_Q: np.ndarray  # the document that is not counted as found, -1: none
    digest: str

    @property
    def sides(self) -> tuple[Side, ...]:
        return self.queries, self.documents

    def ndcg_at_10(self, best: Best) -> float:
        others = best.documents != self.own_Q[best.rows]
        rows, documents = best.rows[others], best.documents[others]
        place = np.arange(len(rows)) - np.searchsorted(rows, rows)
        key = rows * len(self.documents.of) + documents
        at = np.minimum(np.searchsorted(self.judged_J, key), len(self.judged_J) - 1)
        gains = np.where((self.judged_J[at] == key) & (place < 10), self.grades_J[at], 0)
        found_Q = np.bincount(rows, gains / np.log2(place + 2), minlength=len(self.ideal_Q))
        ratios = np.divide(found_Q, self.ideal_Q, out=np.zeros_like(found_Q), where=self.ideal_Q > 0)
        return math.fsum(ratios) / len(ratios)


@dataclass(frozen=True)
class StsSet:
    """Texts of the pairs, first those of one side, then those of the other."""

    name: str
    texts: Side
    grades: np.ndarray  # [pairs] float64
    digest: str

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.texts,)

    def spearman(self, cosines: np.ndarray) -> float:
        """Of the pairs' cosines [pairs]; 0 where all are the same."""
        return float(spearman(np.ones((1, len(self.grades)), np.int64), cosines, self.grades)[0])


DevSet = RetrievalSet | StsSet


class _How(NamedTuple):
    """What all dev sets are read with."""

    seed: int
    usage: Usage
    tokenizer: Tokenizer
    log: Callable[[str], None]


def read_dev_sets(
    config: EvalConfig, usage: Usage, tokenizer: Tokenizer, log: Callable[[str], None]
) -> list[DevSet]:
    """All of them, checked and tokenised with the prompts and lengths that the checkpoint will be used with;
    DataError or UserError, with the name of the dev set."""
    how = _How(config.seed, usage, tokenizer, log)
    return [_read(name, one, how) for name, one in zip(config.names(), config.datasets, strict=True)]


def _read(name: str, dataset: EvalDatasetConfig, how: _How) -> DevSet:
    findings = Findings(log=how.log)
    read = _read_retrieval if dataset.task_type == "retrieval" else _read_sts
    try:
        dev = read(name, dataset, how, findings)
    except UserError as error:
        error.args = (f"eval.datasets: {name}: {error}",)
        raise
    for line in findings.lines():
        how.log(f"dev set {name}: {line}")
    return dev


def _override(dataset: EvalDatasetConfig, usage: Usage, task: str | None, document_task: str | None) -> Usage:
    tasks: dict[str, Any] = {"task": dataset.task, "document_task": dataset.document_task}
    if not dataset.prompt_name:  # the data's own instructions, as launch/evaluate.py
        own = {"task": task or None, "document_task": document_task or None}
        tasks = {key: own[key] if value is None else value for key, value in tasks.items()}
    return usage.override(prompt_name=dataset.prompt_name, **tasks)[0]


def _read_retrieval(name: str, dataset: EvalDatasetConfig, how: _How, findings: Findings) -> RetrievalSet:
    keys = ("path", "split", "source", "min_grade", "on_missing")
    data = DatasetConfig(**{key: getattr(dataset, key) for key in keys})
    own = with_tasks(data)
    usage = _override(dataset, how.usage, own.task, own.document_task)
    beir = read_beir(data, findings)
    findings.raise_bad()
    beir, sampled = _sample(beir, dataset, how.seed)
    if not beir.queries or not beir.corpus:
        raise UserError(f"{len(beir.queries)} queries over {len(beir.corpus)} documents: nothing to evaluate")
    ids = list(beir.corpus)
    order = np.argsort(rank_of_ids(ids))
    ids = [ids[i] for i in order.tolist()]
    number = {document: i for i, document in enumerate(ids)}
    pairs = [
        (q * len(ids) + number[document], grade)
        for q, query in enumerate(beir.queries)
        for document, grade in beir.qrels[query].items()
        if grade > 0 and document in number
    ]
    own_Q = [number.get(query, -1) if dataset.ignore_identical_ids else -1 for query in beir.queries]
    if len(lost := unanswerable(beir, dataset.ignore_identical_ids)) == len(beir.queries):
        raise UserError(f"{dataset.path}: no query of split {dataset.split} has a relevant document")
    judged = np.array(sorted(pairs), np.int64)
    ideal = [_ideal(beir.qrels[query].values()) for query in beir.queries]
    prompts = usage.default
    texts = (beir.queries[query] for query in beir.queries)
    queries, cut = _side(how.tokenizer, texts, usage.query_max_length, prompts.query, "data.query_max_length")
    stripped = (beir.corpus[i].strip() for i in ids)  # as mteb gives them to a model
    length = usage.document_max_length
    documents, cut_documents = _side(
        how.tokenizer, stripped, length, prompts.document, "data.document_max_length"
    )
    without = f", {len(lost):,} without a relevant document, whose nDCG@10 is 0" if lost else ""
    how.log(
        f"dev set {name}: {len(own_Q):,} queries ({cut:.1%} cut{without}) over {len(ids):,} documents "
        f"({cut_documents:.1%} cut){sampled}, prompts {prompts.query!r} and {prompts.document!r}"
    )
    arrays = (judged[:, 0], judged[:, 1], np.array(ideal), np.array(own_Q, np.int64))
    return RetrievalSet(name, queries, documents, *arrays, _digest("retrieval", queries, documents, *arrays))


def _ideal(grades: Iterable[int]) -> float:
    best = sorted((grade for grade in grades if grade > 0), reverse=True)[:10]
    return sum(grade / math.log2(place + 2) for place, grade in enumerate(best))


def _sample(beir: Beir, dataset: EvalDatasetConfig, seed: int) -> tuple[Beir, str]:
    """A sample of the queries as launch/evaluate.py takes it; of the documents those that they judge, and
    others."""
    queries, corpus, said = sample_queries(beir, dataset.max_queries, seed).queries, beir.corpus, ""
    if len(queries) < len(beir.queries):
        said += f", a sample of {len(beir.queries):,} queries"
    if 0 < dataset.max_documents < len(corpus):
        judged = {document for query in queries for document in beir.qrels[query]}
        if dataset.ignore_identical_ids:
            judged |= queries.keys()
        others = [document for document in corpus if document not in judged]
        rest = max(0, dataset.max_documents - (len(corpus) - len(others)))
        left_out = set(others) - set(random.Random(seed).sample(others, min(rest, len(others))))
        said += f", a sample of {len(corpus):,} documents"
        corpus = {document: corpus[document] for document in corpus if document not in left_out}
    return Beir(corpus, queries, beir.qrels), f"{said} (seed {seed})" if said else ""


def _read_sts(name: str, dataset: EvalDatasetConfig, how: _How, findings: Findings) -> StsSet:
    usage = _override(dataset, how.usage, None, None)
    as_evaluated = EvaluateConfig(task_type="sts", data=dataset.path, split=dataset.split)
    rows = labelled.read(as_evaluated, dataset.split, findings)
    findings.raise_bad()
    grades = np.array([row["gold"] for row in rows])
    if len(set(grades.tolist())) < 2:
        raise UserError(f"{dataset.path}: {len(rows)} pairs with one grade have no order; give others")
    texts = (row[side] for side in ("text", "other") for row in rows)
    prompt = usage.default.query  # sts has no sides, as in launch/evaluate.py
    side, cut = _side(how.tokenizer, texts, usage.query_max_length, prompt, "data.query_max_length")
    how.log(f"dev set {name}: {len(rows):,} graded pairs ({cut:.1%} of the texts cut), prompt {prompt!r}")
    return StsSet(name, side, grades, _digest("sts", side, grades))


def _side(
    tokenizer: Tokenizer, texts: Iterable[str], max_length: int | None, prompt: str, option: str
) -> tuple[Side, float]:
    """The texts, and the share of them that lost tokens."""
    assert max_length is not None, "a run has lengths"
    arrays, cut = tokenizer.encode_cut(texts, max_length, prompt, option)
    places: dict[bytes, int] = {}
    of = np.array([places.setdefault(ids.tobytes(), len(places)) for ids in arrays], np.int64)
    distinct = [np.frombuffer(key, np.int32) for key in places]
    return Side(distinct, of), float(cut.mean())


def _digest(kind: str, *parts: Side | np.ndarray) -> str:
    """sha256 of what decides the figure besides the weights."""
    digest = hashlib.sha256(kind.encode())
    for array in _arrays(parts):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _arrays(parts: Iterable[Side | np.ndarray]) -> Iterator[np.ndarray]:
    for part in parts:
        yield from (*part.tokens, part.of) if isinstance(part, Side) else (part,)
