"""Texts per second: our packed encoder against sentence-transformers' encode, the same model and texts.

    OMP_NUM_THREADS=1 python -m benchmarks.encode [--model FOLDER] [--texts 256 --rounds 5 --hidden_size 384]

Texts are docstrings of installed packages, half of them summary lines and half the rest, in random order;
tokenisation counts on both sides. Without --model a Llama of random weights (12 layers) is written and read
by both. Rounds are interleaved, the first of each is not counted; a ratio is of one round. Positions are
tokens with the padding that an encoder computes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_embed_core.checkpoint.source import Usage
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.demo.docstrings import extract
from nemo_embed_core.encoders import open_encoder
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.export.folder import write_folder

PACKAGES = ("sentence_transformers", "datasets", "huggingface_hub", "jsonargparse")
BATCH = 32  # texts of sentence-transformers' batches, its default
LENGTH = 512


def texts_of(count: int, seed: int = 0) -> list[str]:
    specs = [spec for name in PACKAGES if (spec := find_spec(name)) and spec.origin]
    docs = extract([Path(spec.origin).parent for spec in specs if spec.origin])
    chosen = random.Random(seed).sample(docs, count)
    return [doc.query if i % 2 else doc.passage for i, doc in enumerate(chosen)]


def write_model(folder: Path, texts: Sequence[str], hidden_size: int) -> Path:
    """A Llama of random weights with a tokenizer of these texts, as an export of ours."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaModel

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    shape = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": 12}
    heads = {"num_attention_heads": hidden_size // 64, "num_key_value_heads": hidden_size // 64}
    model = ModelConfig(vocab_size=tokenizer.get_vocab_size(), **shape, **heads)
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"bos_token": "<s>", "pad_token": "<pad>"}).encode(),
    }
    usage = Usage(query_max_length=LENGTH, document_max_length=LENGTH)
    write_folder(folder, model, "float32", files, usage=usage, card={})
    torch.manual_seed(0)
    weights = LlamaModel(LlamaConfig.from_pretrained(folder)).state_dict()
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def padded(lengths: Sequence[int]) -> int:
    """Positions of batches of BATCH texts by falling length, each as long as its longest."""
    ordered = sorted(lengths, reverse=True)
    return sum(ordered[i] * len(ordered[i : i + BATCH]) for i in range(0, len(ordered), BATCH))


def measure(
    texts: Sequence[str], rounds: int, encoders: dict[str, Callable[[Sequence[str]], np.ndarray]]
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """({name: seconds of each counted round}, {name: its vectors}), one after another in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    vectors: dict[str, np.ndarray] = {}
    for number in range(rounds + 1):
        for name, encode in encoders.items():
            start = time.perf_counter()
            vectors[name] = encode(texts)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds, vectors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--max_tokens", type=int, default=16384)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    options = parser.parse_args()
    texts = texts_of(options.texts)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or write_model(Path(folder) / "model", texts, options.hidden_size)
        how = (options.device, options.precision, options.max_tokens)
        ours: Any = open_encoder(model, *how, by="ours")
        library: Any = open_encoder(model, *how, by="sentence-transformers")
        assert isinstance(ours, Embedder)
        lengths = [len(ids) for ids in ours.tokenize(texts, "", LENGTH)[0]]
        encoders = {
            "ours, packed": lambda given: ours.encode(given, max_length=LENGTH),
            "sentence-transformers": lambda given: library.encode(given, max_length=LENGTH),
        }
        seconds, vectors = measure(texts, options.rounds, encoders)
    own, other = vectors.values()
    tokens = sum(lengths)
    threads = torch.get_num_threads() if options.device == "cpu" else 0
    print(
        f"{len(texts)} texts, {tokens} tokens (mean {tokens / len(texts):.0f}, longest {max(lengths)}); "
        f"{options.device}, {threads} threads, {options.precision}, torch {torch.__version__}; "
        f"vectors differ by at most {np.abs(own - other).max():.1e}"
    )
    print("| encoder | texts/s | tokens/s | tokens of the positions | against sentence-transformers |")
    print("|---|---|---|---|---|")
    base = seconds["sentence-transformers"]
    shares = {"ours, packed": 1.0, "sentence-transformers": tokens / padded(lengths)}
    for name, taken in seconds.items():
        ratios = [b / t for b, t in zip(base, taken, strict=True)]
        middle = statistics.median(taken)
        low, high = min(ratios), max(ratios)
        print(
            f"| {name} | {len(texts) / middle:.1f} | {tokens / middle:,.0f} | {shares[name]:.1%} | "
            f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) |"
        )


if __name__ == "__main__":
    main()
