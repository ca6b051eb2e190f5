"""Rows in, rows with mined negatives out: positive-aware mining after NV-Retriever (arXiv:2407.15831).

A passage may be a negative of a query when its score is below `ceiling(positive's score)`:

    threshold * s              for s >= 0    ("percentage to positive"; 0.95 in the paper)
    s - (1 - threshold) * |s|  in general    (threshold * s would lie ABOVE a negative s and let everything through)

With several positives the lowest-scoring one gives the ceiling: nothing returned beats any positive by the margin.
Never returned: a positive of the row, or of any row with the same query; the query itself; and what equals one of them
after whitespace and case are normalised. Of texts equal in that sense only the first is searched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_embed_core.config import UserError
from nemo_embed_core.mine.corpus import Encodes, Ranks, encode_corpus, write_atomically
from nemo_embed_core.mine.pool import Pool, Row, known_passages
from nemo_embed_core.mine.report import build_report, print_report, sweep_entry
from nemo_embed_core.mine.search import Lists, Search, find
from nemo_embed_core.mine.selection import Selection, check_threshold
from nemo_embed_core.mine.streaming import kernel_is_available
from nemo_embed_core.mine.teachers import Teacher
from nemo_embed_core.mine.topk import Exclude, topk_below

NUM_SAMPLED, NUM_SUSPECTS = 1000, 50  # rows looked at without the ceiling, and how many of them are kept for reading
NUM_RANDOM_PAIRS = 2000  # the yardstick of a trivial negative


def mine_negatives(
    rows: Iterable[Row],
    teachers: Encodes | Teacher | Iterable[Encodes | Teacher],
    output: str | Path,
    *,
    passages: Iterable[str] = (),
    selection: Selection | None = None,
    sweep: Sequence[float] = (),
    prompt: str = "",
    document_prompt: str = "",
    query_max_length: int = 512,
    document_max_length: int = 512,
    method: str = "auto",
    device: torch.device | str = "cpu",
    dtype: str = "float16",
    shard_size: int = 16384,
    block_queries: int = 8192,
    ranks: Ranks | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The rows again, in order, with neg = the best-scoring passages below the ceiling, into `output`; the report.

    teachers: one model or several (`selection.combine`), an iterable of them being loaded one after the other; prompt
    and document_prompt are those of teachers that bring none. sweep: further thresholds to report on.
    Searched are all passages (pos and neg) of the rows and `passages`. Work in progress lies in `<output>.work` (one
    file per shard and per block of queries): a run that was killed continues when it is started again. Output lines:
    {"query", "pos", "neg", "pos_scores", "neg_scores"}, every row kept, also with 0 negatives.
    """
    output, rows, ranks, selection = Path(output), list(rows), ranks or Ranks(), selection or Selection()
    say = log if ranks.rank == 0 else (lambda _: None)
    if not rows:
        raise UserError("there are no rows to mine for")
    for threshold in sweep:
        check_threshold(threshold, "sweep")
    pool = Pool.of_rows(rows, passages)
    say(
        f"{len(rows):,} queries, {pool.num_searched:,} documents to search, "
        f"{len(pool.texts) - pool.num_searched:,} spelling variants set aside"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(output.name + ".work")
    exclude = known_passages(rows, pool)
    positives = Exclude.from_lists([[pool.id(text) for text in row.pos] for row in rows])
    searches: list[Search] = []
    described = []
    positive_scores = np.empty(0, np.float32)
    lowest: list[np.ndarray] = []
    for number, teacher in enumerate(_each(teachers, prompt, document_prompt)):
        folder = work if number == 0 else work / f"teacher-{number}"
        common: dict[str, Any] = {"dtype": dtype, "shard_size": shard_size, "ranks": ranks, "log": say}
        documents = encode_corpus(
            pool.texts, teacher.documents, folder / "documents", prompt=teacher.document_prompt,
            max_length=document_max_length, name="documents", **common,
        )  # fmt: skip
        queries = encode_corpus(
            [row.query for row in rows], teacher.queries, folder / "queries", prompt=teacher.prompt,
            max_length=query_max_length, name="queries", **common,
        )  # fmt: skip
        search = Search(
            queries=queries, documents=documents, num_searched=pool.num_searched, exclude=exclude, work=folder,
            method=method, device=device, block_queries=block_queries, ranks=ranks, log=say,
        )  # fmt: skip
        scores = search.scores(positives)
        positive_scores = positive_scores if searches else scores
        lowest.append(np.minimum.reduceat(scores, positives.indptr[:-1]))
        searches.append(search)
        digest = {"documents": teacher.documents.digest, "queries": teacher.queries.digest}
        described.append(
            {
                "model": digest["queries"] if len(set(digest.values())) == 1 else digest,
                "prompt": teacher.prompt,
                "document_prompt": teacher.document_prompt,
            }
        )
        del teacher  # its memory is the next one's
    if not searches:
        raise UserError("there are no models to mine with")

    depth = selection.num_searched if len(searches) == 1 else max(selection.num_searched, selection.combine_depth)
    width = min(8 * depth, depth + 256) if sweep else depth
    lists = [Lists(search, depth, width) for search in searches]
    # From the highest ceiling down: what was found below one of them serves the next.
    swept = []
    for limit in sorted({*sweep, selection.threshold}, key=lambda t: np.inf if t is None else t, reverse=True):
        at = replace(selection, threshold=limit)
        found_scores, found_ids, below = find(lists, lowest, at)
        chosen = at.choose(found_scores, found_ids, below)
        if limit == selection.threshold:
            scores, ids = chosen
        if limit is not None and limit in sweep:
            swept.append(sweep_entry(limit, chosen[0], lowest[0]))

    settings = {
        "models": described, "queries": len(rows), "documents": pool.num_searched,
        "duplicates_removed": len(pool.texts) - pool.num_searched, **asdict(selection),
        "query_max_length": query_max_length, "document_max_length": document_max_length, "dtype": dtype,
        "topk": "csrc" if torch.device(device).type == "cuda" and kernel_is_available() else "torch",
    }  # fmt: skip
    first = searches[0]
    report = build_report(
        positive_scores=positive_scores, lowest=lowest[0], scores=scores, random_scores=random_scores(first),
        query_texts=[row.query for row in rows], languages=[getattr(row, "lang", "") for row in rows], settings=settings, stats=first.stats, sweep=swept[::-1],
        num_searched_again=sum(search.num_again for search in searches),
    )  # fmt: skip
    if ranks.rank == 0:
        report |= suspects(rows, pool, first, lowest[0], selection.ceilings(lowest[0]))
        write_atomically(output, _lines(rows, pool, positives, positive_scores, scores, ids))
        report_path = output.with_name(output.name + ".report.json")
        write_atomically(report_path, json.dumps(report, indent=1, ensure_ascii=False).encode())
        print_report(report, say)
        say(f"wrote {output} and {report_path}")
    ranks.gather(None)
    return report


def _each(
    teachers: Encodes | Teacher | Iterable[Encodes | Teacher], prompt: str, document_prompt: str
) -> Iterator[Teacher]:
    if isinstance(teachers, Teacher):
        yield teachers
    elif isinstance(teachers, Iterable):
        for one in teachers:
            yield one if isinstance(one, Teacher) else Teacher.of(one, prompt, document_prompt)
            del one  # before the next is loaded
    else:
        yield Teacher.of(teachers, prompt, document_prompt)


def _lines(
    rows: list[Row], pool: Pool, positives: Exclude, positive_scores: np.ndarray, scores: np.ndarray, ids: np.ndarray
) -> Iterator[bytes]:
    for i, row in enumerate(rows):
        found = ids[i] >= 0
        a, b = positives.indptr[i : i + 2]
        line = {
            "query": row.query,
            "pos": list(row.pos),
            "neg": [pool.texts[j] for j in ids[i][found]],
            "pos_scores": [_short(s) for s in positive_scores[a:b]],
            "neg_scores": [_short(s) for s in scores[i][found]],
        }
        if lang := getattr(row, "lang", ""):
            line["lang"] = lang
        yield (json.dumps(line, ensure_ascii=False) + "\n").encode()


def _short(score: np.float32) -> float:
    """The shortest decimal that reads back as this fp32."""
    return float(np.format_float_positional(score, unique=True))


def random_scores(search: Search) -> np.ndarray:
    """Scores of queries with documents drawn without looking: what a passage scores that has nothing to do with it."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(search.queries), NUM_RANDOM_PAIRS)
    ids = rng.integers(0, search.num_searched, NUM_RANDOM_PAIRS)
    return search.scores(Exclude(np.arange(NUM_RANDOM_PAIRS + 1), ids), rows)


def suspects(rows: list[Row], pool: Pool, search: Search, lowest: np.ndarray, ceilings: np.ndarray) -> dict[str, Any]:
    """What the first model's ceiling keeps out of a sample of rows: of how many, and some to read. Unlabelled positives?"""
    sample = np.sort(np.random.default_rng(0).choice(len(rows), min(NUM_SAMPLED, len(rows)), replace=False))
    scores, ids = topk_below(
        search.queries[sample], search.documents.part(0, pool.num_searched), np.full(len(sample), np.inf), 3,
        search.exclude.take(sample), method="fp32", device=search.device,
    )  # fmt: skip
    above = (ids.numpy() >= 0) & (scores.numpy().astype(np.float64) >= ceilings[sample][:, None])
    having = np.flatnonzero(above[:, 0])
    found = []
    for j in having[np.linspace(0, len(having) - 1, min(NUM_SUSPECTS, len(having))).astype(int)]:
        row, i = rows[sample[j]], sample[j]
        kept_out = [
            {"text": pool.texts[d], "score": s}
            for d, s in zip(ids[j].tolist(), scores[j].tolist(), strict=True)
            if d >= 0 and s >= ceilings[i]
        ]
        positive = {"pos": list(row.pos), "lowest_positive_score": float(lowest[i])}
        found.append({"query": row.query, **positive, "above_ceiling": kept_out})
    share = {"sampled_queries": len(sample), "with_a_passage_above_the_ceiling": len(having)}
    return {"kept_out": share, "suspects": found}
