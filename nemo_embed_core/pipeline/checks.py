"""What can be known to be wrong before the first stage of a pipeline runs, the cheapest questions first.

setting = checked(config)
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_embed_core.config import ModelConfig, PipelineConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.formats import FORMATS, check_format
from nemo_embed_core.pipeline.method import Chosen, Machine, choose
from nemo_embed_core.pipeline.stages import Setting, document_max_length, read_train_file, train_options
from nemo_embed_core.synthesize.documents import digest_of_documents

# Modules that stages import, and the extra that has each.
NEEDED = {"mteb": "eval", "sentence_transformers": "eval", "datasketch": "inspect"}


def checked(config: PipelineConfig) -> Setting:
    """What the stages are made of. The cheapest questions first."""
    if "RANK" in os.environ:
        raise UserError(
            "the pipeline starts torchrun itself, for the stages that have use for it: start it with python "
            f"and --ranks {os.environ.get('WORLD_SIZE', '1')}"
        )
    if not config.base:
        raise UserError(
            "base is missing: give the model to begin with, a Hugging Face folder. To try it: python -m "
            "nemo_embed_core.demo.pretrained --output runs/smollm2-1 --layers 1 makes one layer of SmolLM2"
        )
    documents = digest_of_documents(config.documents, config.max_documents, config.seed)
    given = read_train_file(config.train)
    _check_installed(config)
    from nemo_embed_core.checkpoint.source import resolve
    from nemo_embed_core.checkpoint.weights import read_model_config
    from nemo_embed_core.data.prompts import query_prompt
    from nemo_embed_core.data.tokenizer import load_tokenizer

    try:
        model = read_model_config(config.base)
        tokenizer = load_tokenizer(resolve(config.base).folder)
        tokenizer.check_fits(model.vocab_size)
    except UserError as error:
        raise UserError(f"base={config.base}: {error}") from None
    if config.layers > model.num_hidden_layers:
        raise UserError(f"layers={config.layers}: {config.base} has {model.num_hidden_layers}")
    machine = Machine.of(config)
    tokenizer.check_prompt(query_prompt(config.task), config.query_max_length, "query_max_length")
    tokenizer.check_prompt("", document_max_length(config, machine), "document_max_length")
    if config.global_batch_size % machine.ranks:
        raise UserError(
            f"global_batch_size={config.global_batch_size} must be a multiple of ranks={machine.ranks}"
        )
    _check_formats(config, model, tokenizer.files)

    def options_of(chosen: Chosen) -> dict[str, Any]:
        return train_options(config, machine, model, chosen, given)

    try:
        chosen = choose(config, machine, model, options_of)
    except UserError as error:
        raise UserError(f"train={config.train}: {error}" if config.train else str(error)) from None
    return Setting(machine, model, documents, chosen, given)


def _check_installed(config: PipelineConfig) -> None:
    wanted = {**NEEDED, **({"openai": "synthesize"} if config.generate.models else {})}
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        extras = ",".join(dict.fromkeys(wanted[name] for name in missing))
        raise UserError(f"{', '.join(missing)} is not installed: pip install 'nemo_embed_core[{extras}]'")
    judge = [config.generate.judge] if config.generate.judge else []
    for one in (*config.generate.models, *judge):
        if one.key_env and not os.environ.get(one.key_env):
            raise UserError(f"generate.models: {one.name}: the environment has no {one.key_env}")


def _check_formats(config: PipelineConfig, model: ModelConfig, files: Mapping[str, bytes]) -> None:
    from nemo_embed_core.export import serving

    if unknown := [name for name in config.formats if name not in FORMATS]:
        raise UserError(f"formats has {unknown[0]}; there are {', '.join(FORMATS)}")
    shape = replace(model, is_causal=False, pooling="mean")
    for name in config.formats:
        check_format(name, shape)  # type: ignore[arg-type]
        serving.check_file(name, shape, files)  # type: ignore[arg-type]
