"""Documents in files, read in blocks: the answer of brute force in one pass, and no page of them stays."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_embed_core.errors import UserError
from nemo_embed_core.files.page_cache import is_cached
from nemo_embed_core.mine.corpus import Corpus
from nemo_embed_core.mine.search import buffers, candidates, engine, gpu_filter, stored, topk
from nemo_embed_core.mine.search.engine import SearchStats
from nemo_embed_core.mine.search.exclude import Exclude
from nemo_embed_core.mine.search.stored import StoredRows
from nemo_embed_core.mine.search.topk import merge_topk, topk_below

CPU = torch.device("cpu")
spec = importlib.util.spec_from_file_location("mine_topk_cases", Path(__file__).with_name("test_topk.py"))
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)


def write(folder: Path, rows: np.ndarray, *sizes: int) -> list[Path]:
    """Files of these many rows, and one of the rest."""
    ends = np.cumsum([0, *sizes]).tolist()
    paths = []
    for i, (a, b) in enumerate(zip(ends, [*ends[1:], len(rows)], strict=True)):
        paths.append(folder / f"{i}.npy")
        np.save(paths[-1], rows[a:b])
    return paths


@pytest.mark.parametrize("way", ["fp32", "int8", "bf16 of a GPU", "int8 of a GPU"])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_one_pass_over_files_is_brute_force(kind, way, tmp_path, monkeypatch):
    """Blocks of 40 over files of 7, 150 and 176 rows: k above a block, ragged ends, parts of two files."""
    method = way.split()[0]
    monkeypatch.setattr(buffers, "SCORED", 50)
    if "GPU" in way:  # by the references of its kernels
        monkeypatch.setattr(engine, "FILTERING", {"cpu"})
    for seed, k, dtype in ((0, 5, np.float16), (1, 50, np.float32)):
        queries, documents, ceilings, excluded = cases.make_case(kind, 9, 333, 48, seed)
        with np.errstate(over="ignore"):
            documents = documents.astype(dtype)
        want = cases.brute_force(queries, documents.astype(np.float32), ceilings, k, excluded)
        files = StoredRows.open(write(tmp_path, documents, 7, 150))
        stats = SearchStats()
        scores, ids = topk_below(
            queries, files, ceilings, k, Exclude.from_lists(excluded), method=method, block_documents=40,
            block_queries=4, tile_queries=3, stats=stats,
        )  # fmt: skip
        np.testing.assert_array_equal(ids.numpy(), want[1])
        np.testing.assert_array_equal(scores.numpy(), want[0])
        in_memory = topk_below(queries, documents, ceilings, k, Exclude.from_lists(excluded), method="fp32")
        assert torch.equal(in_memory[0], scores) and torch.equal(in_memory[1], ids)
        if "GPU" not in way:  # three blocks of queries, one pass each, and everything is certified
            assert (files.bytes_read, stats.num_certified) == (3 * documents.nbytes, 9)


def test_a_gpu_passes_once_over_usual_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "FILTERING", {"cpu"})
    queries, documents, ceilings, _ = cases.make_case("random", 20, 900, 64, 3)
    files = StoredRows.open(write(tmp_path, documents, 500))
    for method in ("bf16", "int8"):
        stats = SearchStats()
        ids = topk_below(queries, files, ceilings, 4, method=method, block_documents=250, stats=stats)[1]
        assert np.array_equal(ids.numpy(), cases.brute_force(queries, documents, ceilings, 4)[1])
        assert stats.num_certified == 20
    assert files.bytes_read == 2 * documents.nbytes
    # Lists without places lose candidates: those queries take another pass, and are right.
    monkeypatch.setattr(gpu_filter, "LIST", -60)
    ids = topk_below(queries, files, ceilings, 4, method="bf16", block_documents=100)[1]
    assert np.array_equal(ids.numpy(), cases.brute_force(queries, documents, ceilings, 4)[1])
    assert files.bytes_read == 4 * documents.nbytes


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_ranks_that_read_their_own_parts_have_the_answer_of_one(num_ranks, tmp_path):
    queries, documents, ceilings, excluded = cases.make_case("ties", 6, 203, 16, 2)
    files = StoredRows.open(write(tmp_path, documents, 60, 60))
    exclude, parts = Exclude.from_lists(excluded), []
    for rank in range(num_ranks):
        a, b = 203 * rank // num_ranks, 203 * (rank + 1) // num_ranks
        part = files.part(a, b).part(0, b - a)
        parts.append(topk_below(queries, part, ceilings, 8, exclude, first_id=a, block_documents=32))
    scores, ids = merge_topk(parts, 8)
    want = cases.brute_force(queries, documents, ceilings, 8, excluded)
    assert np.array_equal(ids.numpy(), want[1]) and np.array_equal(scores.numpy(), want[0])


def test_maps_and_corpora_larger_than_memory_are_read(tmp_path, monkeypatch):
    """Decided by all files, as other ranks of the machine have the rest; a slice of a map keeps its place."""
    queries, documents, ceilings, _ = cases.make_case("random", 4, 120, 16, 5)
    maps = [np.load(path, mmap_mode="r") for path in write(tmp_path, documents, 70)]
    corpus, read = Corpus(maps), []
    real = StoredRows.blocks
    monkeypatch.setattr(StoredRows, "blocks", lambda self, *a: read.append(len(self)) or real(self, *a))
    for available, times in ((2 * documents.nbytes, 0), (2 * documents.nbytes - 1, 2)):
        monkeypatch.setattr(stored, "available_memory", lambda available=available: available)
        monkeypatch.setattr(topk, "available_memory", lambda available=available: available)
        read.clear()
        for rows, want in ((corpus, documents), (corpus.part(30, 101), documents[30:101])):
            ids = topk_below(queries, rows, ceilings, 3, block_documents=50)[1]
            assert np.array_equal(ids.numpy(), cases.brute_force(queries, want, ceilings, 3)[1])
        assert read == [120, 71][:times]
    monkeypatch.setattr(stored, "available_memory", lambda: 0)
    part = maps[0][20:]
    ids = topk_below(queries, part, ceilings, 3, block_documents=50)[1]
    assert read[-1] == 50 and np.array_equal(ids.numpy(), cases.brute_force(queries, part, ceilings, 3)[1])
    assert stored.beyond_memory(documents) is documents, "an array is in memory already"


def test_a_block_of_queries_is_as_large_as_memory_allows(tmp_path, monkeypatch):
    queries, documents, ceilings, _ = cases.make_case("random", 10, 50, 16, 0)
    files = StoredRows.open(write(tmp_path, documents))
    a_query = 16 * 3 + 5 * 16 + 256
    assert topk.queries_at_once(3, 16, CPU, 2 * 7 * a_query) == 7
    for available, passes in ((2 * 10 * a_query, 1), (2 * 3 * a_query, 4), (1, 10)):
        monkeypatch.setattr(topk, "available_memory", lambda available=available: available)
        before = files.bytes_read
        topk_below(queries, files, ceilings, 3)
        assert files.bytes_read - before == passes * documents.nbytes


def resident_file_pages() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


def test_pages_of_the_files_are_neither_resident_nor_cached_behind_the_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "BEHIND", 1 << 20)
    paths = write(tmp_path, np.ones((65537, 256), np.float16), 32768, 32768)  # 16 MiB, and one row
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with paths.pop().open("rb") as file:  # asking may bring it back
        if is_cached(file.fileno()):
            pytest.skip("this file system keeps its files in the page cache")
    paths[1].read_bytes()  # was there before, so it stays
    before, total = resident_file_pages(), 0.0
    for _, rows in StoredRows.open(paths).blocks(4096, CPU):
        total += float(rows.float().sum())
    assert total == 65536 * 256
    assert resident_file_pages() - before < 16 << 20  # libraries, of which 4 MiB come at first use
    for path, want in zip(paths, (False, True), strict=True):
        with path.open("rb") as file:
            assert is_cached(file.fileno()) == want


def test_files_that_are_not_one_array_are_refused_by_name(tmp_path):
    rows = np.ones((30, 8), np.float16)
    for other, words in (
        (rows[:, :7], "1.npy: float16 [30, 7] is not [N, 8]"),
        (rows.astype(np.float32), "1.npy is float32, and"),
        (np.asfortranarray(rows), "C order"),
    ):
        paths = [tmp_path / f"{i}.npy" for i in range(2)]
        for path, array in zip(paths, (rows, other), strict=True):
            np.save(path, array)
        with pytest.raises(UserError) as error:
            StoredRows.open(paths)
        assert words in str(error.value)


def test_a_file_that_is_cut_or_gone_while_it_is_read_is_named(tmp_path):
    paths = write(tmp_path, np.ones((300, 8), np.float16), 100)
    files = StoredRows.open(paths)
    size = paths[1].stat().st_size
    os.truncate(paths[1], size - 16)
    with pytest.raises(UserError, match=rf"1.npy ended at byte {size - 16:,}"):
        topk_below(np.ones((2, 8), np.float32), files, [np.inf, np.inf], 3, block_documents=64)
    paths[1].unlink()
    with pytest.raises(UserError, match=r"1.npy cannot be read: No such file"):
        list(files.blocks(64, CPU))
    blocks = files.blocks(64, CPU)
    assert next(blocks)[0] == 0
    blocks.close()  # who stops early leaves no thread behind


def test_a_rank_drops_the_pages_of_its_own_part_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "BEHIND", 1 << 20)
    (path,) = write(tmp_path, np.ones((32768, 256), np.float16))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(file.fileno(), 1 << 20, 0)  # another rank's
        for _ in StoredRows.open([path]).part(16384, 32000).blocks(4096, CPU):
            pass
        assert os.preadv(file.fileno(), [bytearray(1)], 1 << 19, os.RWF_NOWAIT) == 1


def test_the_floor_of_a_block_is_of_lower_bounds():
    """Upper bounds 10 and 9, each 6 above its lower one: the second may be the best."""
    buffer = buffers.ScoredBuffer(1, 1, 4, torch.tensor([torch.inf]))
    keys, narrow = torch.tensor([[10.0, 9.0, 3.0]]), torch.tensor([[3.0]])
    rows, columns, _ = buffer.best_of(keys, torch.tensor([0]), narrow)
    assert (rows.tolist(), columns.tolist()) == ([0, 0], [0, 1])


def test_a_gpu_looks_again_where_the_first_block_had_more_candidates_than_places(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "FILTERING", {"cpu"})
    monkeypatch.setitem(candidates.SLACK, "int8", 0)  # as many places as are asked for
    queries, documents, ceilings, _ = cases.make_case("close", 20, 900, 64, 3)
    files, stats = StoredRows.open(write(tmp_path, documents, 500)), SearchStats()
    ids = topk_below(queries, files, ceilings, 4, method="int8", block_documents=300, stats=stats)[1]
    assert stats.num_certified < 20
    assert np.array_equal(ids.numpy(), cases.brute_force(queries, documents, ceilings, 4)[1])
