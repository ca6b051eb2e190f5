"""Rows into a token store and out of it again, beside what others do with the same texts; on a CPU.

    python -m benchmarks.data [--data ../shared/data/debian --tokenizer ../shared/tokenizers/llama-3.1]

compile   launch/prepare.py's own path (read, check, hash, tokenise, judge, verify, fsync) beside
          `load_dataset("json").map(..., batched=True)` with transformers' fast tokenizer from the same
          tokenizer.json, one process and one thread each: rows of a query and a document, rows with four
          negatives that other rows have too, documents of 100,000 characters. First the gate: both make the
          same ids.
packing   share of --max_tokens that micro-batches fill with tokens that are computed, a row's texts together,
          by rows of a rank and step; the most that it could be, as the tokens of a step make whole
          micro-batches; processor time to draw and plan a row; and the share of real tokens where the same
          rows are padded, queries and documents apart
loading   load_batch of one rank of 64 beside the step that it feeds, of 15,000 tokens/s a rank

Without --data (a BEIR folder, split train) and where the default is not there texts are generated; without a
tokenizer one is trained on them. Variants take turns, `--rounds` times, and both times are kept: of the
clock, which a busy machine lengthens, and of the processor, from which the rates per core come.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, on both sides

import numpy as np

from benchmarks.ceilings import ResultsFile
from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.inspect import drawn_lengths, padded_slots
from nemo_embed_core.data.packing import draw_batch, load_batch
from nemo_embed_core.data.readers import read_rows
from nemo_embed_core.data.sampler import Sampler
from nemo_embed_core.data.store import Store
from nemo_embed_core.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

SHARED = Path(__file__).resolve().parents[2] / "shared"
RANKS, RANK_RATE = 64, 15_000  # tokens/s of a rank of the step that is fed
LONG = 100_000  # characters of a long document
Pair = tuple[str, str]


def generated(count: int) -> list[Pair]:
    """(query, document) of random words, in length like descriptions of packages: a median of 70 words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioumnrstlkdpbg", k=rng.randint(2, 9))) for _ in range(5000)]

    def text(median: float) -> str:
        return " ".join(rng.choices(words, k=max(3, round(rng.lognormvariate(np.log(median), 0.7)))))

    return [(text(8), text(70)) for _ in range(count)]


def pairs_of(data: str, count: int) -> list[Pair]:
    """(query, positive) of as many rows, drawn with a seed."""
    rows = [(row.query, row.pos[0]) for row in read_rows(DatasetConfig(path=data))]
    random.Random(0).shuffle(rows)
    return rows[:count]


def write_rows(path: Path, pairs: list[Pair], num_negatives: int) -> Path:
    """The negatives of a row are documents of others, drawn: of neighbours they would meet in a batch."""
    rng = random.Random(1)
    with path.open("w") as file:
        for query, document in pairs:
            negatives = {other for _, other in rng.sample(pairs, num_negatives)} - {document}
            file.write(json.dumps({"query": query, "pos": [document], "neg": sorted(negatives)}) + "\n")
    return path


def long_pairs(pairs: list[Pair], count: int) -> list[Pair]:
    """Documents of LONG characters, each of other texts."""
    texts = " ".join(document for _, document in pairs)
    texts *= 1 + 2 * LONG // len(texts)
    step = max(1, (len(texts) - LONG) // count)
    return [(pairs[i % len(pairs)][0], texts[i * step : i * step + LONG]) for i in range(count)]


# ------------------------------------------------------------------------------------------ compile


def config_of(file: Path, folder: Path, options: argparse.Namespace) -> DataConfig:
    return DataConfig(
        datasets=[DatasetConfig(path=str(file))], cache_dir=str(folder), max_tokens=options.max_tokens,
        num_hard_negatives=options.negatives,
    )  # fmt: skip


def compiled(file: Path, folder: Path, tokenizer: Tokenizer, options: argparse.Namespace) -> Store:
    return open_store(config_of(file, folder, options), tokenizer, lambda line: None)


def mapped(file: Path, folder: Path, tokenizer: Any, max_length: int) -> Any:
    """As people write it: every text of every row, in batches of 1,000 rows, into an arrow file."""
    import datasets

    def ids_of(texts: list[str]) -> list[list[int]]:
        cut = {"truncation": True, "max_length": max_length, "return_attention_mask": False}
        return tokenizer(texts, **cut)["input_ids"]  # type: ignore[no-any-return]

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        documents = [pos + neg for pos, neg in zip(batch["pos"], batch["neg"], strict=True)]
        flat = iter(ids_of([text for texts in documents for text in texts]))
        return {
            "query": ids_of(batch["query"]),
            "documents": [[next(flat) for _ in texts] for texts in documents],
        }

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder))
    return rows.map(tokenise, batched=True, remove_columns=rows.column_names)


