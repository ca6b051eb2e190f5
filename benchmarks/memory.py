"""Peak memory of prepare, mine and evaluate on long documents, beside the same command on eight short ones.

    python -m benchmarks.memory [--documents 20000] [--bytes 100000] [--max_length 64] [--only mine] [--folder
    DIR]

Every document is another text, and every one has a query that judges it. "above" is the peak resident memory
of the launcher's process less that of the run on eight documents, so less what Python and the imports take;
all of a model of 0.1 M parameters is in both. inspect is prepare with --inspect true. Needs about twice
documents x bytes of disk, in --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nemo_embed_core.data.tokenizer import train_sentencepiece

ROOT = Path(__file__).resolve().parents[1]
VERBS = ("prepare", "inspect", "mine", "evaluate")


def write_beir(folder: Path, num_documents: int, num_bytes: int) -> None:
    """corpus.jsonl of num_documents texts of num_bytes each, a query for each, judged in the splits train and
    test."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioumnrstlkdpbg", k=rng.randint(2, 9))) for _ in range(3000)]
    pool = " ".join(rng.choices(words, k=2 * num_bytes // 5 + 1000))
    (folder / "qrels").mkdir(parents=True)
    with open(folder / "corpus.jsonl", "w") as corpus, open(folder / "queries.jsonl", "w") as queries:
        for i in range(num_documents):
            start = rng.randrange(max(1, len(pool) - num_bytes))
            name = f"document {i} {rng.choice(words)} {rng.choice(words)} "
            corpus.write(
                json.dumps({"_id": f"d{i}", "text": name + pool[start : start + num_bytes - len(name)]})
                + "\n"
            )
            queries.write(json.dumps({"_id": f"q{i}", "text": name}) + "\n")
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(num_documents))]
    for split in ("train", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def peak_bytes(command: list[str], folder: Path) -> tuple[int, float]:
    """(peak resident memory, seconds) of a launcher that must succeed."""
    begin = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(
            f"{' '.join(command)} ended with {status}:\n{(folder / 'output.txt').read_text()[-3000:]}"
        )
    return usage.ru_maxrss * 1024, time.perf_counter() - begin


def commands(data: Path, folder: Path, max_length: int) -> dict[str, list[str]]:
    launch, model = ROOT / "launch", str(folder / "model")
    lengths = [
        "--query_max_length",
        str(max_length),
        "--document_max_length",
        str(max_length),
        "--device",
        "cpu",
    ]
    prepare = [
        str(launch / "prepare.py"), "--tokenizer", str(folder / "tokenizer"), "--data.datasets",
        json.dumps([{"path": str(data)}]), "--data.cache_dir", str(data / "cache"),
        "--data.query_max_length", str(max_length), "--data.document_max_length", str(max_length),
    ]  # fmt: skip
    return {
        "prepare": prepare,
        "inspect": [*prepare, "--inspect", "true", "--output", str(data / "report.json")],
        "mine": [
            str(launch / "mine.py"), "--model", model, "--data", str(data), "--output",
            str(data / "mined.jsonl"), *lengths,
        ],
        "evaluate": [str(launch / "evaluate.py"), "--models", model, "--data", str(data), *lengths],
    }  # fmt: skip


def write_model(folder: Path) -> None:
    """A checkpoint of random weights, by a run of no steps."""
    model = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    shape = [word for key, value in model.items() for word in (f"--model.{key}", str(value))]
    peak_bytes(
        [
            str(ROOT / "launch" / "train.py"), "--steps", "0", "--global_batch_size", "2", "--device", "cpu",
            "--tokenizer", str(folder / "tokenizer"), "--output_dir", str(folder / "model"),
            "--loss.in_batch", "positives", "--data.datasets", json.dumps([{"path": str(folder / "few")}]),
            "--data.cache_dir", str(folder / "cache"), *shape,
        ],
        folder,
    )  # fmt: skip


def measure(
    folder: Path, num_documents: int, num_bytes: int, max_length: int, verbs: tuple[str, ...]
) -> dict[str, int]:
    """{verb: bytes above}, printed as they come."""
    write_beir(folder / "few", 8, 400)
    train_sentencepiece([(folder / "few" / "corpus.jsonl").read_text()], 600, folder / "tokenizer")
    if set(verbs) - {"prepare", "inspect"}:
        write_model(folder)
    write_beir(folder / "many", num_documents, num_bytes)
    text = num_documents * num_bytes
    print(
        f"{num_documents:,} documents of {num_bytes:,} bytes ({text / 2**20:,.0f} MiB of text), "
        f"{max_length} tokens kept"
    )
    above = {}
    for verb in verbs:
        few, _ = peak_bytes(commands(folder / "few", folder, max_length)[verb], folder)
        many, seconds = peak_bytes(commands(folder / "many", folder, max_length)[verb], folder)
        above[verb] = many - few
        more, least = above[verb] / 2**20, few / 2**20
        print(
            f"{verb:9} {more:8,.0f} MiB above the {least:,.0f} MiB of eight documents, {seconds:,.0f} s",
            flush=True,
        )
    return above


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--bytes", type=int, default=100_000, help="of each document")
    parser.add_argument("--max_length", type=int, default=64, help="tokens kept of each text")
    parser.add_argument("--only", choices=VERBS, action="append", help="again for several; all of them")
    parser.add_argument("--folder", help="for the texts; a new temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(
            Path(folder), options.documents, options.bytes, options.max_length, tuple(options.only or VERBS)
        )


if __name__ == "__main__":
    main()
