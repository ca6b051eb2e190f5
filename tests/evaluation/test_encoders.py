import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from nemo_embed_core.checkpoint.source import resolve
from nemo_embed_core.config import EvaluateConfig, ModelConfig, UserError
from nemo_embed_core.evaluation.encoders import SentenceTransformerEncoder, folder_digest
from nemo_embed_core.export.folder import write_folder
from nemo_embed_core.export.verify import expected_tensors

WORDS = ["<s>", "<pad>", "<unk>", "query", ":", *(f"w{i}" for i in range(20))]


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """A random Llama of two layers in an exported folder, with a query prompt."""
    folder = tmp_path_factory.mktemp("models") / "ours"
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = ModelConfig(vocab_size=len(WORDS), num_attention_heads=2, num_key_value_heads=1, **shape)
    config = {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    files = {"tokenizer.json": word_tokenizer().to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    write_folder(folder, model, "float32", files, query_prompt="query: ", max_seq_length=64, card={})
    generator = torch.Generator().manual_seed(0)
    shapes = expected_tensors(json.loads((folder / "config.json").read_text()))
    weights = {name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def static(tmp_path_factory) -> Path:
    """A bag of word vectors saved by sentence-transformers itself: no config.json, no prompts, no length limit."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    folder = tmp_path_factory.mktemp("models") / "static"
    vectors = np.random.default_rng(0).normal(size=(len(WORDS), 16)).astype(np.float32)
    bag = StaticEmbedding(word_tokenizer(), embedding_weights=vectors)
    SentenceTransformer(modules=[bag], device="cpu").save(str(folder))
    return folder


def edited(folder: Path, target: Path, file: str, **changes) -> Path:
    """A folder with `folder`'s JSON files and weights, one file changed; a value of ... deletes the key."""
    for source in (*folder.rglob("*.json"), *folder.glob("*.safetensors")):
        copy = target / source.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    value = {**json.loads((target / file).read_text()), **changes}
    (target / file).write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))
    return target


def test_folders_are_told_apart_by_their_content(ours, static, tmp_path):
    assert resolve(ours).kind == "llama"
    assert resolve(static).kind == "sentence-transformers"
    pooling = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    assert resolve(edited(ours, tmp_path / "causal", "config.json", is_causal=...)).kind == "sentence-transformers"
    assert resolve(edited(ours, tmp_path / "bert", "config.json", model_type="bert")).kind == "sentence-transformers"
    assert resolve(edited(ours, tmp_path / "compat", "config.json", model_type="llama_bidirec")).kind == "llama"
    last = edited(ours, tmp_path / "last", "1_Pooling/config.json", **pooling)
    with pytest.raises(UserError, match=r"pools by lasttoken, .* says pooling='avg'"):
        resolve(last)
    assert resolve(edited(last, tmp_path / "both", "config.json", pooling="last")).kind == "sentence-transformers"
    dense = edited(ours, tmp_path / "dense", "config.json")
    modules = json.loads((dense / "modules.json").read_text())
    (dense / "modules.json").write_text(json.dumps([*modules[:2], {**modules[2], "type": "x.Dense"}]))
    assert resolve(dense).kind == "sentence-transformers"


def test_folder_digest_depends_on_names_and_contents(tmp_path):
    digests = []
    for name, content in (("a", "1"), ("a", "2"), ("b", "2")):
        for file in tmp_path.iterdir():
            file.unlink()
        (tmp_path / name).write_text(content)
        digests.append(folder_digest(tmp_path))
    assert len(set(digests)) == 3


def test_a_sentence_transformers_folder_is_cut_at_the_shorter_limit(ours, static):
    encoder = SentenceTransformerEncoder(ours, "cpu", "fp32")
    assert encoder.prompts == {"query": "query: "}  # the document prompt is empty: nothing to put
    texts = ["w1", " ".join(f"w{i % 20}" for i in range(100))]
    whole, cut = encoder.encode(texts, max_length=512), encoder.encode(texts, max_length=8)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole[0], cut[0], atol=1e-6)
    assert np.abs(whole[1] - cut[1]).max() > 1e-3
    # 512 asked, 64 tokens is the folder's own limit: BOS and 63 words
    np.testing.assert_allclose(whole[1], encoder.encode([" ".join(texts[1].split()[:63])])[0], atol=1e-6)
    np.testing.assert_allclose(encoder.encode(["w5"], prompt="query: ")[0], encoder.encode(["query: w5"])[0], atol=1e-6)

    bag = SentenceTransformerEncoder(static, "cpu", "fp32")
    assert bag.prompts == {}
    assert bag.encode(texts, max_length=8).shape == (2, 16)
    assert bag.digest != encoder.digest


