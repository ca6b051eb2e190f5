from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import llama_tensors
from toy_evaluation import WORDS, word_tokenizer, write_beir

from nemo_embed_core.checkpoint.source import Usage
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.evaluation.run import evaluate
from nemo_embed_core.export.folder import write_folder


@pytest.fixture(scope="session")
def ours(tmp_path_factory) -> Path:
    """A random Llama of two layers in an exported folder, with a query prompt."""
    folder = tmp_path_factory.mktemp("models") / "ours"
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = ModelConfig(vocab_size=len(WORDS), num_attention_heads=2, num_key_value_heads=1, **shape)
    config = {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    files = {
        "tokenizer.json": word_tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    usage = Usage(query_max_length=64, document_max_length=64)
    write_folder(folder, model, "float32", files, usage=usage, card={})
    # As exports were before they said more of themselves, and as others write them.
    settings = {"prompts": {"query": "query: ", "document": ""}, "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 64, "do_lower_case": False})
    )
    generator = torch.Generator().manual_seed(0)
    shapes = llama_tensors(json.loads((folder / "config.json").read_text()))
    weights = {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def static(tmp_path_factory) -> Path:
    """A bag of word vectors saved by sentence-transformers itself: no config.json, no prompts, no length
    limit."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    folder = tmp_path_factory.mktemp("models") / "static"
    vectors = np.random.default_rng(0).normal(size=(len(WORDS), 16)).astype(np.float32)
    bag = StaticEmbedding(word_tokenizer(), embedding_weights=vectors)
    SentenceTransformer(modules=[bag], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="session")
def launcher():
    """launch/evaluate.py as a module; .run(**options) gives its report."""
    file = Path(__file__).parents[2] / "launch" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("launch_evaluate", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(output: Path, **options: Any) -> dict[str, Any]:
        report = evaluate(**{"device": "cpu", "output": str(output), **options})
        written = json.loads(output.read_text())
        assert written == json.loads(json.dumps(report))
        return written

    module.run = run
    return module


@pytest.fixture(scope="session")
def beir(tmp_path_factory) -> Path:
    """12 queries of one word over 20 documents of three words; the document that starts with the word is
    relevant."""
    corpus = [
        {"_id": f"d{i}", "title": "", "text": f"w{i} w{(i + 7) % 20} w{(i + 11) % 20}"} for i in range(20)
    ]
    queries = [{"_id": f"q{i}", "text": f"w{i}", "lang": "de" if i < 9 else "en"} for i in range(12)]
    judged = [(f"q{i}", f"d{i}", 1) for i in range(12)]
    return write_beir(tmp_path_factory.mktemp("data") / "beir", corpus, queries, judged)
