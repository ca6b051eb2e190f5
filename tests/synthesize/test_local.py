"""A toy Llama of this machine as a generator: the form of its replies, its draws, its end."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_hf

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
        return asyncio.run(generator.complete(Request("0", "m", "the query of a", parameters)))

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