def test_a_folder_that_does_not_load_is_a_user_error(tmp_path):
    (tmp_path / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "no.such.Module"}]')
    with pytest.raises(UserError, match="does not load in sentence-transformers"):
        SentenceTransformerEncoder(tmp_path, "cpu", "fp32")


def load_launcher():
    file = Path(__file__).parents[2] / "launch" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("launch_evaluate", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def beir(tmp_path_factory) -> Path:
    """12 queries of one word over 20 documents of three words; the document that starts with the word is relevant."""
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    rows = [{"_id": f"d{i}", "title": "", "text": f"w{i} w{(i + 7) % 20} w{(i + 11) % 20}"} for i in range(20)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"_id": f"q{i}", "text": f"w{i}"} for i in range(12)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"q{i}\td{i}\t1" for i in range(12)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


def test_launcher_compares_our_model_a_foreign_folder_and_bm25(ours, static, beir, tmp_path, capsys, monkeypatch):
    output = tmp_path / "reports" / "report.json"
    models = [str(ours), str(static), "bm25"]
    options = ["--data", str(beir), "--split", "test", "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--models", *models, *options])
    load_launcher().main()
    report = json.loads(output.read_text())
    assert list(report) == models
    for entry in report.values():
        assert entry.keys() == {"ndcg_at_10", "recall_at_10", "mrr_at_10", "seconds"}
        # One relevant document for each query.
        assert 0 <= entry["mrr_at_10"] <= entry["ndcg_at_10"] <= entry["recall_at_10"] <= 1
    # A word is in three documents of equal length, so BM25 cannot do better than chance among the three, nor worse.
    assert report["bm25"]["recall_at_10"] == 1.0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("12 queries of split test, 20 documents")
    assert lines[1].split() == ["model", "ndcg@10", "recall@10", "mrr@10", "seconds"]
    assert [line.split()[0] for line in lines[2:]] == models


def test_our_export_scores_the_same_through_both_loaders(ours, beir):
    """Embedder and sentence-transformers see one model: equal figures when the prompt is the same."""
    from nemo_embed_core.data.readers import read_beir
    from nemo_embed_core.embedder import Embedder
    from nemo_embed_core.evaluation.retrieval import evaluate_retrieval

    foreign = SentenceTransformerEncoder(ours, "cpu", "fp32")
    data = read_beir(beir, "test")

    class Prompted:
        """Our encoder with the folder's own prompt instead of the task's."""

        def __init__(self):
            self.inner = Embedder.load(str(ours), "cpu", "fp32")
            self.digest = self.inner.digest

        def encode(self, texts, prompt="", max_length=512):
            return self.inner.encode(texts, "query: " if prompt else "", max_length)

    theirs = evaluate_retrieval(foreign, data, "ignored: the folder has a prompt")
    assert theirs == evaluate_retrieval(Prompted(), data, "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["bm25", "bm25"]}, "names one twice"),
        ({"models": ["bm25", "no/such/folder"]}, 'no/such/folder is not a folder; .*"bm25"'),
        ({"models": []}, "no models"),
        ({"models": ["bm25"], "split": "validation"}, "validation"),
    ],
)
def test_launcher_refuses_bad_names_before_any_work(beir, options, message):
    with pytest.raises(UserError, match=message):
        load_launcher().evaluate(EvaluateConfig(**{"data": str(beir), **options}))


def test_max_queries_takes_the_first_of_the_split(beir, tmp_path, capsys):
    load_launcher().evaluate(EvaluateConfig(models=["bm25"], data=str(beir), max_queries=5))
    assert capsys.readouterr().out.startswith("5 queries of split test, 20 documents")
