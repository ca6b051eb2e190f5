"""config.json of a Hugging Face Llama or a relative of it (FAMILIES). No torch import: a model that does not
fit is refused before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_embed_core.config import ModelConfig, RopeScaling
from nemo_embed_core.errors import UserError
from nemo_embed_core.model.spec import (
    FAMILIES,
    OUTER_MODELS,
    POOLINGS,
    ROPE_TYPES,
    Family,
    pooling_of_config,
    rope_fields,
)


def model_config(path: Path, raw: Mapping[str, Any]) -> tuple[ModelConfig, tuple[str, ...]]:
    """(the shape, notes) from config.json's object; UserError where two of its fields contradict, and for
    what we would compute differently."""
    if raw is not (text := text_part(raw)):
        if raw.get("quantization_config") is not None:
            text = {**text, "quantization_config": raw["quantization_config"]}
        model, said = model_config(path, text)
        return model, (f"{path}: of this {raw['model_type']} the text part alone is read", *said)
    if raw.get("model_type") not in FAMILIES:
        types = " and ".join(f'"{name}"' for name in FAMILIES)
        raise UserError(f"{path}: model_type is {raw.get('model_type')!r}; only {types} are read")
    family = FAMILIES[raw["model_type"]]
    for key, values in family.supported.items():
        if (value := raw.get(key, family.defaults.get(key, values[0]))) not in values:
            unsaid = "" if key in raw else ", which transformers takes where it is left out,"
            raise UserError(
                f"{path}: {key}={value!r}{unsaid} is not supported; this {family.words} has "
                f"{key}={json.dumps(values[0])}"
            )
    if other := set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(
            f"{path}: layer_types has {', '.join(sorted(map(repr, other)))}, which is not supported; every "
            'layer here is "full_attention"'
        )
    pooling = pooling_of_config(raw.get("pooling"))
    if pooling is None:
        known = " or ".join(repr(spec.config_word) for spec in POOLINGS.values())
        raise UserError(f"{path}: pooling={raw['pooling']!r} is not supported; here is pooling={known}")
    if raw.get("quantization_config") is not None:
        kind = raw["quantization_config"]
        kind = kind.get("quant_method", "?") if isinstance(kind, dict) else kind
        raise UserError(
            f"{path}: quantization_config ({kind}): quantised weights are not read; take the model in bf16, "
            "or delete the field if its weights are plain"
        )
    for key in ("text_config", "llm_config"):
        if raw.get(key) is not None:
            raise UserError(
                f"{path}: {key} describes a second model beside the sizes around it; keep one of them"
            )
    causal, bidirectional = raw.get("is_causal"), raw.get("use_bidirectional_attention")
    if causal is not None and causal == bidirectional:
        raise UserError(
            f"{path}: is_causal={causal!r}, which transformers reads, and "
            f"use_bidirectional_attention={bidirectional!r}, which vLLM and text-embeddings-inference read, "
            "contradict; correct one"
        )
    notes: list[str] = []
    theta, scaling = _rotary(path, raw, family, notes)
    if family.is_causal and (code := raw.get("auto_map")):
        file = next(iter(code.values()), "") if isinstance(code, dict) else code
        notes.append(f"{path}: its own code ({file}) is not run; it is read as a plain {family.words}")
    try:
        fields: dict[str, Any] = {**family.defaults, **raw, "model_type": family.model_type}
        fields["num_key_value_heads"] = fields.get("num_key_value_heads") or raw["num_attention_heads"]
        fields["head_dim"], fields["pooling"] = fields.get("head_dim") or 0, pooling
        fields["is_causal"] = family.is_causal and causal is True
        fields["rope_theta"], fields["rope_scaling"] = theta, scaling
        model = ModelConfig(**{f.name: fields[f.name] for f in dataclasses.fields(ModelConfig)})
    except KeyError as error:
        raise UserError(f"{path}: field {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    return model, tuple(notes)


# ------------------------------------------------------------------------------------------ rotary spellings

# transformers 5 writes rope_parameters; 4 wrote rope_theta and rope_scaling. 5 takes rope_scaling where both
# stand there, and a theta inside either before rope_theta; 4 has never heard of rope_parameters.


def _rotary(
    path: Path, raw: Mapping[str, Any], family: Family, notes: list[str]
) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) on which all spellings that stand in config.json agree."""
    if not raw.get("rope_scaling") and not raw.get("rope_parameters"):
        raw = {**raw, "rope_parameters": family.defaults.get("rope_parameters")}
    spellings = {key: raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key)}
    readings = {key: _spelling(path, key, value, raw, notes) for key, value in spellings.items()}
    top = raw.get("rope_theta")
    inner = {f"{key}.rope_theta": spelling.get("rope_theta") for key, spelling in spellings.items()}
    for key, value in {"rope_theta": top, **inner}.items():
        if value is None:
            continue
        if type(value) not in (int, float):
            raise UserError(f"{path}: {key}={value!r} must be a number")
        if top is not None and value != top:
            raise UserError(
                f"{path}: rope_theta={top!r}, which transformers 4 reads, and {key}={value!r}, which "
                "transformers 5 reads, contradict; delete the wrong one"
            )
    if len(readings) == 2:
        (a, first), (b, second) = readings.items()
        if first != second:
            raise UserError(
                f"{path}: {a} ({_shown(first)}), which transformers reads, and {b} ({_shown(second)}) "
                "contradict; delete one"
            )
    if not readings:
        if top is None and "rope_theta" in raw:
            raise UserError(f"{path}: rope_theta is null; give the number that the model was trained with")
        return float(10000.0 if top is None else top), None
    return next(iter(readings.values()))


