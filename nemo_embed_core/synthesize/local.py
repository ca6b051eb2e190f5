"""A small causal language model of this machine as a generator, through transformers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from nemo_embed_core.config.synthesize import GeneratorConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.parallel.mesh import DTYPES, pick_device, pick_precision
from nemo_embed_core.synthesize.client import Limiter, Request
from nemo_embed_core.synthesize.journal import Reply


class LocalGenerator:
    """config.name: a folder with a causal language model and its tokenizer. One request at a time, on a GPU
    in bf16 where there is one.

    Its reply has the form of an endpoint's. With temperature 0 the likeliest token is taken; otherwise draws
    come from the request's own seed, so that the same request gives the same text.
    """

    def __init__(self, config: GeneratorConfig):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not (Path(config.name) / "config.json").is_file():
            raise UserError(
                f"generate.models: {config.name} is no model folder (no config.json); a model of a server "
                "has a base_url"
            )
        self.config, self.limiter = config, Limiter(0, 0)
        device = pick_device("auto")
        dtype = DTYPES[pick_precision("auto", device)]
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(config.name, local_files_only=True)
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                config.name, local_files_only=True, use_safetensors=True, dtype=dtype
            ).to(device)
        except (OSError, ValueError) as error:
            raise UserError(f"generate.models: {config.name} cannot be loaded: {error}") from None
        self._lock = asyncio.Lock()

    async def complete(self, request: Request) -> Reply:
        async with self._lock:
            return await asyncio.to_thread(self._complete, request)

    def _complete(self, request: Request) -> Reply:
        import torch

        text = request.prompt
        if self._tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self._tokenizer(
            text, return_tensors="pt", add_special_tokens=not self._tokenizer.chat_template
        ).to(self._model.device)
        temperature, count = request.parameters["temperature"], inputs["input_ids"].shape[1]
        torch.manual_seed(request.parameters["seed"])
        how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        with torch.inference_mode():
            ids = self._model.generate(**inputs, max_new_tokens=request.max_output, **how)[0, count:]
        ends = self._model.generation_config.eos_token_id
        ended = len(ids) and int(ids[-1]) in (ends if isinstance(ends, list) else [ends])
        content = self._tokenizer.decode(ids, skip_special_tokens=True)
        choice = {"message": {"content": content}, "finish_reason": "stop" if ended else "length"}
        return Reply(self.config.name, json.dumps({"choices": [choice]}), (count, len(ids)), 0.0)

    async def close(self) -> None:
        pass
