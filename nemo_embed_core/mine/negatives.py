"""Rows in, rows with mined negatives out: positive-aware mining after NV-Retriever (arXiv:2407.15831).

A document may be a negative of a query when its score is below the ceiling (selection.py) of the query's
lowest-scoring positive: nothing returned beats any positive by the margin. Never returned: a document that
any data of the run judges relevant for the query; the query itself; a document of the query's group; one that
is the same as a positive once both are cut at the model's length; and what equals one of them in normal form
(data/normal_form.py), in which sense a text is searched once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nemo_embed_core.config import Selection, check_threshold
from nemo_embed_core.data.formats.writing import write_lines
from nemo_embed_core.data.vectors import write_keys
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import write_atomically
from nemo_embed_core.mine.corpus import Corpus, Ranks, encode_corpus, read_truncation
from nemo_embed_core.mine.lists import CandidateLists, TeacherSearch, find
from nemo_embed_core.mine.pool import Cut, Document, Exclusions, Known, Pool, Row, Rows, exclusions
from nemo_embed_core.mine.report import build_report, print_report, sweep_entry
from nemo_embed_core.mine.search.exclude import Exclude
from nemo_embed_core.mine.search.streaming import kernel_is_available
from nemo_embed_core.mine.selection import ceilings_of, choose
from nemo_embed_core.mine.teachers import Teacher

# Rows looked at without the ceiling, and how many of them are kept for reading.
NUM_SAMPLED, NUM_SUSPECTS = 1000, 50
NUM_RANDOM_PAIRS = 2000  # the yardstick of a trivial negative


def mine_negatives(
    rows: Iterable[Row] | Rows,
    teachers: Iterable[Teacher],
    output: str | Path,
    *,
    documents: Iterable[Document] = (),
    selection: Selection | None = None,
    sweep: Sequence[float] = (),
    known: Known | None = None,
    excluded: Set[bytes] = frozenset(),
    keep_negatives: bool = False,
    negatives_are_judged: bool = False,
    rows_are_searched: bool = True,
    method: str = "auto",
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    shard_size: int = 16384,
    block_queries: int = 8192,
    ranks: Ranks | None = None,
    log: Callable[[str], None] = print,
    write: Callable[[Path, Iterator[dict[str, Any]]], None] = write_lines,
    with_texts: bool = True,
) -> dict[str, Any]:
    """The rows again, in order, with neg = the best documents below the ceiling, into `output`; the report.

    rows: with numbers already (mine/folder.py), `documents`, `known`, `excluded` and rows_are_searched are
    theirs. with_texts: `write` gets "pos" and "neg", and not their ids alone.
    teachers: one or several (`selection.combine`), asked for one after the other: each may be loaded then.
    sweep: further thresholds to report on. Searched are `documents` and (rows_are_searched) the rows'.
    known: documents relevant for a query; None: those of the rows. excluded: normal keys of documents not
    to search. keep_negatives: a row's own come first, whatever they score.
    negatives_are_judged: they are known to be irrelevant (score 0 in qrels), so no suspects. dtype of the
    stored embeddings: None for float16, and float32 where rows are not of unit length. Work in progress lies
    in `<output>.work` (one file per shard and per block of queries): a run that was killed continues when it
    is started again. Output lines: {"query", "pos", "neg", "pos_scores", "neg_scores"}, and "id", "lang",
    "group", "pos_ids" and "neg_ids" where the data has them; every row kept, also with 0 negatives.
    """
    output, ranks, selection = Path(output), ranks or Ranks(), selection or Selection()
    say = log if ranks.rank == 0 else (lambda _: None)
    for threshold in sweep:
        check_threshold(threshold, "sweep")
    if not isinstance(rows, Rows):
        rows = _number_texts(rows, documents, Pool(excluded), known, rows_are_searched)
    table = _checked(rows, say)
    pool, positives = table.pool, table.pos
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(output.name + ".work")
    encoded: list[_Encoded] = []
    for teacher in teachers:
        folder = work / f"teacher-{len(encoded)}" if encoded else work
        encoded.append(_encode(teacher, table, folder, dtype, shard_size=shard_size, ranks=ranks, log=say))
        del teacher  # its memory is the next one's
    if not encoded:
        raise UserError("there are no models to mine with")
    cuts = [one.cut for one in encoded]
    exclude = exclusions(table, cuts)
    searches = [
        TeacherSearch(
            queries=one.queries, documents=one.documents, num_searched=pool.num_searched, exclude=exclude,
            work=one.folder, method=method, device=device, block_queries=block_queries, ranks=ranks, log=say,
        )
        for one in encoded
    ]  # fmt: skip
    positive_scores = [search.scores(positives) for search in searches]
    lowest = [np.minimum.reduceat(scores, positives.indptr[:-1]) for scores in positive_scores]
    scores, ids, swept = _search(searches, lowest, selection, sweep)

    first, model, ceilings = searches[0], encoded[0].described, ceilings_of(selection, lowest[0])
    judgements = Given.of(table, exclude, first, ceilings, ids)
    storage = _storage(model, first, selection, ceilings, scores)
    if keep_negatives:
        scores, ids = judgements.before(scores, ids)
    settings = {
        "models": [one.described for one in encoded], "queries": len(table), "documents": pool.num_searched,
        "documents_encoded": len(pool.texts), "duplicates_removed": pool.counts["variants"],
        "documents_excluded": pool.counts["excluded"],
        "documents_without_content": pool.counts["without_content"],
        **{field.name: getattr(selection, field.name) for field in fields(Selection)},
        **{key: model[key] for key in ("query_max_length", "document_max_length", "dtype")},
        "topk": "csrc" if torch.device(device).type == "cuda" and kernel_is_available() else "torch",
        "storage": storage, "given_negatives": {**judgements.counts, "kept": keep_negatives},
        "positives_excluded": table.num_excluded, "noise": table.noise | _same_when_cut(table, cuts),
    }  # fmt: skip
    report = build_report(
        positive_scores=positive_scores[0], lowest=lowest[0], scores=scores, settings=settings, sweep=swept,
        random_scores=random_scores(first), scripts=table.scripts, languages=table.langs,
        stats=first.stats, num_searched_again=sum(search.num_again for search in searches),
    )  # fmt: skip
    if ranks.rank == 0:
        judged = table.neg if negatives_are_judged else None
        report |= suspects(table, first, lowest[0], ceilings, judged)
        write(output, _mined(table, positive_scores[0], scores, ids, with_texts))
        report_path = output.with_name(output.name + ".report.json")
        write_atomically(report_path, json.dumps(report, indent=1, ensure_ascii=False).encode())
        print_report(report, say)
        say(f"wrote {output} and {report_path}")
    ranks.gather(None)
    return report


def _number_texts(
    rows: Iterable[Row],
    documents: Iterable[Document],
    pool: Pool,
    known: Known | None,
    rows_are_searched: bool,
) -> Rows:
    """The rows, and all texts that can be documents in their pool, closed."""
    if not rows_are_searched:
        pool.add_all(documents)
        pool.searched_so_far()
    table = Rows(rows, pool, known)
    if not len(table):
        raise UserError("there are no rows to mine for")
    if rows_are_searched:
        pool.add_all(documents)
    pool.close()
    return table


def _checked(table: Rows, say: Callable[[str], None]) -> Rows:
    pool = table.pool
    aside = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in sorted(pool.counts.items()))
    set_aside = f"; set aside: {aside}" if aside else ""
    say(f"{len(table):,} queries, {pool.num_searched:,} documents to search{set_aside}")
    if not pool.num_searched:
        all_of = f"all of {len(pool.texts):,}"
        raise UserError(f"there are no documents to search: {all_of} are set aside ({aside})")
    return table


class _Encoded(NamedTuple):
    """Both sides of the data by one teacher."""

    queries: Corpus
    documents: Corpus
    folder: Path
    cut: Cut
    described: dict[str, Any]  # for the report


def _encode(teacher: Teacher, table: Rows, folder: Path, dtype: str | None, **options: Any) -> _Encoded:
    """options: shard_size, ranks and log of encode_corpus."""
    is_unit = teacher.similarity == "cosine"
    options |= {"dtype": dtype or ("float16" if is_unit else "float32"), "unit": is_unit}
    documents = encode_corpus(
        table.pool.texts, teacher.documents, folder / "documents", prompt=teacher.document_prompt,
        max_length=teacher.document_max_length, name="documents", **options,
    )  # fmt: skip
    texts, prompt = table.prompted(teacher.prompt)
    queries = encode_corpus(
        texts, teacher.queries, folder / "queries", prompt=prompt,
        max_length=teacher.query_max_length, name="queries", **options,
    )  # fmt: skip
    if options["ranks"].rank == 0:
        write_keys(folder, documents=table.pool.texts, queries=table.prompted("")[0])
    of_documents = read_truncation(folder / "documents", len(documents.arrays))
    of_queries = read_truncation(folder / "queries", len(queries.arrays))
    cut = Cut(of_documents.numbers, of_documents.keys)
    digests = {"documents": teacher.documents.digest, "queries": teacher.queries.digest}
    described = {
        "model": digests["queries"] if len(set(digests.values())) == 1 else digests,
        "name": teacher.name,
        "prompt": teacher.prompt,
        "document_prompt": teacher.document_prompt,
        "query_max_length": teacher.query_max_length,
        "document_max_length": teacher.document_max_length,
        "similarity": teacher.similarity,
        "dtype": options["dtype"],
        "queries_truncated": of_queries.num_truncated,  # None: not known
        "documents_truncated": of_documents.num_truncated,
        "documents_same_when_cut": sum(map(len, cut.members)),
    }
    return _Encoded(queries, documents, folder, cut, described)


def _search(
    searches: list[TeacherSearch], lowest: list[np.ndarray], selection: Selection, sweep: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """(scores, ids), [Q, num_negatives], of the negatives; the report's entries of `sweep`, lowest first."""
    depth = selection.num_searched
    if len(searches) > 1:
        depth = max(depth, selection.combine_depth)
    width = min(8 * depth, depth + 256) if sweep else depth
    lists = [CandidateLists(search, depth, width) for search in searches]
    own, entries = selection.threshold, []
    # From the highest ceiling down: the documents found below one of them serve the next.
    for limit in sorted({*sweep, own}, key=lambda t: np.inf if t is None else t, reverse=True):
        at = replace(selection, threshold=limit)
        found = choose(at, *find(lists, lowest, at))
        if limit == own:
            scores, ids = found
        if limit is not None and limit in sweep:
            entries.append(sweep_entry(limit, found[0], lowest[0]))
    return scores, ids, entries[::-1]


