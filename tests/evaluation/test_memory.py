"""What evaluation needs of memory does not grow with the texts: 8 bytes for a text, its id, and a piece of
them at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from toy_evaluation import WORDS, write_beir

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS, CHARACTERS = 240, 200_000  # 48 MB
LIMIT = 60  # MiB above what the same evaluation of a few short texts takes

CODE = """
import json, resource, sys
from nemo_embed_core.data import tokenizer
from nemo_embed_core.evaluation import retrieval
from nemo_embed_core.evaluation.run import evaluate
# So that the texts need not be many.
retrieval.PIECE_CHARACTERS, tokenizer.BATCH_CHARACTERS = 1 << 20, 1 << 18
peaks = []
for data in sys.argv[2:]:
    evaluate([sys.argv[1], "bm25"], data, device="cpu")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
print(json.dumps(peaks))
"""


def test_a_corpus_of_long_texts_is_evaluated_in_little_memory(ours, beir, tmp_path):
    words = [word for word in WORDS if word.startswith("w")]
    text = " ".join(words[(7 * i * i + i) % 20] for i in range(CHARACTERS // 3))[:CHARACTERS]
    corpus = [{"_id": f"d{i}", "title": words[i % 20], "text": text} for i in range(DOCUMENTS)]
    queries = [{"_id": f"q{i}", "text": words[i]} for i in range(5)]
    data = write_beir(tmp_path / "long", corpus, queries, [(f"q{i}", f"d{i}", 1) for i in range(5)])
    command = [sys.executable, "-c", CODE, str(ours), str(beir), str(data)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "100.0% truncated" in result.stdout, "every document is longer than the model reads"
    small, large = json.loads(result.stdout.splitlines()[-1])
    assert large - small < LIMIT, f"{large - small} MiB for {DOCUMENTS * CHARACTERS >> 20} MiB of texts"
