"""The whole path on data that is on every machine: train, mine, retrain, merge, evaluate. `make demo` runs
it.

    python launch/demo.py --output runs/demo

Texts: docstrings of the installed Python packages (query: the summary line, passage: the rest), split by
module. Every stage is one of the public launchers, printed as the command that it is, so each can be run
again by itself.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from nemo_embed_core.files.strict_json import read_object

ROOT = Path(__file__).resolve().parent.parent
TASK = "Find the rest of the docstring"


def threads_per_rank() -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}


def run(command: list[str], env: dict[str, str] | None = None) -> None:
    """Print and run one launcher; its failure ends the demo."""
    shown = [part.replace(sys.executable, "python") for part in command]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, env=os.environ | (env or {})).returncode
    if code:
        raise SystemExit(f"demo: the command above failed with exit code {code}")
    print(f"  ({time.monotonic() - start:.0f} s)", flush=True)


def train(config: str, output: Path, *options: str) -> None:
    """torchrun with tp=2 and sequence parallelism: on two GPUs, or on a CPU whose cores both ranks share; one
    GPU: tp=1."""
    import torch

    ranks = "1" if torch.cuda.device_count() == 1 else "2"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    command = [*torchrun, "launch/train.py", "--config", config, "--parallel.tp_size", ranks]
    run([*command, "--output_dir", str(output), *options], threads_per_rank())


def prepare_data(folder: Path) -> None:
    from nemo_embed_core.config import DatasetConfig
    from nemo_embed_core.data.docstrings import write_demo_data
    from nemo_embed_core.data.readers import read_rows
    from nemo_embed_core.data.tokenizer import train_sentencepiece

    counts = write_demo_data(folder)
    # Stage 2 gets rows that stage 1 has not seen, as in the paper: on rows seen before it lost on dev
    # (docs/log.md).
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
    import matplotlib

    from nemo_embed_core.mine.report import plot_report

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name in ("stage1", "stage2", "stage2-seed2"):
        metrics = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
        axes.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="training loss")
    axes.legend()
    figure.savefig(output / "loss.png", dpi=120, bbox_inches="tight")
    plot_report(read_object(output / "mined.jsonl.report.json"), str(output / "mined-scores.png"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="replaced if it exists")
    args = parser.parse_args()
    output, start = args.output.resolve(), time.monotonic()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    data, python = output / "data", sys.executable

    prepare_data(data)
    common = ("--tokenizer", str(data / "tokenizer"), "--data.cache_dir", str(output / "cache"))
    pairs = ("--data.datasets", json.dumps([{"path": str(data / "stage1.jsonl"), "task": TASK}]))
    mined = ("--data.datasets", json.dumps([{"path": str(output / "mined.jsonl"), "task": TASK}]))
    train("configs/train-demo-stage1.yaml", output / "untrained", *common, *pairs, "--steps", "0")
    train("configs/train-demo-stage1.yaml", output / "stage1", *common, *pairs)
    run(
        [
            *(
                python,
                "launch/mine.py",
                "--config",
                "configs/mine-demo.yaml",
                "--threshold",
                "0.95",
                "--task",
                TASK,
            ),
            *("--model", str(output / "stage1"), "--data", str(data / "stage2.jsonl")),
            *("--output", str(output / "mined.jsonl")),
        ]
    )
    for name, seed in (("stage2", "1"), ("stage2-seed2", "2")):
        start_from = ("--init_from", str(output / "stage1"), "--seed", seed)
        train("configs/train-demo-stage2.yaml", output / name, *common, *mined, *start_from)
    merged = [str(output / "stage2"), str(output / "stage2-seed2"), "-o", str(output / "merged")]
    run([python, "launch/merge.py", *merged])
    models = [str(output / name) for name in ("untrained", "stage1", "stage2", "stage2-seed2", "merged")]
    run(
        [
            *(
                python,
                "launch/evaluate.py",
                "--config",
                "configs/evaluate-demo.yaml",
                "--data",
                str(data / "test"),
            ),
            *("--output", str(output / "evaluation.json"), "--models", *models, "bm25"),
        ]
    )

    scores = read_object(output / "evaluation.json")
    report = {Path(name).name: values for name, values in scores.items()}
    plot(output)
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{'held-out docstrings':22}{'nDCG@10':>9}{'recall@10':>11}{'MRR@10':>9}")
    for name, values in report.items():
        print(f"{name:22}{values['ndcg_at_10']:9.4f}{values['recall_at_10']:11.4f}{values['mrr_at_10']:9.4f}")
    print(
        f"\n{output}: report.json, loss.png, mined-scores.png, merged/ (Hugging Face folder); "
        f"{time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
