"""Facts of Llama and its relatives, each said once: names of tensors, fused rows, rotary kinds, and what
every consumer calls them.

    parameter_shapes, tp_dim, tp_unit    our parameters and how tensor parallelism cuts them
    rank_units                           what a rank gathers together
    hf_rows, hf_shapes                   Hugging Face's tensors, and whose rows ours are
    FAMILIES, ROPE_TYPES                 words of config.json, and what they mean where they are left out
    POOLINGS                             words of config.json and sentence-transformers, text for people

Import, export, checkpoints, merging and proofs read these. No torch import: a model that does not fit is
refused before anything heavy is loaded. The arithmetic of pooling is model/pooling.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_embed_core.config import LoraConfig, ModelConfig, ModelType, Pooling, RopeScaling
from nemo_embed_core.errors import UserError
from nemo_embed_core.options import to_dict
from nemo_embed_core.parallel.layout import tp_chunk

FP8_MULTIPLE = 16  # of sizes in an fp8 product (kernels/fp8.py)

# ------------------------------------------------------------------------------------------ config.json


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model_type of config.json.

    words: for people.
    model_type: of ModelConfig.
    is_causal: what it means where config.json does not say.
    qkv_bias: q, k and v have biases.  qk_norm: an RMSNorm over each head of q and k, before they are rotated.
    defaults: what transformers takes for a field that is left out.
    supported: values of other fields that compute what model/llama.py computes; exports write the first.
    """

    words: str
    architecture: str
    model_type: ModelType
    is_causal: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, Any]
    supported: Mapping[str, tuple[Any, ...]]


def _defaults(max_position_embeddings: int, **others: Any) -> dict[str, Any]:
    common = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "hidden_act": "silu"}
    return {**common, "max_position_embeddings": max_position_embeddings, **others}


Q_SCALE = "llama_4_scaling_beta"  # of the scaling of q by its position
_SILU = {"hidden_act": ("silu", "swish")}
_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "defaults": _defaults(2048),
    "supported": {"attention_bias": (False,), "mlp_bias": (False,), **_SILU},
}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(words="Llama", architecture="LlamaModel", **_LLAMA),
    "llama_bidirec": Family(words="Llama", architecture="LlamaBidirectionalModel", is_causal=False, **_LLAMA),
    "mistral": Family(
        words="Mistral",
        architecture="MistralModel",
        model_type="mistral",
        defaults=_defaults(131072, num_key_value_heads=8, sliding_window=4096),
        supported={"sliding_window": (None,), **_SILU},
    ),
    "ministral3": Family(
        words="Ministral 3",
        architecture="Ministral3Model",
        model_type="ministral3",
        defaults={
            **_defaults(262144, num_key_value_heads=8, head_dim=128),
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0},
                **{"original_max_position_embeddings": 16384, "mscale": 1.0, "mscale_all_dim": 1.0},
                Q_SCALE: 0.1,
            },
        },
        supported={"sliding_window": (None,), **_SILU},
    ),
    "qwen2": Family(
        words="Qwen2",
        architecture="Qwen2Model",
        model_type="qwen2",
        qkv_bias=True,
        defaults=_defaults(32768, num_key_value_heads=32),
        supported={"use_sliding_window": (False,), **_SILU},
    ),
    "qwen3": Family(
        words="Qwen3",
        architecture="Qwen3Model",
        model_type="qwen3",
        qk_norm=True,
        defaults=_defaults(32768, num_key_value_heads=32, head_dim=128),
        supported={"attention_bias": (False,), "use_sliding_window": (False,), **_SILU},
    ),
}


# Of images and text: the text's own config.json is their text_config. -> what the names of other parts begin
# with.
OUTER_MODELS: Mapping[str, tuple[str, ...]] = {"mistral3": ("vision_tower.", "multi_modal_projector.")}

ARCHITECTURES = {name: family.architecture for name, family in FAMILIES.items()}


def family_of(config: ModelConfig) -> Family:
    """By which transformers computes it without further code."""
    return FAMILIES[config.model_type]


# rope_type -> (fields of config.RopeScaling that it must have, those that it may have).
ROPE_TYPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim", Q_SCALE),
    ),
}


def rope_fields(scaling: RopeScaling) -> dict[str, Any]:
    """The object in config.json, without what its rope_type has no use for."""
    needed, optional = ROPE_TYPES[scaling.rope_type]
    found = {name: getattr(scaling, name) for name in (*needed, *optional)}
    return {"rope_type": scaling.rope_type, **{k: v for k, v in found.items() if v is not None}}


def identity(config: ModelConfig) -> dict[str, Any]:
    """What vectors depend on of the shape. Fields that came later are left out where they are what all models
    were before: digests of their vectors are the same."""
    shape = to_dict(config)
    for name in ("pooling", "model_type", "is_causal"):
        if shape[name] == getattr(ModelConfig, name):
            del shape[name]
    if config.rope_scaling is not None:
        shape["rope_scaling"] = rope_fields(config.rope_scaling)
        if config.rope_scaling.rope_type == "llama3":
            del shape["rope_scaling"]["rope_type"]
    return shape


