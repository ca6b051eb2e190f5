"""A toy that exercises everything: a tokenizer with BOS, ragged rows, a Llama with GQA and llama3 RoPE."""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from nemo_embed_core.config import DataConfig, DatasetConfig, ModelConfig, RopeScaling, TrainConfig

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "river",
    "moon",
    "violin",
    "copper",
    "engine",
    "llama",
    "paper",
    "kernel",
    "cat",
    "bread",
    "quiet",
    "green",
    "tower",
]

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=64),
    max_position_embeddings=512,
    initializer_range=0.1,
)


def write_tokenizer(folder: Path) -> Path:
    """folder/tokenizer.json: byte-level BPE, fewer than 400 ids, BOS in front."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "find nothing number Instruct Query"] * 5, trainer)
    bos = [("<|begin_of_text|>", 0)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=bos
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": special[0],
        "eos_token": special[1],
        "pad_token": special[1],
        "model_max_length": 512,
    }
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_rows(path: Path, num_rows: int = 61, seed: int = 0) -> Path:
    """Rows of ragged lengths with 0 to 3 negatives; some passages are the positive of two rows."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(num_rows):
        a, b = rng.sample(WORDS, 2)
        positive = f"{b} and {a} {i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
        if rows and i % 7 == 0:
            positive = rows[-1]["pos"][0]
        negatives = [
            f"nothing {j} {i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for j in range(i % 4)
        ]
        rows.append({"query": f"find {a} {b} {i}", "pos": [positive], "neg": negatives})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def manifest_meta(model: dict[str, Any]) -> dict[str, Any]:
    """What a manifest of a toy run says besides its files and tensors."""
    lengths = {"query_max_length": 8, "document_max_length": 8}
    data = {"num_hard_negatives": 0, **lengths, "datasets": [{"path": "x"}]}
    return {
        "model": model,
        "config": {"seed": 0, "global_batch_size": 8, "init_from": "", "data": data},
        "export_dtype": "float32",
        "ledger": "0" * 64,
        "data_digest": "0" * 64,
    }


DRAWN = np.array(
    [i for i in range(61) if i % 4]
)  # of write_rows: those with a negative, all that loss.in_batch=none draws


def train_config(folder: Path, **changes: Any) -> TrainConfig:
    """A run of 10 steps of 8 queries in folder/run; data and tokenizer are written if not there."""
    if not (folder / "tokenizer").exists():
        write_tokenizer(folder / "tokenizer")
        write_rows(folder / "train.jsonl")
    data = DataConfig(
        datasets=[DatasetConfig(path=str(folder / "train.jsonl"), task="find it")],
        cache_dir=str(folder / "cache"),
        num_hard_negatives=2,
        query_max_length=48,
        document_max_length=48,
        max_tokens=320,
    )
    base = TrainConfig(
        output_dir=str(folder / "run"), steps=10, global_batch_size=8, tokenizer=str(folder / "tokenizer"),
        model=MODEL, data=data, device="cpu", precision="fp32",
    )  # fmt: skip
    nested = {
        k: dataclasses.replace(getattr(base, k), **v) for k, v in changes.items() if isinstance(v, dict)
    }
    return dataclasses.replace(base, **{**changes, **nested})


@contextmanager
def amax_read_again() -> Iterator[list[bool]]:
    """Within, fp8 products read what they quantise for its largest value, though it was taken along. Yields
    whether it was, for each in turn; then it was the right one."""
    from nemo_embed_core.parallel import fp8

    taken_along, real = [], fp8._amax

    def read_again(x: Any, tp: Any, is_part: bool, own: Any = None) -> Any:
        taken_along.append(own is not None)
        if own is not None:
            largest = x.detach().double().abs().max()
            assert own.shape == () and own.double() == largest > 0, f"{own} of {largest}: {tuple(x.shape)}"
        return real(x, tp, is_part)

    with mock.patch.object(fp8, "_amax", read_again):
        yield taken_along


