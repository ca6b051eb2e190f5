"""Rows in, rows with mined negatives out: positive-aware mining after NV-Retriever (arXiv:2407.15831).

A passage may be a negative of a query when its score is below `ceiling(positive's score)`:

    threshold * s              for s >= 0    ("percentage to positive"; 0.95 in the paper)
    s - (1 - threshold) * |s|  in general    (threshold * s would lie ABOVE a negative s and let everything through)

With several positives the lowest-scoring one gives the ceiling: nothing returned beats any positive by the margin.
Never returned: a positive of the row, or of any row with the same query; the query itself; and what equals one of them
after whitespace and case are normalised. Of texts equal in that sense only the first is searched.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from nemo_embed_core.config import UserError
from nemo_embed_core.mine.corpus import Corpus, Encodes, Ranks, encode_corpus, publish, sha256_of, write_atomically
from nemo_embed_core.mine.report import build_report, print_report
from nemo_embed_core.mine.streaming import kernel_is_available
from nemo_embed_core.mine.topk import Exclude, SearchStats, fp32_rows, merge_topk, pair_scores, pick_method, topk_below


class Row(Protocol):
    """One row of data/readers.py."""

    @property
    def query(self) -> str: ...
    @property
    def pos(self) -> list[str]: ...
    @property
    def neg(self) -> list[str]: ...


def ceiling(positive_scores: Any, threshold: float) -> np.ndarray:
    """s - (1 - threshold) * |s|, which is threshold * s for s >= 0; in fp64."""
    s = np.asarray(positive_scores, np.float64)
    return np.where(s >= 0, threshold * s, (2 - threshold) * s)


def normalize(text: str) -> str:
    """Texts that are equal after this are one text for mining: whitespace runs and case do not count."""
    return " ".join(text.split()).casefold()


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which of the passages become negatives; the vocabulary of sentence-transformers' mine_hard_negatives.

    threshold is the paper's and 1 - relative_margin there. Every given limit must hold; "below" is strict.
    """

    num_negatives: int = 4  # per query
    threshold: float | None = 0.95  # score < threshold x positive's (as `ceiling` has it); None: no such limit
    absolute_margin: float | None = None  # score < positive's - absolute_margin
    max_score: float | None = None  # score < max_score
    min_score: float | None = None  # score >= min_score: leaves out what is trivial
    range_min: int = 0  # leave out the best range_min passages, whatever they score
    range_max: int | None = None  # and everything after the best range_max
    sampling: Literal["top", "random"] = "top"  # of those left: the best, or a seeded sample
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise UserError(f"num_negatives={self.num_negatives} must be at least 1")
        if self.range_min < 0 or (self.range_max is not None and self.range_max <= self.range_min):
            raise UserError(f"range_min={self.range_min} must be at least 0 and below range_max={self.range_max}")
        if self.min_score is not None and self.max_score is not None and self.min_score >= self.max_score:
            raise UserError(f"min_score={self.min_score} must be below max_score={self.max_score}")

    @property
    def by_rank(self) -> bool:
        """Ranks count what is above the ceiling too, so the search runs without it and the limits come after."""
        return self.range_min > 0 or self.range_max is not None

    @property
    def num_searched(self) -> int:
        """How many passages per query the search has to return."""
        if self.range_max is not None:
            return self.range_max
        spare = 3 if self.sampling == "random" or self.by_rank else 1  # as many times as sentence-transformers looks at
        return self.range_min + spare * self.num_negatives

    def ceilings(self, lowest: np.ndarray) -> np.ndarray:
        """[Q] fp64: what a negative's score must be below, from each query's lowest-scoring positive."""
        limits = np.full(len(lowest), np.inf)
        if self.threshold is not None:
            limits = np.minimum(limits, ceiling(lowest, self.threshold))
        if self.absolute_margin is not None:
            limits = np.minimum(limits, lowest.astype(np.float64) - self.absolute_margin)
        if self.max_score is not None:
            limits = np.minimum(limits, self.max_score)
        return limits

    def choose(self, scores: np.ndarray, ids: np.ndarray, ceilings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([Q, num_negatives] scores, ids) of what was searched for, best first; -inf and -1 where there are too few."""
        keep = (ids >= 0) & (scores.astype(np.float64) < ceilings[:, None])
        keep[:, : self.range_min] = False
        if self.min_score is not None:
            keep &= scores >= self.min_score
        out_scores = np.full((len(scores), self.num_negatives), -np.inf, np.float32)
        out_ids = np.full((len(scores), self.num_negatives), -1, np.int64)
        for i in range(len(scores)):
            left = np.flatnonzero(keep[i])
            if self.sampling == "random" and len(left) > self.num_negatives:
                # Keyed by the row: the sample of a row does not depend on the other rows or on the number of ranks.
                generator = np.random.Generator(np.random.Philox(key=[self.seed, i]))
                left = np.sort(generator.choice(left, self.num_negatives, replace=False))
            left = left[: self.num_negatives]
            out_scores[i, : len(left)], out_ids[i, : len(left)] = scores[i, left], ids[i, left]
        return out_scores, out_ids


@dataclass
class Pool:
    """Every text that can be a document, numbered: first those that are searched, then their spelling variants.

    A variant (equal after `normalize`) keeps its own embedding, since it may be a positive whose score is needed, but
    it is never searched: the same passage twice among the negatives of a query counts twice in the softmax.
    """

    texts: list[str] = field(default_factory=list)
    num_searched: int = 0
    _of_text: dict[str, int] = field(default_factory=dict)
    _of_key: dict[bytes, int] = field(default_factory=dict)

    @classmethod
    def build(cls, passages: Iterable[str]) -> Pool:
        pool, variants = cls(), []
        for text in passages:
            if text in pool._of_text:
                continue
            key = _key(text)
            if key in pool._of_key:
                pool._of_text[text] = -1
                variants.append(text)
            else:
                pool._of_key[key] = pool._of_text[text] = len(pool.texts)
                pool.texts.append(text)
        pool.num_searched = len(pool.texts)
        for text in variants:
            pool._of_text[text] = len(pool.texts)
            pool.texts.append(text)
        return pool

    def id(self, text: str) -> int:
        """Where the embedding of this very text is."""
        return self._of_text[text]

    def searched_id(self, text: str) -> int | None:
        """The searched document equal to this text after `normalize`, if any."""
        return self._of_key.get(_key(text))


def _key(text: str) -> bytes:
    return hashlib.blake2b(normalize(text).encode(), digest_size=16).digest()


def mine_negatives(
    rows: Iterable[Row],
    embedder: Encodes,
    output: str | Path,
    *,
    passages: Iterable[str] = (),
    selection: Selection | None = None,
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

    Searched are all passages (pos and neg) of the rows and `passages`. Work in progress lies in `<output>.work` (one
    file per shard and per block of queries): a run that was killed continues when it is started again. Output lines:
    {"query", "pos", "neg", "pos_scores", "neg_scores"}, every row kept, also with 0 negatives.
    """
    output, rows, ranks, selection = Path(output), list(rows), ranks or Ranks(), selection or Selection()
    say = log if ranks.rank == 0 else (lambda _: None)
    if not rows:
        raise UserError("there are no rows to mine for")
    pool = Pool.build(_passages(rows, passages))
    say(
        f"{len(rows):,} queries, {pool.num_searched:,} documents to search, "
        f"{len(pool.texts) - pool.num_searched:,} spelling variants set aside"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(output.name + ".work")
    common: dict[str, Any] = {"dtype": dtype, "shard_size": shard_size, "ranks": ranks, "log": say}
    documents = encode_corpus(
        pool.texts, embedder, work / "documents", prompt=document_prompt, max_length=document_max_length,
        name="documents", **common,
    )  # fmt: skip
    queries = encode_corpus(
        [row.query for row in rows], embedder, work / "queries", prompt=prompt, max_length=query_max_length,
        name="queries", **common,
    )  # fmt: skip

    positives = Exclude.from_lists([[pool.id(text) for text in row.pos] for row in rows])
    positive_scores = score_pairs(queries, documents, positives, device)
    lowest = np.minimum.reduceat(positive_scores, positives.indptr[:-1])
    exclude = known_passages(rows, pool)
    stats = SearchStats()
    ceilings = selection.ceilings(lowest)
    found_scores, found_ids = search_blocks(
        queries, documents.part(0, pool.num_searched), np.full(len(rows), np.inf) if selection.by_rank else ceilings,
        min(selection.num_searched, pool.num_searched), exclude,
        work=work, method=method, device=device, block_queries=block_queries, ranks=ranks, stats=stats, log=say,
    )  # fmt: skip
    scores, ids = selection.choose(found_scores, found_ids, ceilings)

    report = build_report(
        positive_scores=positive_scores, lowest=lowest, scores=scores,
        settings={
            "model": embedder.digest, "queries": len(rows), "documents": pool.num_searched,
            "duplicates_removed": len(pool.texts) - pool.num_searched, **asdict(selection),
            "prompt": prompt, "document_prompt": document_prompt,
            "query_max_length": query_max_length, "document_max_length": document_max_length, "dtype": dtype,
            "topk": "csrc" if torch.device(device).type == "cuda" and kernel_is_available() else "torch",
        },
        stats=stats,
    )  # fmt: skip
    if ranks.rank == 0:
        report["suspects"] = suspects(rows, pool, queries, documents, lowest, ceilings, exclude, device)
        lines = io.StringIO()
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
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        write_atomically(output, lines.getvalue().encode())
        report_path = output.with_name(output.name + ".report.json")
        write_atomically(report_path, json.dumps(report, indent=1, ensure_ascii=False).encode())
        print_report(report, say)
        say(f"wrote {output} and {report_path}")
        shutil.rmtree(work / "search", ignore_errors=True)
    ranks.gather(None)
    return report


def suspects(
    rows: list[Row], pool: Pool, queries: Corpus, documents: Corpus, lowest: np.ndarray, ceilings: np.ndarray,
    exclude: Exclude, device: torch.device | str, count: int = 50,
) -> list[dict[str, Any]]:  # fmt: skip
    """For reading: what the ceiling kept out of a sample of rows, best first. Are these unlabelled positives?"""
    sample = np.sort(np.random.default_rng(0).choice(len(rows), min(count, len(rows)), replace=False))
    searched = documents.part(0, pool.num_searched)
    scores, ids = topk_below(
        queries[sample], searched, np.full(len(sample), np.inf), 3, exclude.take(sample), method="fp32", device=device
    )
    found = []
    for i, row_scores, row_ids in zip(sample, scores.tolist(), ids.tolist(), strict=True):
        above = [
            {"text": pool.texts[d], "score": s}
            for s, d in zip(row_scores, row_ids, strict=True)
            if d >= 0 and s >= ceilings[i]
        ]
        if above:
            positive = {"pos": list(rows[i].pos), "lowest_positive_score": float(lowest[i])}
            found.append({"query": rows[i].query, **positive, "above_ceiling": above})
    return found


def _passages(rows: list[Row], passages: Iterable[str]) -> Iterable[str]:
    for i, row in enumerate(rows):
        if not row.pos:
            raise UserError(f"row {i} ({row.query[:60]!r}) has no positive: without one there is no ceiling")
        yield from row.pos
        yield from row.neg
    yield from passages


def known_passages(rows: list[Row], pool: Pool) -> Exclude:
    """Per row the documents equal, after `normalize`, to its query or to a positive of any row with that query."""
    of_query: dict[bytes, set[int]] = {}
    for row in rows:
        known = of_query.setdefault(_key(row.query), set())
        known.update(i for i in map(pool.searched_id, (row.query, *row.pos)) if i is not None)
    return Exclude.from_lists([sorted(of_query[_key(row.query)]) for row in rows])


def score_pairs(queries: Corpus, documents: Corpus, pairs: Exclude, device: torch.device | str) -> np.ndarray:
    """The score of every (query i, document) pair of the CSR, fp32, by the same function as the negatives' scores."""
    of_query = np.repeat(np.arange(len(pairs.indptr) - 1), np.diff(pairs.indptr))
    scores = np.empty(len(of_query), np.float32)
    step = max(1, (1 << 20) // queries.shape[1])
    for start in range(0, len(of_query), step):
        part = slice(start, start + step)
        q = fp32_rows(queries, of_query[part], device)
        d = fp32_rows(documents, pairs.ids[part], device)
        scores[part] = pair_scores(q, d).cpu().numpy()
    return scores


def search_blocks(
    queries: Corpus,
    documents: Corpus,
    ceilings: np.ndarray,
    k: int,
    exclude: Exclude,
    *,
    work: Path,
    method: str,
    device: torch.device | str,
    block_queries: int,
    ranks: Ranks,
    stats: SearchStats,
    log: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray]:
    """topk_below in blocks of queries, each published when it is done; documents split over the ranks, answers merged."""
    digest = _search_digest(work, ceilings, k, exclude, len(documents), block_queries)
    folder = work / "search" / digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    num_queries = len(queries)
    scores = np.full((num_queries, k), -np.inf, np.float32)
    ids = np.full((num_queries, k), -1, np.int64)
    blocks = range(0, num_queries, block_queries)
    first, last = ranks.span(len(documents))
    # Rank 0 says which blocks are there: a block that appears meanwhile must not be skipped by some ranks only.
    done = ranks.gather([_read_block(folder, b // block_queries, digest) for b in blocks] if ranks.rank == 0 else None)[
        0
    ]
    for b, block in zip(blocks, done, strict=True):
        rows = slice(b, min(b + block_queries, num_queries))
        if block is None:
            local = SearchStats()
            part = topk_below(
                queries[rows], documents.part(first, last), ceilings[rows], k,
                exclude.take(np.arange(rows.start, rows.stop)),
                first_id=first, method=method, device=device, stats=local,
            )  # fmt: skip
            gathered = ranks.gather((part[0].numpy(), part[1].numpy(), local))
            merged = merge_topk([(torch.from_numpy(s), torch.from_numpy(i)) for s, i, _ in gathered], k)
            counts = [min(s.num_certified for *_, s in gathered), max(s.num_exhaustive for *_, s in gathered)]
            block = (merged[0].numpy(), merged[1].numpy(), np.array(counts))
            if ranks.rank == 0:
                _publish_block(folder, b // block_queries, digest, block)
            log(f"searched {rows.stop:,} of {num_queries:,} queries")
        scores[rows], ids[rows] = block[0], block[1]
        stats.num_certified += int(block[2][0])
        stats.num_exhaustive += int(block[2][1])
        stats.num_queries += rows.stop - rows.start
    stats.method = pick_method(torch.device(device)) if method == "auto" else method
    return scores, ids


def _search_digest(
    work: Path, ceilings: np.ndarray, k: int, exclude: Exclude, num_documents: int, block_queries: int
) -> str:
    """Names one search: the embeddings (by their sidecars, which hold their sha256) and every argument that matters."""
    digest = hashlib.sha256(f"{k} {num_documents} {block_queries}".encode())
    for sidecar in sorted([*work.glob("documents/*.json"), *work.glob("queries/*.json")]):
        digest.update(sidecar.read_bytes())
    for array in (ceilings, exclude.indptr, exclude.ids):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _publish_block(folder: Path, index: int, digest: str, block: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    data = io.BytesIO()
    np.savez(data, scores=block[0], ids=block[1], counts=block[2])
    publish(folder / f"{index:05d}.npz", data.getvalue(), {"search": digest})


def _read_block(folder: Path, index: int, digest: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    path = folder / f"{index:05d}.npz"
    if not path.with_suffix(".json").exists():
        return None
    sidecar = json.loads(path.with_suffix(".json").read_text())
    if sidecar["search"] != digest or sha256_of(path) != sidecar["sha256"]:
        return None  # damaged: searched again
    with np.load(path, allow_pickle=False) as block:
        return block["scores"], block["ids"], block["counts"]


def _short(score: np.float32) -> float:
    """The shortest decimal that reads back as this fp32."""
    return float(np.format_float_positional(score, unique=True))
