"""Our trainer beside sentence-transformers' on the same rows, model, steps and batch, interleaved.

    python -m benchmarks.trainers --shape toy --seeds 1 2 3 4 5
    python -m benchmarks.trainers --shape 30m --rows 256 --batch 32 --length 512 --seeds 1 2
    python -m benchmarks.trainers --base runs/smollm2-1 --rows 2048 --seeds 1 2 3 [--same_order]

Rows are docstrings of the installed packages (launch/demo.py): the summary line with an instruction, and the
rest, cut at --length tokens. One pass, InfoNCE with the other rows' documents, fp32 on a CPU, AdamW, the same
schedule, and the same weights at the start: random ones of a shape, after so few steps of use for speed
alone, or those of --base (python -m nemo_embed_core.demo.pretrained). Every run is a process of its own. Its
seconds are those of tokenising and of all steps, without imports, loading and saving; tokens are useful ones,
without padding. Then each model is scored on held-out docstrings: nDCG@10 with an interval for other seeds
and other queries. Each side draws its own order of the rows, or both have ours (--same_order).
Needs accelerate, which sentence-transformers' trainer asks for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nemo_embed_core.config import DataConfig, DatasetConfig, ModelConfig, TrainConfig
from nemo_embed_core.train.schedule import learning_rate

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TASK = "Find the rest of the docstring"
TEMPERATURE = 0.05
SHAPES = {  # vocabulary of the sentencepiece model that is trained on the rows: 8,192
    "toy": ModelConfig(
        vocab_size=8192, hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=512,
    ),
    "30m": ModelConfig(
        vocab_size=49152, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512,
    ),
}  # fmt: skip
SIDES = ("ours", "sentence-transformers")


def config_of(args: argparse.Namespace, output: Path, seed: int, steps: int) -> TrainConfig:
    folder = Path(args.folder)
    data = DataConfig(
        datasets=[DatasetConfig(path=str(folder / "pairs.jsonl"), task=TASK)],
        cache_dir=str(output / "cache"), num_hard_negatives=0, query_max_length=args.length,
        document_max_length=args.length, max_tokens=1 << 20,
    )  # fmt: skip
    if steps or args.base:
        start: dict[str, Any] = {"init_from": str(folder / "base") if steps else args.base}
    else:
        start = {"model": SHAPES[args.shape], "tokenizer": str(folder / "tokenizer")}
    values = {
        "output_dir": str(output / "run"), "steps": steps, "global_batch_size": args.batch, "seed": seed,
        "data": data, "device": "cpu", "precision": "fp32", "log_every": 1000, **start,
        "loss": {"temperature": TEMPERATURE, "in_batch": "positives"},
        "optim": {"lr": args.lr, "warmup_steps": max(1, steps // 10)}, "checkpoint": {"every": 100000},
    }  # fmt: skip
    return TrainConfig.from_dict(values)


# ------------------------------------------------------------------------------------------ a run of either


def ours(args: argparse.Namespace, output: Path, seed: int) -> dict[str, Any]:
    from nemo_embed_core.data.build import open_store
    from nemo_embed_core.data.tokenizer import load_tokenizer
    from nemo_embed_core.parallel.mesh import distributed
    from nemo_embed_core.train.preflight import prepare
    from nemo_embed_core.train.trainer import Trainer

    config = config_of(args, output, seed, args.rows // args.batch)
    tokenizer = load_tokenizer(config.tokenizer or config.init_from)
    begin, cpu = time.perf_counter(), time.process_time()
    store = open_store(config.data, tokenizer, log=lambda line: None)
    tokenised, cpu = time.perf_counter() - begin, time.process_time() - cpu
    tokens = sum(len(store.query_tokens(row)) for row in range(len(store)))
    tokens += sum(
        len(store.document_tokens(int(store.positive_ids[i]))) for i in range(len(store.positive_ids))
    )
    prepared = prepare(config)
    clock: dict[str, float] = {"forward and backward": 0.0, "last": 0.0}
    with distributed(config.parallel, config.device, prepared.model) as mesh:
        trainer = Trainer(config, mesh, prepared, log=lambda line: None)
        order = [trainer.sampler.rows(i).tolist() for i in range(args.rows // args.batch)]
        step, inner = trainer.train_step, trainer.engine.forward_backward

        def timed_step() -> Any:
            done = step()
            clock["last"], clock["cpu"] = time.perf_counter(), time.process_time()
            return done

        def timed(*given: Any) -> Any:
            start = time.perf_counter()
            found = inner(*given)
            clock["forward and backward"] += time.perf_counter() - start
            return found

        trainer.train_step, trainer.engine.forward_backward = timed_step, timed  # type: ignore[method-assign]
        begin, cpu = time.perf_counter(), cpu - time.process_time()
        trainer.run()
    stepped = clock["last"] - begin
    parts = {"tokenising": tokenised, "forward and backward": clock["forward and backward"]}
    return {
        "model": str(output / "run"), "seconds": tokenised + stepped, "cpu": cpu + clock["cpu"],
        "tokens": tokens, "padding": 0.0, "order": order,
        "parts": {**parts, "the rest of the steps": stepped - clock["forward and backward"]},
    }  # fmt: skip


def peer_model(folder: Path) -> SentenceTransformer:
    """With fp32 weights: by itself it keeps and trains them in the folder's dtype, which is bf16."""
    from sentence_transformers import SentenceTransformer

    options: dict[str, Any] = {"dtype": torch.float32}
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs=options)