def _spelling(
    path: Path, key: str, rope: Any, raw: Mapping[str, Any], notes: list[str]
) -> tuple[float, RopeScaling | None]:
    """What one of the two says, where it stands alone."""
    if not isinstance(rope, dict):
        raise UserError(f"{path}: {key}={rope!r} must be an object")
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{path}: {key} differs from layer to layer, which is not supported")
    kinds = {name: rope[name] for name in ("rope_type", "type") if rope.get(name) is not None}
    if len(set(map(str, kinds.values()))) > 1:
        raise UserError(
            f"{path}: {key} has rope_type={rope['rope_type']!r}, which transformers 5 reads, and "
            f"type={rope['type']!r}, which transformers 4 reads; delete one"
        )
    kind = next(iter(kinds.values()), "default")
    if kind not in ROPE_TYPES:
        known = " or ".join(f'"{name}"' for name in ROPE_TYPES)
        raise UserError(f"{path}: rope_type {kind!r} is not supported; use {known}")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        if kind != "default" or not raw["model_type"].startswith("llama"):
            raise UserError(
                f"{path}: partial_rotary_factor={partial!r} is not supported; all channels are rotated"
            )
        notes.append(
            f"{path}: partial_rotary_factor={partial!r} is ignored, as transformers 5 does for a Llama"
        )
    needed, optional = ROPE_TYPES[kind]
    if not kinds and (unused := [name for name in ROPE_TYPES["llama3"][0] if name in rope]):
        notes.append(
            f"{path}: {key} has {unused[0]} but no rope_type: positions are not scaled, as in transformers"
        )
    theta = rope.get("rope_theta")
    theta = raw.get("rope_theta") if theta is None else theta
    theta = 10000.0 if theta is None else theta
    if type(theta) not in (int, float):
        raise UserError(f"{path}: rope_theta={theta!r} must be a number")
    if kind == "default":
        return float(theta), None
    values: dict[str, Any] = {name: rope.get(name) for name in needed}
    outer, inner = (of.get("original_max_position_embeddings") for of in (raw, rope))
    if outer is not None and inner is not None and outer != inner:
        raise UserError(
            f"{path}: original_max_position_embeddings={outer!r}, which transformers 5 reads, and that of "
            f"{key}, {inner!r}, which transformers 4 reads, contradict; delete one"
        )
    # As transformers 5: the model's own, then its longest text.
    if "original_max_position_embeddings" in needed:
        values["original_max_position_embeddings"] = (
            inner or outer or raw.get("max_position_embeddings", 2048)
        )
    if missing := [name for name, value in values.items() if value is None]:
        raise UserError(f"{path}: {key} is of type {kind} and has no {missing[0]}")
    values |= {name: rope[name] for name in optional if rope.get(name) is not None}
    try:
        return float(theta), RopeScaling(**{"rope_type": kind, **values})
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _shown(reading: tuple[float, RopeScaling | None]) -> str:
    theta, scaling = reading
    if scaling is None:
        return f"theta {theta:g}, not scaled"
    fields = {name: value for name, value in rope_fields(scaling).items() if name != "rope_type"}
    shown = (f"{name} {value:g}" for name, value in fields.items())
    return ", ".join([f"theta {theta:g}", *shown, scaling.rope_type])


def text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json's object, or of a model of images and text what it says of the text."""
    text = raw.get("text_config") if raw.get("model_type") in OUTER_MODELS else None
    return text if isinstance(text, dict) else raw