# ------------------------------------------------------------------------------------------ names and shapes

EMBEDDING = "embed_tokens.weight"
FIRST_NORM = "layers.0.input_layernorm.weight"  # every one has it, whatever stands before the name
FINAL_NORM = "norm.weight"
HEADS = ("lm_head.weight", "score.weight")  # of a language model and of a classifier: no part of an encoder
ROPE_BUFFER = "rotary_emb.inv_freq"  # in old exports; a function of config.json
HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter names (as in Encoder.named_parameters) -> global shapes."""
    family, D, A = family_of(config), config.hidden_size, config.head_dim
    H, G, F = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {f"model.{EMBEDDING}": (config.vocab_size, D)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (D,)
        shapes[layer + "self_attn.qkv_proj.weight"] = ((H + 2 * G) * A, D)
        if family.qkv_bias:
            shapes[layer + "self_attn.qkv_proj.bias"] = ((H + 2 * G) * A,)
        if family.qk_norm:
            shapes |= {layer + name: (A,) for name in HEAD_NORMS}
        shapes[layer + "self_attn.o_proj.weight"] = (D, H * A)
        shapes[layer + "post_attention_layernorm.weight"] = (D,)
        shapes[layer + "mlp.gate_up_proj.weight"] = (2 * F, D)
        shapes[layer + "mlp.down_proj.weight"] = (D, F)
    shapes[f"model.{FINAL_NORM}"] = (D,)
    return shapes


def tp_dim(name: str) -> int | None:
    """The dim that tensor parallelism splits; None for replicated parameters."""
    is_row_parallel = "o_proj." in name or "down_proj." in name
    if name.endswith(("norm.weight", ".lora.B" if is_row_parallel else ".lora.A")):
        return None
    return 1 if is_row_parallel else 0


def tp_unit(name: str, config: ModelConfig) -> int:
    """Rows or columns of the tp dim that stay together: a rank holds whole units."""
    width = config.intermediate_size // config.mlp_blocks
    if "gate_up_proj." in name:
        return 2 * width
    if "o_proj." in name:
        return config.num_attention_heads // config.num_key_value_heads * config.head_dim
    return width if "down_proj." in name else 1


def adapter_shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Names of LoRA's factors (model/lora.py) -> global shapes, behind the weights that they adapt; {} of
    rank 0."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, *columns) in parameter_shapes(config).items() if lora.rank else ():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in lora.targets and columns:
            shapes |= {f"{layer}.lora.A": (lora.rank, *columns), f"{layer}.lora.B": (rows, lora.rank)}
            if lora.rank > min(rows, *columns):
                raise UserError(
                    f"lora.rank={lora.rank} is more than {name} has, {rows} x {columns[0]}; lower it"
                )
    return shapes


def trained_shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """What has gradients and optimizer state, and is what a checkpoint holds."""
    return adapter_shapes(config, lora) or parameter_shapes(config)


def rank_units(
    config: ModelConfig, tp_size: int, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> list[list[tuple[int, ...]]]:
    """Shapes on a tp rank of what FSDP2 gathers together: of the root and of each block. shapes: of some
    parameters alone."""
    units: list[list[tuple[int, ...]]] = [[] for _ in range(1 + config.num_hidden_layers)]
    for name, shape in (shapes or parameter_shapes(config)).items():
        local, dim = list(shape), tp_dim(name)
        if dim is not None:
            local[dim] = tp_chunk(shape[dim], tp_size, tp_unit(name, config))
        layer = name.removeprefix("model.layers.")
        units[0 if layer == name else 1 + int(layer.split(".")[0])].append(tuple(local))
    return units


def check_fp8(config: ModelConfig, tp_size: int = 1) -> None:
    """UserError where a rank's share of a block's matrices is no multiple of what fp8 products take."""
    for shape in rank_units(config, tp_size)[1]:
        if len(shape) > 1 and any(size % FP8_MULTIPLE for size in shape):
            share = f" on each of {tp_size} tensor-parallel ranks" if tp_size > 1 else ""
            raise UserError(
                f"precision=fp8 multiplies matrices whose sizes are multiples of {FP8_MULTIPLE}, and this "
                f"model (hidden_size={config.hidden_size}, intermediate_size={config.intermediate_size}, "
                f"head_dim={config.head_dim}) has one of {shape[0]} x {shape[1]}{share}; use precision=bf16"
            )


def hf_rows(name: str, config: ModelConfig) -> list[tuple[str, int, int]]:
    """Rows of our parameter, in order, as (Hugging Face name, first row there, number of rows)."""
    plain = name.removeprefix("model.")
    G, A = config.num_key_value_heads, config.head_dim
    if plain.endswith(("self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias")):
        (prefix, kind), q = plain.split("qkv_proj."), config.num_attention_heads // G * A
        heads = (("q_proj.", q), ("k_proj.", A), ("v_proj.", A))
        return [(prefix + part + kind, g * rows, rows) for g in range(G) for part, rows in heads]
    if plain.endswith("mlp.gate_up_proj.weight"):
        prefix, rows = (
            plain.removesuffix("gate_up_proj.weight"),
            config.intermediate_size // config.mlp_blocks,
        )
        parts = ("gate_proj.weight", "up_proj.weight")
        return [(prefix + part, m * rows, rows) for m in range(config.mlp_blocks) for part in parts]
    return [(plain, 0, parameter_shapes(config)[name][0])]


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face names (without "model.") -> shapes, in the order of our parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(config).items():
        for hf_name, _, rows in hf_rows(name, config):
            have = shapes.get(hf_name, (0,))[0]
            shapes[hf_name] = (have + rows, *shape[1:])
    return shapes


# ------------------------------------------------------------------------------------------ pooling


@dataclass(frozen=True)
class PoolingSpec:
    """How others say what model/pooling.py computes under this name."""

    mode: str  # sentence-transformers', a key of POOLING_MODES
    words: str  # of the model card, after "Text embeddings from a Llama without its causal mask: "
    torch: str  # plain torch of hidden [N, L, D] and mask [N, L, 1], padded on either side -> [N, D]

    @property
    def config_word(self) -> str:
        """The one that exports write into config.json."""
        return POOLING_MODES[self.mode][1][0]


POOLINGS: Mapping[Pooling, PoolingSpec] = {
    "mean": PoolingSpec(
        mode="mean",
        words="mean of the last hidden states over all tokens (special tokens and prompt included)",
        torch="(hidden * mask).sum(1) / mask.sum(1)",
    ),
    "last": PoolingSpec(
        mode="lasttoken",
        words="last hidden state of the last token",
        torch="hidden[torch.arange(len(hidden)), mask.cumsum(1).argmax(1)[:, 0]]",
    ),
    "cls": PoolingSpec(
        mode="cls",
        words="last hidden state of the first token",
        torch="hidden[torch.arange(len(hidden)), mask.argmax(1)[:, 0]]",
    ),
    "weightedmean": PoolingSpec(
        mode="weightedmean",
        words="mean of the last hidden states over all tokens, the n-th with weight n",
        torch="(hidden * mask.cumsum(1) * mask).sum(1) / (mask.cumsum(1) * mask).sum(1)",
    ),
}

# All that sentence-transformers can: its word since version 5.4 -> (its flag before, words of config.json, as
# text-embeddings-inference and vLLM read them).
POOLING_MODES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "cls": ("pooling_mode_cls_token", ("cls",)),
    "mean": ("pooling_mode_mean_tokens", ("avg", "mean")),
    "max": ("pooling_mode_max_tokens", ()),
    "mean_sqrt_len_tokens": ("pooling_mode_mean_sqrt_len_tokens", ()),
    "weightedmean": ("pooling_mode_weightedmean_tokens", ("weightedmean",)),
    "lasttoken": ("pooling_mode_lasttoken", ("last", "lasttoken")),
}

# Modules of sentence-transformers that are computed here, with or without the last; the folder of each in an
# export.
MODULES = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))


def mode_of_config(word: Any) -> str | None:
    """sentence-transformers' word for the one of config.json; None where it is nothing known."""
    return next((mode for mode, (_, words) in POOLING_MODES.items() if word in words), None)


