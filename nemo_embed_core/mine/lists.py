"""topk_below over blocks of queries, resumable; a teacher's lists under several ceilings; teachers joined."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_embed_core.config import Selection
from nemo_embed_core.errors import failpoint
from nemo_embed_core.files.durable import sha256_file
from nemo_embed_core.kernels.pair_scores import pair_scores
from nemo_embed_core.mine.corpus import Corpus, Ranks, publish, read_sidecar
from nemo_embed_core.mine.pool import Exclusions
from nemo_embed_core.mine.progress import Progress
from nemo_embed_core.mine.search.blocks import fp32_rows, resident
from nemo_embed_core.mine.search.engine import SearchStats
from nemo_embed_core.mine.search.exclude import Exclude
from nemo_embed_core.mine.search.topk import merge_topk, pick_method, topk_below
from nemo_embed_core.mine.selection import ceilings_of

MAX_EXCLUDED = 1 << 24  # document ids that are spelled out at once: 128 MiB


@dataclass(kw_only=True)
class TeacherSearch:
    """One teacher's embeddings and how to search them."""

    queries: Corpus
    documents: Corpus  # all of them; the first num_searched are searched
    num_searched: int
    exclude: Exclusions
    work: Path
    method: str = "auto"
    device: torch.device | str = "cpu"
    block_queries: int = 8192
    ranks: Ranks = field(default_factory=Ranks)
    log: Callable[[str], None] = print
    stats: SearchStats = field(default_factory=SearchStats)  # of the first search, over all queries
    num_again: int = 0  # queries that were searched a second time, for a lower ceiling

    def scores(self, pairs: Exclude, rows: np.ndarray | None = None) -> np.ndarray:
        """The score of each pair (query rows[i], document) of the CSR, as negatives are scored."""
        of_query = np.repeat(np.arange(len(pairs.indptr) - 1), np.diff(pairs.indptr))
        of_query = of_query if rows is None else rows[of_query]
        scores = np.empty(len(of_query), np.float32)
        step = max(1, (1 << 20) // self.queries.shape[1])
        for start in range(0, len(of_query), step):
            part = slice(start, start + step)
            q = fp32_rows(self.queries, of_query[part], self.device)
            d = fp32_rows(self.documents, pairs.ids[part], self.device)
            at = torch.arange(len(q), device=q.device)
            scores[part] = pair_scores(q, at, d, at).cpu().numpy()
        return scores

    def top(
        self, ceilings: np.ndarray, k: int, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """topk_below for these query rows (None: all), published block by block; ranks split documents."""
        is_first, rows = rows is None, np.arange(len(self.queries)) if rows is None else rows
        k = min(k, self.num_searched)
        digest = self._digest(ceilings, k, rows)
        folder = self.work / "search" / digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
        scores = np.full((len(rows), k), -np.inf, np.float32)
        ids = np.full((len(rows), k), -1, np.int64)
        ranks, size, stats = self.ranks, self.block_queries, SearchStats()
        starts = range(0, len(rows), size)
        first, last = ranks.span(self.num_searched)
        documents = None
        # Rank 0 says which blocks are there: one that appears meanwhile must be skipped by all ranks or none.
        found = [_read_block(folder, s // size, digest) for s in starts] if ranks.rank == 0 else None
        done = ranks.gather(found)[0]
        progress = Progress("searched", "queries", len(rows), self.log, shown=ranks.rank == 0)
        for start, block in zip(starts, done, strict=True):
            part = slice(start, min(start + size, len(rows)))
            count = part.stop - part.start
            if block is None:
                local = SearchStats()
                if documents is None:
                    documents = resident(self.documents.part(first, last), self.device)
                top = self.below(documents, rows[part], ceilings[part], k, first, self.method, local)
                gathered = ranks.gather((top[0].numpy(), top[1].numpy(), local))
                merged = merge_topk([(torch.from_numpy(s), torch.from_numpy(i)) for s, i, _ in gathered], k)
                num_certified = min(s.num_certified for *_, s in gathered)
                counts = np.array([num_certified, max(s.num_exhaustive for *_, s in gathered)])
                block = (merged[0].numpy(), merged[1].numpy(), counts)
                failpoint("searched", start // size)
                if ranks.rank == 0:
                    _publish_block(folder, start // size, digest, block)
                failpoint("search.published", start // size)
                progress.step(count)
            else:
                progress.skip(count)
            scores[part], ids[part] = block[0], block[1]
            stats.num_certified += int(block[2][0])
            stats.num_exhaustive += int(block[2][1])
        progress.close()
        if is_first:
            stats.num_queries = len(rows)
            stats.method = self.method
            if self.method == "auto":
                stats.method = pick_method(torch.device(self.device), min(len(rows), self.block_queries))
            self.stats = stats
        return scores, ids

    def below(
        self,
        documents: Any,
        rows: np.ndarray,
        ceilings: np.ndarray,
        k: int,
        first: int,
        method: str,
        stats: SearchStats | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """topk_below for these query rows, as many at a time as have MAX_EXCLUDED excluded documents."""
        parts = []
        group = np.cumsum(self.exclude.counts(rows)) // MAX_EXCLUDED
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(group)) + 1):
            what = (self.queries[rows[part]], documents, ceilings[part], k, self.exclude.take(rows[part]))
            parts.append(topk_below(*what, first_id=first, method=method, device=self.device, stats=stats))
        return torch.cat([scores for scores, _ in parts]), torch.cat([ids for _, ids in parts])

    def _digest(self, ceilings: np.ndarray, k: int, rows: np.ndarray) -> str:
        """Names one search: the embeddings (by their sidecars with the sha256) and every other argument."""
        digest = hashlib.sha256(f"{k} {self.num_searched} {self.block_queries}".encode())
        for sidecar in sorted([*self.work.glob("documents/*.json"), *self.work.glob("queries/*.json")]):
            digest.update(sidecar.read_bytes())
        for array in (ceilings, rows, *self.exclude):
            digest.update(array.tobytes())
        return digest.hexdigest()


def _publish_block(
    folder: Path, index: int, digest: str, block: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    data = io.BytesIO()
    np.savez(data, scores=block[0], ids=block[1], counts=block[2])
    publish(folder / f"{index:05d}.npz", data.getvalue(), {"search": digest})


def _read_block(folder: Path, index: int, digest: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    path = folder / f"{index:05d}.npz"
    sidecar = read_sidecar(path)
    if sidecar is None or sidecar.get("search") != digest:
        return None
    if not path.exists() or sha256_file(path) != sidecar.get("sha256"):
        return None  # damaged: searched again
    with np.load(path, allow_pickle=False) as block:
        return block["scores"], block["ids"], block["counts"]


# ------------------------------------------------------------------------------------------ several ceilings


class CandidateLists:
    """One teacher's best documents under ever lower ceilings, exactly, from one search that kept more than k.

    A list has every document between its last score and the ceiling that it was searched under. Cut at a
    lower ceiling it therefore begins with the right documents. It ends too early only where it was full and
    fewer than k are left: such a query is searched again under the lower ceiling.
    """

    def __init__(self, search: TeacherSearch, k: int, width: int):
        self.search, self.k, self.width = search, min(k, search.num_searched), max(k, width)
        self.scores: np.ndarray | None = None  # [Q, width] best first, -inf in free places
        self.ids: np.ndarray = np.empty((0, 0), np.int64)  # -1 in free places, which come last

    def below(self, ceilings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([Q, k] scores, ids) strictly below the ceilings, none of which is above one of an earlier call."""
        if self.scores is None:
            self.scores, self.ids = self.search.top(ceilings, self.width)
        num_above, num_below = self._split(ceilings)
        is_full = self.ids[:, -1] >= 0
        short = np.flatnonzero(is_full & (num_below < self.k))
        if len(short):
            self.scores[short], self.ids[short] = self.search.top(ceilings[short], self.width, short)
            self.search.num_again += len(short)
            num_above, num_below = self._split(ceilings)
        offsets = np.arange(self.k)
        columns = np.minimum(num_above[:, None] + offsets, self.ids.shape[1] - 1)
        exists = offsets < num_below[:, None]
        scores = np.where(exists, np.take_along_axis(self.scores, columns, 1), np.float32(-np.inf))
        return scores, np.where(exists, np.take_along_axis(self.ids, columns, 1), -1)

    def _split(self, ceilings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[Q] each: how many documents of the list are at or above the ceiling, and how many below it."""
        assert self.scores is not None
        found = self.ids >= 0
        is_below = self.scores.astype(np.float64) < ceilings[:, None]
        return (found & ~is_below).sum(1), (found & is_below).sum(1)


# ------------------------------------------------------------------------------------------ several teachers


def find(
    lists: list[CandidateLists], lowest: list[np.ndarray], selection: Selection
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores, ids, below), all [Q, n] with n <= selection.num_searched: `choose` takes negatives from these.

    lists, lowest: per teacher. below: found, and below every teacher's ceiling. Scores: the first teacher's.
    """
    ceilings = [ceilings_of(selection, s) for s in lowest]
    limits = [np.full(len(c), np.inf) if selection.by_rank else c for c in ceilings]
    tops = [one.below(limit) for one, limit in zip(lists, limits, strict=True)]
    if len(lists) == 1:
        scores, ids = tops[0]
        return scores, ids, (ids >= 0) & (scores.astype(np.float64) < ceilings[0][:, None])
    searches = [one.search for one in lists]
    ranks = searches[0].ranks
    rows = np.arange(*ranks.span(len(ceilings[0])))
    part = combine(searches, [ids[rows] for _, ids in tops], [c[rows] for c in ceilings], rows, selection)
    parts = ranks.gather(part)
    scores, ids, below = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return scores, ids, below


def combine(
    searches: list[TeacherSearch],
    tops: list[np.ndarray],
    ceilings: list[np.ndarray],
    rows: np.ndarray,
    selection: Selection,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One list per query out of several teachers' lists: (scores of the first teacher, ids, below), [R, n].

    tops [R, M] per teacher: the ids of its M = combine_depth best documents below its ceiling, best first, -1
    in free places. In a list of m documents they have the ranks 0 .. m - 1, any other document has rank m.

    intersection: the documents that are in every list, so below the ceiling of every teacher.
    mean_rank: the documents that are in some list, and below the ceiling of every teacher.

    Both in the order (mean of the ranks, id), the first n = selection.num_searched of them. With range_min or
    range_max the lists hold the best documents whatever they score, n counts all, `below` says which may go.
    """
    n, num_rows = selection.num_searched, len(rows)
    in_all = selection.combine == "intersection"
    ordered = [_by_mean_rank([top[i] for top in tops], in_all) for i in range(num_rows)]
    scores = np.full((num_rows, n), -np.inf, np.float32)
    ids = np.full((num_rows, n), -1, np.int64)
    below = np.zeros((num_rows, n), bool)
    filled = np.zeros(num_rows, np.int64)
    looked_at = 0
    while True:
        open_rows = [i for i in range(num_rows) if filled[i] < n and len(ordered[i]) > looked_at]
        if not open_rows:
            return scores, ids, below
        # A document that one list lacks is above that teacher's ceiling or further down: its score tells.
        pairs = Exclude.from_lists([ordered[i][looked_at : looked_at + n].tolist() for i in open_rows])
        by_teacher = [search.scores(pairs, rows[open_rows]) for search in searches]
        of_row = np.repeat(np.array(open_rows), np.diff(pairs.indptr))
        passes = np.ones(len(of_row), bool)
        for s, limit in zip(by_teacher, ceilings, strict=True):
            passes &= s.astype(np.float64) < limit[of_row]
        for j in range(len(of_row)):
            i = of_row[j]
            if filled[i] < n and (passes[j] or selection.by_rank):
                at = filled[i]
                scores[i, at], ids[i, at], below[i, at] = by_teacher[0][j], pairs.ids[j], passes[j]
                filled[i] += 1
        looked_at += n


def _by_mean_rank(lists: list[np.ndarray], in_all: bool) -> np.ndarray:
    """The ids of the union (or intersection) of the lists by (sum of ranks, id); -1 is no id."""
    lists = [one[one >= 0] for one in lists]
    ids = np.unique(np.concatenate(lists))
    total, everywhere = np.zeros(len(ids), np.int64), np.ones(len(ids), bool)
    for one in lists:
        rank = np.full(len(ids), len(one), np.int64)
        rank[np.searchsorted(ids, one)] = np.arange(len(one))
        total += rank
        everywhere &= rank < len(one)
    if in_all:
        ids, total = ids[everywhere], total[everywhere]
    return ids[np.argsort(total, kind="stable")]  # ids ascend, so a stable sort breaks ties by the lower one
