"""The same nine commands under two trees, from the same inputs: every file that they leave must be the same.

    make same BASE=HEAD~3                       python tests/same_behaviour.py BASE

For a change that is meant to change nothing. BASE is a commit of this repository or the folder of another
checkout; the other tree is the one that this file stands in, as it is on disk. Prints every file that
differs, of JSON the fields that do, and ends with code 1 if there are any. Some four minutes.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny import WORDS, write_rows, write_tokenizer

ROOT = Path(__file__).resolve().parents[1]

# Fields of JSON that differ between two runs of one tree, by their names.
VOLATILE = {
    r"_s$|^s$|seconds|_per_s|^time$|^date$|^mfu$": "times, and what is divided by them",
    r"memory|_mb$|_mib$": "what else the process held",
    r"^run$|^pid$|^host$": "drawn anew by every run",
    r"^commit$": "of the tree",
    r"digest$": "of a file that has such fields",
}
_VOLATILE = re.compile("|".join(VOLATILE))
# Files that hold times: pictures of them, TensorBoard's events, when the sources of a store were written.
SKIPPED = (".png", ".tfevents", "sources.json")

SETTINGS = """
model: {vocab_size: 512, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 8,
  num_key_value_heads: 4, head_dim: 16, rope_theta: 500000.0, max_position_embeddings: 512,
  initializer_range: 0.1, rope_scaling: {factor: 8.0, original_max_position_embeddings: 64}}
tokenizer: tokenizer
global_batch_size: 8
steps: 10
precision: fp32
device: cpu
optim: {lr: 1.0e-3, warmup_steps: 2, beta2: 0.98, clip_norm: 0.5}
data: {num_hard_negatives: 2, query_max_length: 48, document_max_length: 48, max_tokens: 512,
  datasets: [{path: train.jsonl, task: find it}]}
checkpoint: {every: 5}
"""
TRAIN = "launch/train.py --config train.yaml --output_dir"
LENGTHS = "--query_max_length 48 --document_max_length 48"
COMMANDS = [  # number of ranks, command line
    (1, f"{TRAIN} r1"),
    (2, f"{TRAIN} r2 --loss.in_batch all --parallel.tp_size 2 --seed 3"),
    (2, f"{TRAIN} r3 --loss.in_batch positives --seed 3 --activation_checkpointing true"),
    (1, f"launch/mine.py --model r1 --data train.jsonl --output mined.jsonl {LENGTHS} "
        "--threshold 0.95 --sweep 0.8 0.99 --formats flagembedding tevatron sentence-transformers automodel"),
    (2, f"launch/mine.py --model r1 r2 --data beir --split test --output pool.jsonl "
        f"--combine mean_rank {LENGTHS}"),
    (1, "launch/merge.py r1 -o e1"),
    (1, "launch/merge.py r1 r2 --weights 0.25 0.75 -o e2 --task find --dtype bf16"),
    (1, "launch/merge.py r2 r3 --method slerp --t 0.3 -o e3 --format compat"),
    (1, "launch/evaluate.py --models r1 e2 bm25 --data beir --output evaluation.json --task find"),
]  # fmt: skip


def write_inputs(folder: Path) -> None:
    write_tokenizer(folder / "tokenizer")
    write_rows(folder / "train.jsonl")
    (folder / "train.yaml").write_text(SETTINGS)
    (folder / "beir/qrels").mkdir(parents=True)
    rng = random.Random(3)
    texts = [f"document {i} " + " ".join(rng.choices(WORDS, k=rng.randint(3, 30))) for i in range(120)]
    corpus = [{"_id": f"d{i}", "title": "T" if i % 3 else "", "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": f"q{i}", "text": texts[i][:25]} for i in range(40)]
    for name, lines in (("corpus", corpus), ("queries", queries)):
        (folder / f"beir/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(40))
    (folder / "beir/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)


def run(tree: Path, folder: Path) -> None:
    """Every command, in the folder, with the code of the tree."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    env = {
        **os.environ,
        **one_thread,
        "PYTHONPATH": str(tree),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for num_ranks, line in COMMANDS:
        launcher, *options = line.split()
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        command = [sys.executable, *(torchrun if num_ranks > 1 else []), str(tree / launcher), *options]
        ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(
                f"{tree}: exit code {ended.returncode} of {line}\n"
                f"{ended.stdout[-2000:]}{ended.stderr[-4000:]}"
            )


def content(path: Path) -> Any:
    """Of JSON the values, of another text the lines, else the bytes."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return json.loads(data)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in data.splitlines()]
    return data.decode().splitlines() if path.suffix in (".md", ".yaml", ".tsv", ".txt") else data


def fields_that_differ(a: Any, b: Any, where: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            if not _VOLATILE.search(key):
                yield from fields_that_differ(a.get(key, ...), b.get(key, ...), f"{where}.{key}".lstrip("."))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from fields_that_differ(x, y, f"{where}[{i}]")
    elif a != b:
        yield where


def differences(a: Path, b: Path) -> list[str]:
    files = [
        {
            str(p.relative_to(folder))
            for p in folder.rglob("*")
            if p.is_file() and not any(s in p.name for s in SKIPPED)
        }
        for folder in (a, b)
    ]
    found = [f"only in {'AB'[name in files[1]]}: {name}" for name in sorted(files[0] ^ files[1])]
    for name in sorted(files[0] & files[1]):
        fields = list(fields_that_differ(content(a / name), content(b / name)))
        if fields:
            found.append(" ".join(["differs:", name, *filter(None, fields[:8]), *["..."][: len(fields) > 8]]))
    return found


def main(base: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tree = Path(base).resolve()
        if not tree.is_dir():
            tree = folder / "base"
            tree.mkdir()
            archive = subprocess.run(["git", "archive", base], cwd=ROOT, check=True, stdout=subprocess.PIPE)
            subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
        for name, code in (("a", tree), ("b", ROOT)):
            # One path for both: files may name it.
            work = folder / "work"
            work.mkdir()
            write_inputs(work)
            run(code, work)
            shutil.move(work, folder / name)
        found = differences(folder / "a", folder / "b")
        num_files = sum(path.is_file() for path in (folder / "b").rglob("*"))
        print("\n".join(found) or f"{num_files} files, all the same")
        sys.exit(bool(found))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
