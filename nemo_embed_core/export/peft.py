"""LoRA adapters as a folder of the peft library: adapter_config.json and adapter_model.safetensors.

There each of q, k, v, gate and up has an A and a B of its own: the A that the fused ones share is written for
each, rows of B go to where Hugging Face's weights have theirs. Values are the fp32 masters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from nemo_embed_core.checkpoint.source import Usage
from nemo_embed_core.checkpoint.weights import Weights
from nemo_embed_core.data.tokenizer_files import export_files, json_bytes
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.card import Card
from nemo_embed_core.files.durable import write_bytes
from nemo_embed_core.files.safetensors import SafetensorsWriter
from nemo_embed_core.model.spec import POOLINGS, hf_shapes

PEFT = "peft"  # as --format says it
_PREFIX = "base_model.model."  # PeftModel's and LoraModel's, before the base's own names


def write_adapter(
    output: Path, source: Weights, tokenizer_files: Mapping[str, bytes], usage: Usage, card: Card
) -> None:
    """Write the files of a checkpoint of adapters into the folder `output`; UserError for another one."""
    if source.adapted is None:
        raise UserError(f"format=peft writes LoRA adapters, and {source.folder} holds a whole model")
    lora, tensors, targets = source.adapted.adapter.lora, {}, set[str]()
    for name in hf_shapes(source.model):
        if (factors := source.adapted.factors(name)) is not None:
            layer = name.removesuffix(".weight")
            targets.add(layer.rpartition(".")[2])
            for part, factor in zip("AB", factors, strict=True):
                tensors[f"{_PREFIX}{layer}.lora_{part}.weight"] = factor.contiguous()
    entries = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(output / "adapter_model.safetensors", entries) as writer:
        for tensor in tensors.values():
            writer.write(tensor)
        writer.close()
    base = card.get("base_model", Path(source.adapted.adapter.base).name)
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    trained = source.adapted.manifest["config"]["lora"]
    dropout = trained.get("dropout", 0.0)  # there was none when the option was not there
    settings = {
        "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": base,
        "r": lora.rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": sorted(targets),
        "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    files = {"adapter_config.json": json_bytes(settings), "README.md": _readme(output, source, base, usage)}
    files |= export_files(tokenizer_files, max_length=usage.longest, transformers_4=False)[0]
    files |= card.get("license_files", {})
    for name, content in files.items():
        write_bytes(output / name, content)


def _readme(output: Path, source: Weights, base: str, usage: Usage) -> bytes:
    model = source.model
    lines = [
        "---", "library_name: peft", f"base_model: {base}", "tags: [lora, sentence-similarity]", "---", "",
        f"LoRA adapters of `{base}` for text embeddings ({POOLINGS[model.pooling].words}; unit length), "
        f"from {source.name}. peft does not know how texts are encoded, so it is said here:", "",
        "```python",
        "from peft import PeftModel", "from transformers import AutoConfig, AutoModel", "",
        f"config = AutoConfig.from_pretrained({base!r})",
        f"config.is_causal = {model.is_causal}  # as trained; needs transformers >= 5.2",
        f"model = AutoModel.from_pretrained({base!r}, config=config)",
        'model = PeftModel.from_pretrained(model, "this folder")',
        "```", "", *(f"- {line}" for line in usage.lines("`")), "",
        "`launch/merge.py` without `--format peft` writes the folded model, which needs none of this.", "",
    ]  # fmt: skip
    return "\n".join(lines).encode()