def sentence_transformers(args: argparse.Namespace, output: Path, seed: int) -> dict[str, Any]:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    rows = [json.loads(line) for line in (Path(args.folder) / "pairs.jsonl").read_text().splitlines()]
    prompt = f"Instruct: {TASK}\nQuery: "
    data = [{"anchor": prompt + row["query"], "positive": row["pos"][0]} for row in rows]
    model = peer_model(Path(args.folder) / "base")
    model.max_seq_length = args.length
    steps = args.rows // args.batch
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output / "trainer"), num_train_epochs=1, per_device_train_batch_size=args.batch,
        learning_rate=args.lr, weight_decay=0.01, max_grad_norm=1.0, seed=seed, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True,
        logging_steps=100000, dataloader_drop_last=True, dataloader_pin_memory=False,
    )  # fmt: skip
    if args.same_order:
        order = json.loads((Path(args.folder) / f"ours-{seed}.json").read_text())["order"]
        arguments.batch_sampler = lambda dataset, **options: order
    loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(data), loss=loss
    )
    clock = {"tokenising": 0.0, "padded": 0.0, "useful": 0.0, "forward": 0.0, "backward": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            found = function(*given, **named)
            clock[name] += time.perf_counter() - start
            return found

        return inner

    # Its own schedule begins with a step at a rate of 0, where ours begins with one at lr / warmup_steps.
    optim = config_of(args, output, seed, steps).optim
    trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: learning_rate(step, steps, optim) / optim.lr
    )
    # Of the class: the trainer reads other things of its collator.
    kind = type(trainer.data_collator)
    collate = timed("tokenising", kind.__call__)

    def counted(self: Any, features: Any) -> Any:
        batch = collate(self, features)
        for name, mask in batch.items():
            if name.endswith("attention_mask"):
                clock["padded"] += mask.numel()
                clock["useful"] += float(mask.sum())
        return batch

    kind.__call__ = counted
    trainer.compute_loss = timed("forward", trainer.compute_loss)  # type: ignore[method-assign]
    trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
    begin, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    model.save_pretrained(str(output / "model"))
    parts = {"tokenising": clock["tokenising"], "forward and backward": clock["forward"] + clock["backward"]}
    return {
        "model": str(output / "model"), "seconds": seconds, "cpu": cpu,
        "tokens": int(clock["useful"]), "padding": 1 - clock["useful"] / clock["padded"],
        "parts": {**parts, "the rest of the steps": seconds - sum(parts.values())},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ both


def prepare_folder(args: argparse.Namespace) -> None:
    """pairs.jsonl, test/, tokenizer/ and base/, the weights that both start from."""
    from nemo_embed_core.data.tokenizer import train_sentencepiece
    from nemo_embed_core.demo.docstrings import write_demo_data

    folder = Path(args.folder)
    if (folder / "base" / "config.json").is_file():
        raise SystemExit(f"{folder} is of another run: choose another --folder")
    write_demo_data(folder, num_test_queries=args.queries)
    seen: set[str] = set()
    pairs = []
    for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["pos"][0] not in seen:  # each document once: no batch has a false negative
            seen.add(row["pos"][0])
            pairs.append({**row, "pos": row["pos"][:1]})
    if len(pairs) < args.rows:
        raise SystemExit(f"--rows {args.rows}: the installed packages give {len(pairs)}")
    np.random.default_rng(0).shuffle(pairs)  # type: ignore[arg-type]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs[: args.rows])
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    if not args.base:
        texts = (text for row in pairs for text in (row["query"], *row["pos"]))
        train_sentencepiece(texts, 8192, folder / "tokenizer")
    from nemo_embed_core.merge.merge import merge
    from nemo_embed_core.parallel.mesh import distributed
    from nemo_embed_core.train.preflight import prepare
    from nemo_embed_core.train.trainer import Trainer

    config = config_of(args, folder / "start", 0, 0)
    prepared = prepare(config)
    with distributed(config.parallel, config.device, prepared.model) as mesh:
        Trainer(config, mesh, prepared, log=lambda line: None).run()
    merge([str(folder / "start" / "run")], str(folder / "base"))


def worker(args: argparse.Namespace) -> None:
    """One run of one side, or the preparation, in a process of its own; a line of JSON in --result."""
    side, seed = args.worker
    if side == "prepare":
        prepare_folder(args)
        return
    output = Path(args.folder) / f"{side}-{seed}"
    found = (ours if side == "ours" else sentence_transformers)(args, output, int(seed))
    (Path(args.folder) / f"{side}-{seed}.json").write_text(json.dumps(found))


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--base", default="", help="a folder to begin with, not random weights")
    parser.add_argument("--rows", type=int, default=4096, help="of one pass; a multiple of --batch")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--same_order", action="store_true", help="give the peer our batches")
    parser.add_argument("--queries", type=int, default=1000, help="of the held-out docstrings")
    parser.add_argument("--folder", default="runs/trainers", help="of all that it makes; must be new")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    if args.rows % args.batch:
        parser.error(f"--rows {args.rows} is no multiple of --batch {args.batch}")

    def start(*names: str) -> None:
        command = [sys.executable, "-m", "benchmarks.trainers", *sys.argv[1:], "--worker", *names]
        result = subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        if result.returncode:
            raise SystemExit(f"{' '.join(names)} ended with code {result.returncode}")

    start("prepare", "0")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for i, seed in enumerate(args.seeds):
        for side in SIDES if args.same_order or i % 2 == 0 else SIDES[::-1]:
            start(side, str(seed))
            run = json.loads((Path(args.folder) / f"{side}-{seed}.json").read_text())
            found[side].append(run)
            rate, parts = run["tokens"] / run["seconds"], run["parts"].items()
            said = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts)
            said += f"; {run['cpu']:.1f} s of CPU"
            print(f"seed {seed} {side:22} {rate:8,.0f} useful tokens/s; {said}; padding {run['padding']:.0%}")
            sys.stdout.flush()
    report(args, found)


