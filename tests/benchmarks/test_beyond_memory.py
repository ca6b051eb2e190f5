"""The benchmark of searches over files runs at toy size, prints nothing of a wrong answer, and has a law."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import beyond_memory, ceilings, report

OPTIONS = [
    "--N",
    "3000",
    "--D",
    "32",
    "--Q",
    "520",
    "--k",
    "3",
    "--rows_a_file",
    "700",
    "--nprobe",
    "1",
    "64",
]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Parts in this process, with short stopwatches; results in a folder of the test."""
    (tmp_path / "results").mkdir()
    for path in report.RESULTS.glob("mining-*.jsonl"):
        (tmp_path / "results" / path.name).write_bytes(path.read_bytes())
    for module in (ceilings, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(beyond_memory, "GEMM_S", 0.01)
    monkeypatch.setattr(beyond_memory, "BLOCK", 500)  # no multiple of a file's rows
    parts = {"search": beyond_memory.search_here, "faiss": beyond_memory.faiss_here}
    monkeypatch.setattr(
        beyond_memory,
        "in_a_process",
        lambda part, folder, given: parts[part](folder, beyond_memory.parsed(given)),
    )
    return tmp_path / "results"


def test_a_whole_run_has_its_figures_and_is_put_on_the_page(here: Path) -> None:
    beyond_memory.main([*OPTIONS, "--folder", str(here)])
    (file,) = here.glob("beyond_memory-*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    ours, laws = rows[0], [row for row in rows if row["what"] == "law"]
    assert (ours["certified"], ours["passes"], ours["bytes_read"]) == (520, 1, 3000 * 32 * 2)
    assert ours["shape"] == {"Q": 520, "N": 3000, "D": 32, "k": 3}
    assert sum(ours["parts"].values()) == pytest.approx(ours["seconds"])
    assert ours["floor_gemm_s"] == pytest.approx(2 * 520 * 3000 * 32 / ours["gemm_ops_s"])
    assert {law["measured_at"].split()[0] for law in laws} == {"bf16", "int8"}
    for law in laws:
        # 8 GPUs, 1e6 queries, 1e9 documents of 4,096 columns and two bytes each
        assert law["products_s"] == pytest.approx(1e6 * 1e9 * 4096 * 2 / 8 / law["ops_a_second"])
        assert law["disk_s"] == pytest.approx(law["passes"] * 1e9 * 4096 * 2 / 8 / 5e9)
        assert law["predicted_s"] == max(law["products_s"], law["disk_s"], law["bus_s"])
    page = report.page()
    assert (
        "## beyond_memory" in page
        and "certified for 520 of 520" in page
        and "Predicted, not measured" in page
    )
    assert not list(here.glob("tmp*")), "the vectors are gone"


def test_wrong_answers_are_not_printed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = beyond_memory.search_here

    def wrong(folder: Path, options: object) -> dict:
        figures = found(folder, options)
        ids = np.load(folder / "ids.npy")
        ids[1, 2] = (ids[1, 2] + 1) % 3000
        np.save(folder / "ids.npy", ids)
        return figures

    monkeypatch.setattr(
        beyond_memory, "in_a_process", lambda part, folder, given: wrong(folder, beyond_memory.parsed(given))
    )
    with pytest.raises(SystemExit, match="1 of 4 answers are not those of fp64"):
        beyond_memory.main([*OPTIONS, "--folder", str(here)])


def test_documents_are_the_blocks_in_their_order_and_queries_are_near_some(tmp_path: Path) -> None:
    options = beyond_memory.parsed(OPTIONS)
    beyond_memory.write_data(tmp_path, options)
    files = [np.load(path) for path in sorted(tmp_path.glob("documents-*.npy"))]
    assert [len(rows) for rows in files] == [700, 700, 700, 700, 200]
    made = np.concatenate([rows.numpy() for _, rows in beyond_memory.made_blocks(3000, 32)])
    assert np.array_equal(np.concatenate(files), made)
    best = (np.load(tmp_path / "queries.npy") @ made.T.astype(np.float32)).max(1)
    assert best.min() > 0.5