def _same_when_cut(rows: Rows, cuts: list[Cut]) -> dict[str, int]:
    """Rows with given negatives, and their number, that a model cannot tell from a positive of the row."""
    num_rows = num_negatives = 0
    for i in range(len(rows)):
        same: set[int] = set()
        for cut in cuts:
            classes = {cut.of_document.get(n) for n in rows.pos.of(i).tolist()} - {None}
            same |= {n for n in rows.neg.of(i).tolist() if cut.of_document.get(n) in classes}
        num_rows += bool(same)
        num_negatives += len(same)
    return {
        "negative_equals_positive_when_cut": num_rows,
        "negatives_equal_to_a_positive_when_cut": num_negatives,
    }


def _storage(
    model: dict[str, Any],
    search: TeacherSearch,
    selection: Selection,
    ceilings: np.ndarray,
    scores: np.ndarray,
) -> dict[str, Any]:
    """Scores and ceilings are of the stored rows; score_error bounds the distance to the model's own scores.

    float16: |x - x^| <= 2^-11 |x| + 2^-25 sqrt(D) on either side, for rows of unit length. None: not known.
    """
    error: float | None = 0.0
    count = None
    if model["dtype"] == "float16":
        is_unit = model["similarity"] == "cosine"
        error = 2.0**-10 + 2.0**-24 * search.queries.shape[1] ** 0.5 if is_unit else None
    if error is not None:
        threshold = selection.threshold or 1.0
        slope = 1 + max(1.0, threshold, 2 - threshold)  # of the ceiling in the score
        gap = ceilings[:, None] - scores.astype(np.float64)
        count = int(((gap <= slope * error) & np.isfinite(scores)).sum()) if error else 0
    return {"dtype": model["dtype"], "score_error": error, "negatives_within_it": count}