def pooling_of_config(word: Any) -> Pooling | None:
    """Our name for the word of config.json, None being a config.json without one; None for what we do not
    compute."""
    return next(iter(POOLINGS)) if word is None else pooling_of_modes({mode_of_config(word) or ""})


def pooling_of_modes(modes: set[str]) -> Pooling | None:
    """Our name for what `modes_of` found; None where we compute something else."""
    return next((name for name, spec in POOLINGS.items() if modes == {spec.mode}), None)


def modes_of(file: object, pooling: Mapping[str, Any]) -> set[str]:
    """How the config.json of sentence-transformers' Pooling says to pool, in its words since 5.4; UserError
    where it says two."""
    flags = {mode for mode, (flag, _) in POOLING_MODES.items() if pooling.get(flag) is True}
    given = pooling.get("pooling_mode")
    words = set(given) if isinstance(given, list) else {given} if given is not None else set()
    if flags and words and flags != words:
        raise UserError(
            f"{file} has pooling_mode={given!r} and the flags of {', '.join(sorted(flags))}; delete one "
            "spelling"
        )
    return flags or {str(word) for word in words}


def flags_of(pooling: Pooling) -> dict[str, bool]:
    """The spelling of sentence-transformers before 5.4, which every reader knows."""
    return {flag: mode == POOLINGS[pooling].mode for mode, (flag, _) in POOLING_MODES.items()}


def is_ours(modules: list[str]) -> bool:
    """Whether these kinds of modules, in this order, are what an encoder of ours computes."""
    kinds = [kind for kind, _ in MODULES]
    return modules in (kinds, kinds[:-1])