def gate(store: Store, rows: Any) -> int:
    """The tokens of all rows, a text counted as often as it stands there; both have the same ids."""
    tokens = 0
    for row, found in enumerate(rows):
        ids = [*store.positives(row).tolist(), *store.negatives(row).tolist()]
        documents = [store.document_tokens(i).tolist() for i in ids]
        if found["query"] != store.query_tokens(row).tolist() or found["documents"] != documents:
            raise SystemExit(f"row {row} has other ids than datasets.map, hence nothing is measured")
        tokens += sum(map(len, [found["query"], *documents]))
    return tokens


def in_turns(calls: dict[str, Callable[[Path], object]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, processor seconds) of each call, one of each a round; each writes into a new folder."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            with tempfile.TemporaryDirectory() as folder:
                gc.collect()
                clock, processor = time.perf_counter(), time.process_time()
                kept = call(Path(folder))
                times[name].append((time.perf_counter() - clock, time.process_time() - processor))
                del kept  # its files are open
    return times


def measure_compile(
    shape: str,
    file: Path,
    tokenizer: Tokenizer,
    folder: Path,
    options: argparse.Namespace,
    results: ResultsFile,
) -> None:
    from transformers import PreTrainedTokenizerFast

    (folder / "tokenizer.json").write_bytes(tokenizer.files["tokenizer.json"])
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    calls: dict[str, Callable[[Path], object]] = {
        "ours": lambda where: compiled(file, where, tokenizer, options),
        "datasets.map": lambda where: mapped(file, where, fast, options.max_length),
    }
    with tempfile.TemporaryDirectory() as where:
        store, rows = (call(Path(where) / name) for name, call in calls.items())
        assert isinstance(store, Store)
        tokens, num_rows = gate(store, rows), len(store)
        del rows
    times = in_turns(calls, options.rounds)
    ratios = [theirs[1] / ours[1] for ours, theirs in zip(times["ours"], times["datasets.map"], strict=True)]
    for name, both in times.items():
        seconds, processor = (statistics.median(pair[i] for pair in both) for i in (0, 1))
        figures: dict[str, Any] = {"seconds": seconds, "processor_s": processor, "all_seconds": both}
        if name == "ours":
            figures["times_the_peer"] = [min(ratios), statistics.median(ratios), max(ratios)]
        results.append(
            what="compile", shape=shape, variant=name, rows=num_rows, tokens=tokens,
            rows_per_core_s=num_rows / processor, tokens_per_core_s=tokens / processor, **figures,
        )  # fmt: skip
        print(
            f"compile {shape:18} {name:13} {num_rows / processor:9,.0f} rows/s and "
            f"{tokens / processor:11,.0f} tokens/s a core; {seconds:.2f} s on the clock, {processor:.2f} s "
            "of a processor",
            flush=True,
        )
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(
        f"  {middle:.2f} times the peer's rate ({low:.2f} to {high:.2f} in {len(ratios)} rounds)", flush=True
    )


# ------------------------------------------------------------------------------------------ packing, loading


def packings(store: Store, config: DataConfig) -> Iterator[dict[str, Any]]:
    """Of the rows of an epoch that make whole steps."""
    for size in (128, 1_024, 4_096, 8_192, 65_536):
        if size > len(store):
            continue
        sampler, slots, tokens, ceiling, steps = Sampler(len(store), size, 0), 0, 0, 0, len(store) // size
        begun = time.process_time()
        for step in range(steps):
            drawn = draw_batch(store, sampler, step, 1, config, 1, 0)
            counts = [int(drawn.lengths(store, bin_).sum()) for bin_ in drawn.bins[0]]
            slots, tokens = slots + len(counts) * config.max_tokens, tokens + sum(counts)
            ceiling += -(-sum(counts) // config.max_tokens) * config.max_tokens
        yield {
            "variant": f"packed, {size:,} rows a rank and step", "tokens": tokens, "slots": slots,
            "ceiling": tokens / ceiling, "us_a_row": (time.process_time() - begun) * 1e6 / (steps * size),
        }  # fmt: skip
    queries_B, documents_BM = drawn_lengths(store, config, Sampler(len(store), len(store), 0))
    tokens = int(queries_B.sum() + documents_BM.sum())
    order = np.argsort(documents_BM.max(axis=1), kind="stable")
    for size in (1, 4, 16):
        slots = padded_slots(queries_B, documents_BM, size)
        yield {"variant": f"padded, {size} rows", "tokens": tokens, "slots": slots}
    slots = padded_slots(queries_B[order], documents_BM[order], 16)
    yield {"variant": "padded, 16 rows, sorted by the longest text", "tokens": tokens, "slots": slots}


def measure_packing(store: Store, config: DataConfig, results: ResultsFile) -> None:
    for figures in packings(store, config):
        useful = figures["tokens"] / figures["slots"]
        results.append(
            what="packing", max_tokens=config.max_tokens, rows=len(store), useful=useful, **figures
        )
        line = f"packing {figures['variant']:45} {useful:.4f} of {figures['slots']:,} tokens"
        if "ceiling" in figures:
            line += (
                f"; whole micro-batches could {figures['ceiling']:.4f}; {figures['us_a_row']:.1f} us a row"
            )
        print(line, flush=True)


def measure_loading(store: Store, config: DataConfig, rounds: int, results: ResultsFile) -> None:
    """Of one rank of RANKS: it plans for all, and makes the tensors of its own micro-batches."""
    for rows in (32, 128):
        if (size := RANKS * rows) > len(store):
            continue
        sampler, times, counts = Sampler(len(store), size, 0), [], []
        for step in range(rounds + 1):
            clock, processor = time.perf_counter(), time.process_time()
            _, count = load_batch(store, sampler, step, step % RANKS, RANKS, config)
            times.append((time.perf_counter() - clock, time.process_time() - processor))
            counts.append(count)
        seconds, processor_s = (statistics.median(pair[i] for pair in times[1:]) for i in (0, 1))
        tokens = statistics.median(counts[1:])
        figures = {
            "seconds": seconds, "processor_s": processor_s, "tokens_per_s": tokens / seconds,
            "goal_per_s": RANKS * RANK_RATE, "share_of_step": seconds * RANKS * RANK_RATE / tokens,
        }  # fmt: skip
        results.append(what="loading", rows_a_rank=rows, ranks=RANKS, tokens=tokens, **figures)
        print(
            f"loading {rows} rows a rank of {RANKS}: {tokens:,.0f} tokens a step in {seconds:.3f} s on the "
            f"clock, {tokens / seconds:,.0f} tokens/s; goal {RANKS * RANK_RATE:,}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    there = [
        str(path) if path.exists() else ""
        for path in (SHARED / "data/debian", SHARED / "tokenizers/llama-3.1")
    ]
    parser.add_argument("--data", default=there[0], help="BEIR folder or rows; '': generated texts")
    parser.add_argument("--tokenizer", default=there[1], help="folder; '': trained on the texts")
    parser.add_argument("--rows", type=int, default=8_000, help="that are compiled (default 8,000)")
    parser.add_argument("--packed", type=int, default=66_000, help="rows to pack and load (default 66,000)")
    parser.add_argument("--negatives", type=int, default=4)
    parser.add_argument("--max_tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    options.max_length = DataConfig().document_max_length
    count = max(options.rows, options.packed)
    pairs = pairs_of(options.data, count) if options.data else generated(count)
    results = ResultsFile("data", device="cpu")
    load = round(os.getloadavg()[0], 1)
    print(f"{results.run['gpu']}, load {load} before the start; to {results.path}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.tokenizer:
            tokenizer = load_tokenizer(options.tokenizer)
        else:
            texts = [text for pair in pairs[:2_000] for text in pair]
            tokenizer = train_sentencepiece(texts, 4_000, folder / "tokenizer")
        results.append(
            what="texts", load=load, vocab_size=tokenizer.vocab_size, rounds=options.rounds,
            texts=Path(options.data).name if options.data else "generated",
        )  # fmt: skip
        some = pairs[: options.rows]
        for shape, chosen, negatives in (
            ("pairs", some, 0),
            (f"{options.negatives} negatives", some, options.negatives),
            ("long documents", long_pairs(some, max(2, options.rows // 20)), 0),
        ):
            file = write_rows(folder / "rows.jsonl", chosen, negatives)
            measure_compile(shape, file, tokenizer, folder, options, results)
        file = write_rows(folder / "packed.jsonl", pairs[: options.packed], options.negatives)
        store = compiled(file, folder / "packed", tokenizer, options)
        config = config_of(file, folder / "packed", options)
        measure_packing(store, config, results)
        measure_loading(store, config, 3 * options.rounds, results)


if __name__ == "__main__":
    main()