def llama_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of transformers' LlamaModel with this config.json, spelled apart from the package's
    table."""
    hidden_size, intermediate_size = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden_size // config["num_attention_heads"]
    q_rows, kv_rows = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    tensors: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config["vocab_size"], hidden_size)}
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}"
        tensors |= {
            f"{layer}.self_attn.q_proj.weight": (q_rows, hidden_size),
            f"{layer}.self_attn.k_proj.weight": (kv_rows, hidden_size),
            f"{layer}.self_attn.v_proj.weight": (kv_rows, hidden_size),
            f"{layer}.self_attn.o_proj.weight": (hidden_size, q_rows),
            f"{layer}.mlp.gate_proj.weight": (intermediate_size, hidden_size),
            f"{layer}.mlp.up_proj.weight": (intermediate_size, hidden_size),
            f"{layer}.mlp.down_proj.weight": (hidden_size, intermediate_size),
            f"{layer}.input_layernorm.weight": (hidden_size,),
            f"{layer}.post_attention_layernorm.weight": (hidden_size,),
        }
    return tensors | {"norm.weight": (hidden_size,)}


def read_config(folder: Path) -> ModelConfig:
    from nemo_embed_core.model.hf_config import model_config

    path = folder / "config.json"
    return model_config(path, json.loads(path.read_text()))[0]


def to_hf(name: str, tensor: Any, config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """The Hugging Face tensors that a whole parameter of ours holds."""
    import torch

    from nemo_embed_core.model.spec import hf_rows

    pieces: dict[str, list[Any]] = {}
    row = 0
    for hf_name, _, rows in hf_rows(name, config):
        pieces.setdefault(hf_name, []).append(tensor[row : row + rows])
        row += rows
    assert row == tensor.shape[0], f"{name=} {tensor.shape=} {row=}"
    for hf_name, parts in pieces.items():
        yield hf_name, torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def write_hf(folder: Path, dtype: Any, seed: int = 0, config: ModelConfig = MODEL) -> Path:
    """A Hugging Face folder with random weights, written without our merger."""
    import torch
    from safetensors.torch import save_file

    from nemo_embed_core.checkpoint.weights import RandomReader
    from nemo_embed_core.export.folder import hf_config
    from nemo_embed_core.model.spec import parameter_shapes

    write_tokenizer(folder)
    reader, weights = RandomReader(config, seed), {}
    for name, shape in parameter_shapes(config).items():
        noise = torch.rand(shape) * 0.1
        weights.update(
            to_hf(name, (reader.read_box(name, ((0,) * len(shape), shape)) + noise).to(dtype), config)
        )
    save_file({n: w.contiguous() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    values = hf_config(config, str(dtype).removeprefix("torch."), {"bos_token_id": 0})
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def of_transformers(
    folder: Path, texts: Sequence[str], layers: Sequence[int] = (), equal_final_norm: bool = False
) -> np.ndarray:
    """Its unit rows of texts, one text at a time. layers: of these alone, in this order; (): all."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    if layers:
        model.layers = torch.nn.ModuleList(model.layers[i] for i in layers)
        model.config.num_hidden_layers = len(layers)
    if equal_final_norm:
        torch.nn.init.ones_(model.norm.weight)
    encode, rows = Tokenizer.from_file(f"{folder}/tokenizer.json").encode, []
    with torch.no_grad():
        for text in texts:
            mean = model(input_ids=torch.tensor([encode(text).ids])).last_hidden_state[0].mean(0)
            rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


def count_readings(monkeypatch: Any) -> Counter[str]:
    """How often texts of a BEIR or dataset folder are read from now on, by the file."""
    from nemo_embed_core.data import dataset
    from nemo_embed_core.data.formats import beir

    readings: Counter[str] = Counter()

    def counted(read: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *args: Any) -> Any:
            readings[path.name] += 1
            return read(path, *args)

        return call

    monkeypatch.setattr(beir, "json_lines", counted(beir.json_lines))
    monkeypatch.setattr(dataset, "parquet_rows", counted(dataset.parquet_rows))
    return readings
