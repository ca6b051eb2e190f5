"""Toy Llamas of this machine as generators: the form of their replies, their draws, their ends."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_hf, write_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nemo_embed_core.config import GeneratorConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.synthesize.client import Request
from nemo_embed_core.synthesize.local import LocalGenerator
from nemo_embed_core.synthesize.validate import Rejected, content


def test_a_local_model_answers_as_an_endpoint_does(tmp_path: Path) -> None:
    write_hf(tmp_path, torch.float32)
    values = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    generator = LocalGenerator(GeneratorConfig(name=str(tmp_path)))

    def reply(seed: int, temperature: float, count: int = 12) -> Any:
        parameters = {"seed": seed, "temperature": temperature, "max_tokens": count}
        return asyncio.run(generator.complete(Request("m", "the query of a", parameters)))

    drawn = [reply(seed, 1.5) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert reply(1, 0.0) == reply(2, 0.0)
    assert drawn[0].tokens[1] == 12 and reply(1, 1.5, 5).tokens[1] == 5 and drawn[0].cost == 0.0
    assert drawn[0].tokens[0] > 2
    with pytest.raises(Rejected, match="cut"):  # it never ends
        content(drawn[0].body)
    asyncio.run(generator.close())


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model folder .* has a base_url"):
        LocalGenerator(GeneratorConfig(name=str(tmp_path)))


def write_chain(folder: Path, after: str, says: str) -> Any:
    """A Llama that says `says` after `after`, then ends, and says nothing else; its tokenizer."""
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (first,), (second,) = (tokenizer.encode(word, add_special_tokens=False) for word in (after, says))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=380, hidden_size=380, intermediate_size=8, num_hidden_layers=1, num_attention_heads=10,
            eos_token_id=[7, tokenizer.eos_token_id], bos_token_id=0,
        )
    )  # fmt: skip
    weights = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    weights |= {name: torch.ones_like(value) for name, value in weights.items() if "norm" in name}
    weights["model.embed_tokens.weight"].fill_diagonal_(1.0)
    for before, next_one in ((first, second), (second, tokenizer.eos_token_id)):
        weights["lm_head.weight"][next_one, before] = 1.0
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    return tokenizer


def test_a_chat_model_reads_its_template_and_ends(tmp_path: Path) -> None:
    tokenizer = write_chain(tmp_path, after=" green", says=" llama")
    prompt, end = (
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% if add_generation_prompt %} green{% endif %}",
    )
    tokenizer.chat_template = f"[{prompt}]{end}"
    tokenizer.save_pretrained(tmp_path)
    generator = LocalGenerator(GeneratorConfig(name=str(tmp_path)))
    for temperature in (0.0, 0.1):
        parameters = {"seed": 3, "temperature": temperature, "max_tokens": 9}
        reply = asyncio.run(generator.complete(Request("m", "river moon", parameters)))
        assert content(reply.body) == "Ġllama"  # the toy's tokenizer has no decoder
        whole = tokenizer.encode("[river moon] green", add_special_tokens=False)
        assert reply.tokens == (len(whole), 2)
