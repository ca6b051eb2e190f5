"""config.json of a Hugging Face Llama. No torch import: a model that does not fit is refused before anything heavy is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_embed_core.config import ModelConfig, RopeScaling, UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file, read strictly: no key twice, no NaN or Infinity."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) != len(items):
            names = [name for name, _ in items]
            raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} stands there twice")
        return value

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def read_config(folder: Path) -> ModelConfig:
    """ModelConfig from the config.json of any Hugging Face Llama; what we would compute differently is refused."""
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") not in ("llama", "llama_bidirec"):
        raise UserError(f'{path}: model_type is {raw.get("model_type")!r}; only "llama" and "llama_bidirec" are read')
    for key, plain in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("hidden_act", "silu"),
        ("pooling", "avg"),
    ):
        if raw.get(key, plain) != plain:
            raise UserError(f"{path}: {key}={raw[key]!r} is not supported; this Llama has {key}={plain!r}")
    # transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling; both are read.
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f'{path}: rope_type {kind!r} is not supported; use "default" or "llama3"')
    try:
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=raw["num_attention_heads"],
            num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or 0,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_scaling=RopeScaling(
                factor=scaling["factor"],
                low_freq_factor=scaling["low_freq_factor"],
                high_freq_factor=scaling["high_freq_factor"],
                original_max_position_embeddings=scaling["original_max_position_embeddings"],
            )
            if kind == "llama3"
            else None,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            initializer_range=raw.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise UserError(f"{path}: field {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