def report(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    from nemo_embed_core.evaluation.crossed import error_of
    from nemo_embed_core.evaluation.run import evaluate
    from nemo_embed_core.files.strict_json import parse

    for unit, what in (("seconds", "useful tokens/s"), ("cpu", "useful tokens/s of CPU")):
        rates = {side: [run["tokens"] / run[unit] for run in found[side]] for side in SIDES}
        times = [a / b for a, b in zip(rates["ours"], rates["sentence-transformers"], strict=True)]
        print(f"{what}: {np.median(times):.2f} times ({min(times):.2f} to {max(times):.2f})")
    folder = Path(args.folder)
    models = [run["model"] for side in SIDES for run in found[side]]
    prompts = {"task": TASK, "query_max_length": args.length, "document_max_length": args.length}
    scored = evaluate(models, folder / "test", device="cpu", output=str(folder / "report.json"), **prompts)
    values = {}
    for side in SIDES:
        files = [folder / scored[run["model"]]["per_query"] for run in found[side]]
        lines = [file.read_text(encoding="utf-8").splitlines() for file in files]
        values[side] = np.array([[parse(line)["ndcg_at_10"] for line in own] for own in lines])
        print(f"{side}: nDCG@10 {values[side].mean():.4f}")
    differences = values["ours"] - values["sentence-transformers"]
    value, half = differences.mean(), error_of([differences]).half()
    print(
        f"ours minus theirs: {value:+.4f} [{value - half:+.4f}, {value + half:+.4f}], {len(args.seeds)} seeds"
    )


if __name__ == "__main__":
    main()