@dataclass(frozen=True)
class Given:
    """The negatives of the rows: scores, and which may be kept (none known to be relevant, none twice)."""

    documents: Exclude
    scores: np.ndarray
    may_be_kept: np.ndarray
    counts: dict[str, int]

    @classmethod
    def of(
        cls, rows: Rows, exclude: Exclusions, search: TeacherSearch, ceilings: np.ndarray, mined: np.ndarray
    ) -> Given:
        given = rows.neg
        scores = search.scores(given)
        may_be_kept = np.zeros(len(scores), bool)
        num_again = num_relevant = 0
        for i in np.flatnonzero(np.diff(given.indptr)):
            relevant = set(exclude.take(np.array([i])).ids.tolist())
            met: set[int] = set()
            for place in range(given.indptr[i], given.indptr[i + 1]):
                number = int(given.ids[place])
                same = rows.pool.searched(np.array([number]))
                number = int(same[0]) if len(same) else number
                num_relevant += number in relevant
                num_again += number in mined[i]
                may_be_kept[place] = number not in relevant and number not in met
                met.add(number)
        limits = np.repeat(ceilings, np.diff(given.indptr))
        counts = {
            "given": len(scores),
            "mined_again": num_again,
            "at_or_above_the_ceiling": int((scores.astype(np.float64) >= limits).sum()),
            "known_to_be_relevant": num_relevant,
        }
        return cls(given, scores, may_be_kept, counts)

    def before(self, scores: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(scores, ids), [Q, n]: those that may be kept, then mined ones, at least as many as mined for."""
        k = ids.shape[1]
        starts = self.documents.indptr
        kept = [self.documents.ids[a:b][self.may_be_kept[a:b]] for a, b in pairwise(starts)]
        width = max(k, *map(len, kept))
        out_scores = np.full((len(ids), width), -np.inf, np.float32)
        out_ids = np.full((len(ids), width), -1, np.int64)
        for i, first in enumerate(kept):
            n = len(first)
            own = slice(starts[i], starts[i + 1])
            out_ids[i, :n], out_scores[i, :n] = first, self.scores[own][self.may_be_kept[own]]
            more = np.flatnonzero((ids[i] >= 0) & ~np.isin(ids[i], first))[: max(0, k - n)]
            out_ids[i, n : n + len(more)], out_scores[i, n : n + len(more)] = ids[i, more], scores[i, more]
        return out_scores, out_ids


def _mined(
    rows: Rows, positive_scores: np.ndarray, scores: np.ndarray, ids: np.ndarray, with_texts: bool
) -> Iterator[dict[str, Any]]:
    pool, positives = rows.pool, rows.pos
    texts = pool.held(np.concatenate([positives.ids, ids[ids >= 0]])) if with_texts else {}
    for i, (query, more) in enumerate(rows.read()):
        found = ids[i] >= 0
        a, b = positives.indptr[i : i + 2]
        numbers = {"pos": positives.of(i), "neg": ids[i][found]}
        line: dict[str, Any] = {"query": query}
        if with_texts:
            line |= {side: [texts[j] for j in numbers[side].tolist()] for side in numbers}
        line["pos_scores"] = [_short(s) for s in positive_scores[a:b]]
        line["neg_scores"] = [_short(s) for s in scores[i][found]]
        prompt = {"prompt": more.pop("prompt")} if "prompt" in more else {}
        known = {f"{side}_ids": pool.document_ids(numbers[side]) for side in numbers}
        yield line | more | {name: value for name, value in known.items() if value} | prompt


def _short(score: np.float32) -> float:
    """The shortest decimal that reads back as this fp32."""
    return float(np.format_float_positional(score, unique=True))


def random_scores(search: TeacherSearch) -> np.ndarray:
    """Scores of queries with documents drawn without looking: the score of having nothing in common."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(search.queries), NUM_RANDOM_PAIRS)
    ids = rng.integers(0, search.num_searched, NUM_RANDOM_PAIRS)
    return search.scores(Exclude(np.arange(NUM_RANDOM_PAIRS + 1), ids), rows)


def suspects(
    rows: Rows, search: TeacherSearch, lowest: np.ndarray, ceilings: np.ndarray, judged: Exclude | None
) -> dict[str, Any]:
    """In how many sampled rows the first model's ceiling keeps documents out, and some to read: mislabelled?

    judged: per row documents that are known to be irrelevant, so none.
    """
    sample = np.sort(np.random.default_rng(0).choice(len(rows), min(NUM_SAMPLED, len(rows)), replace=False))
    spare = 0 if judged is None else int(np.diff(judged.indptr)[sample].max())
    k = 3 + min(spare, 1000)  # a search on a GPU has places for 3,072
    documents = search.documents.part(0, search.num_searched)
    scores, ids = (
        x.numpy() for x in search.below(documents, sample, np.full(len(sample), np.inf), k, 0, "fp32")
    )
    above = (ids >= 0) & (scores.astype(np.float64) >= ceilings[sample][:, None])
    if judged is not None:
        for j, i in enumerate(sample):
            above[j] &= ~np.isin(ids[j], rows.pool.searched(judged.of(i)))
    having = np.flatnonzero(above.any(1))
    chosen = having[np.linspace(0, len(having) - 1, min(NUM_SUSPECTS, len(having))).astype(int)]
    over = {j: ids[j][above[j]][:3] for j in chosen.tolist()}
    at = sample[chosen].tolist()
    texts = rows.pool.held(np.concatenate([rows.pos.take(sample[chosen]).ids, *over.values()]))
    found = []
    for j, i, (query, more) in zip(over, at, rows.read(at), strict=True):
        kept_out = []
        for d, s in zip(over[j].tolist(), scores[j][above[j]].tolist(), strict=False):
            name = {"id": one[0]} if (one := rows.pool.document_ids([d])) else {}
            kept_out.append({**name, "text": texts[d], "score": s})
        positive = {
            "pos": [texts[n] for n in rows.pos.of(i).tolist()],
            "lowest_positive_score": float(lowest[i]),
        }
        name = {"id": more["id"]} if "id" in more else {}
        found.append({**name, "query": query, **positive, "above_ceiling": kept_out})
    share = {"sampled_queries": len(sample), "with_a_passage_above_the_ceiling": len(having)}
    return {"kept_out": share, "suspects": found}
