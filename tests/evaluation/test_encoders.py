import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from toy_evaluation import copied

from nemo_embed_core.checkpoint.source import resolve
from nemo_embed_core.encoders import onnx_runtime, open_encoder
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.encoders.sentence_transformer import SentenceTransformerEncoder
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import sha256_folder


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
    pooling = {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}
    assert (
        resolve(edited(ours, tmp_path / "causal", "config.json", is_causal=...)).kind
        == "sentence-transformers"
    )
    assert (
        resolve(edited(ours, tmp_path / "bert", "config.json", model_type="bert")).kind
        == "sentence-transformers"
    )
    assert (
        resolve(edited(ours, tmp_path / "compat", "config.json", model_type="llama_bidirec")).kind == "llama"
    )
    last = edited(ours, tmp_path / "max", "1_Pooling/config.json", **pooling)
    with pytest.raises(UserError, match=r"pools by max, .* says pooling='avg'"):
        resolve(last)
    assert (
        resolve(edited(last, tmp_path / "both", "config.json", pooling="max")).kind == "sentence-transformers"
    )
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
        digests.append(sha256_folder(tmp_path))
    assert len(set(digests)) == 3


def test_a_sentence_transformers_folder_is_cut_at_the_shorter_limit(ours, static):
    encoder = SentenceTransformerEncoder(ours, "cpu", "fp32")
    texts = ["w1", " ".join(f"w{i % 20}" for i in range(100))]
    whole, cut = encoder.encode(texts, max_length=512), encoder.encode(texts, max_length=8)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole[0], cut[0], atol=1e-6)
    assert np.abs(whole[1] - cut[1]).max() > 1e-3
    # 512 asked, 64 tokens is the folder's own limit: BOS and 63 words
    np.testing.assert_allclose(whole[1], encoder.encode([" ".join(texts[1].split()[:63])])[0], atol=1e-6)
    np.testing.assert_allclose(
        encoder.encode(["w5"], prompt="query: ")[0], encoder.encode(["query: w5"])[0], atol=1e-6
    )

    bag = SentenceTransformerEncoder(static, "cpu", "fp32")
    assert bag.encode(texts, max_length=8).shape == (2, 16)
    assert bag.digest != encoder.digest


def test_a_sentence_transformers_folder_says_what_it_cuts_and_refuses_a_prompt_that_leaves_no_room(
    ours, static
):
    encoder, bag = (SentenceTransformerEncoder(folder, "cpu", "fp32") for folder in (ours, static))
    texts = [
        "w1",
        " ".join("w2" for _ in range(63)),
        " ".join("w3" for _ in range(64)),
        " ".join("w4" for _ in range(9)),
    ]
    ids, num_truncated = encoder.tokenize(texts, max_length=512)  # BOS and 63 words fit
    assert [len(row) for row in ids] == [2, 64, 64, 10] and num_truncated == 1
    ids, num_truncated = encoder.tokenize(texts, prompt="query: ", max_length=12)
    assert [len(row) for row in ids] == [4, 12, 12, 12] and num_truncated == 2
    assert ids[0].tolist() == [0, 3, 4, 6]
    ids, num_truncated = bag.tokenize(texts, max_length=3)
    assert [len(row) for row in ids] == [2, 64, 65, 10] and num_truncated == 0

    encoder.check_prompt("query: ", 7, "query_max_length")  # BOS, two words and four of the text
    with pytest.raises(
        UserError, match=r"query_max_length=6 tokens leaves no room .*'query: ' alone has 3; raise it to"
    ):
        encoder.check_prompt("query: ", 6, "query_max_length")
    with pytest.raises(
        UserError, match=r"=64 tokens leaves no room .* alone has 67; the folder takes no more tokens"
    ):
        encoder.check_prompt("query: " + "w1 " * 64, 512, "query_max_length")
    bag.check_prompt("w1 " * 600, 512, "query_max_length")


def test_a_folder_that_does_not_load_is_a_user_error(tmp_path):
    (tmp_path / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "no.such.Module"}]')
    with pytest.raises(UserError, match="does not load in sentence-transformers"):
        SentenceTransformerEncoder(tmp_path, "cpu", "fp32")


def test_open_encoder_takes_whom_the_folder_needs(ours, static, tmp_path):
    text = ["w1 w2"]
    packed, library = (open_encoder(ours, "cpu", by=by) for by in ("auto", "sentence-transformers"))
    assert isinstance(packed, Embedder) and isinstance(library, SentenceTransformerEncoder)
    assert packed.hidden_size == library.hidden_size == 32
    np.testing.assert_allclose(packed.encode(text), library.encode(text), atol=1e-5)
    assert isinstance(open_encoder(resolve(static), "cpu"), SentenceTransformerEncoder)
    with pytest.raises(UserError, match="is a sentence-transformers model with"):
        open_encoder(static, "cpu", by="ours")
    np.save(tmp_path / "documents.npy", np.ones((2, 3), np.float32))
    with pytest.raises(UserError, match="holds embeddings of other texts"):
        open_encoder(tmp_path, "cpu")


def test_vectors_are_cut_as_sentence_transformers_cuts_them(ours, static):
    from sentence_transformers import SentenceTransformer

    texts = ["w1 w2 w3", "w4 w5", "w1"]
    whole, cut = open_encoder(ours), open_encoder(ours, dim=5)
    peer = SentenceTransformer(str(ours), device="cpu", truncate_dim=5)
    want = peer.encode(texts, normalize_embeddings=True)
    for encoder in (cut, open_encoder(ours, dim=5, by="sentence-transformers")):
        assert encoder.hidden_size == 5 and np.abs(encoder.encode(texts) - want).max() < 1e-6
    assert cut.digest != whole.digest and whole.encode(texts).shape[1] == 32
    # Rows that are not of length 1 stay so.
    assert np.array_equal(
        open_encoder(static, dim=3).encode(texts), open_encoder(static).encode(texts)[:, :3]
    )
    # Each row by its own length, whatever stands beside it.
    library = open_encoder(ours, dim=2, by="sentence-transformers")
    rows = np.array([[0.6, 0.0, 0.8], [3.0, 4.0, 12.0], [0.0, 0.0, 1.0]], np.float32)
    library._model.encode = lambda texts, **_: rows[: len(texts)]
    assert np.abs(library.encode(["a"]) - [[1, 0]]).max() < 1e-6
    assert np.abs(library.encode(["a"] * 3) - [[1, 0], [3, 4], [0, 0]]).max() < 1e-6
    for path in (ours, static):
        with pytest.raises(UserError, match=r"have \d+ columns and cannot be cut to 99"):
            open_encoder(path, dim=99)


def test_a_model_is_evaluated_at_several_widths(ours, beir):
    from nemo_embed_core.evaluation.run import evaluate

    report = evaluate([ours, f"{ours}@4", f"{ours}@32"], beir)
    figures = [report[name]["ndcg_at_10"] for name in map(str, (ours, f"{ours}@4", f"{ours}@32"))]
    assert figures[0] != figures[1] and figures[0] == figures[2]
    with pytest.raises(UserError, match="@33: the model's vectors have 32 columns"):
        evaluate([f"{ours}@33"], beir)


def test_widths_of_a_training_stay_with_the_model():
    from nemo_embed_core.checkpoint.source import Usage
    from nemo_embed_core.config import ModelConfig
    from nemo_embed_core.export.card import model_card
    from nemo_embed_core.merge.usage import united_usage

    one, two = Usage(dims=(64, 16, 8)), Usage(dims=(8, 64, 32))
    assert Usage.from_json(one.to_json(), one.pooling, "x") == one and "dims" not in Usage().to_json()
    united, said = united_usage([("one", one), ("two", two)])
    assert united.dims == (64, 8) and any("widths 16, 32 are not said by all" in line for line in said)
    card = model_card(ModelConfig(), "float32", united, {})
    assert "- Widths: trained for the first 64, 8 columns, normalised again\n" in card


# ------------------------------------------------------------------------------------------ onnx


def test_a_served_file_is_scored_beside_the_model_that_it_was_made_of(
    ours, static, beir, launcher, tmp_path, monkeypatch
):
    """By a stand-in for onnxruntime that runs our own encoder on what the mask lets through."""
    folder = copied(ours, tmp_path / "model")
    (folder / "onnx").mkdir()
    files = [folder / "onnx" / name for name in ("model.onnx", "model_int8.onnx")]
    batches = []

    class Session:
        def __init__(self, path, providers):
            assert providers == ["CPUExecutionProvider"]
            self.embedder, self.is_worse = Embedder.load(folder, "cpu", "fp32"), "int8" in path

        def get_outputs(self):
            return [SimpleNamespace(shape=["texts", 32])]

        def run(self, names, inputs):
            assert names == ["sentence_embedding"]
            batches.append(inputs["input_ids"].shape)
            both = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            rows = self.embedder.encode_tokens([ids[mask > 0].astype(np.int32) for ids, mask in both])
            return [rows[:, ::-1] * (np.arange(32) < 2) if self.is_worse else rows]

    for file in files:
        file.write_text(file.name)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    monkeypatch.setattr(onnx_runtime, "BATCH_TOKENS", 20)
    ragged = ["w1", "w1 w2 w3 w4 w5 w6 w7 w8", "", "w5 w6"]
    rows = onnx_runtime.OnnxEncoder(files[0]).encode(ragged, "query: ", 9)
    assert np.abs(rows - Embedder.load(folder, "cpu", "fp32").encode(ragged, "query: ", 9)).max() < 1e-6
    models = [str(folder), *map(str, files)]
    report = launcher.run(tmp_path / "report.json", models=models, data=str(beir))
    whole, exact, worse = (report[model] for model in models)
    for metric in ("ndcg_at_10", "mrr_at_10"):
        assert exact[metric] == pytest.approx(whole[metric], abs=1e-6) and worse[metric] != whole[metric]
    assert exact["prompts"] == whole["prompts"] == {"query": "query: ", "document": ""}
    assert (exact["precision"], worse["precision"]) == ("model", "model_int8")
    assert len({entry["digest"] for entry in (whole, exact, worse)}) == 3
    assert max(N * L for N, L in batches) <= 20 and max(N for N, _ in batches) > 1
    with pytest.raises(UserError, match="runs on the CPU in its own precision"):
        launcher.run(tmp_path / "no.json", models=models[1:], data=str(beir), precision="fp32")
    alone = copied(static, tmp_path / "static")
    (alone / "onnx").mkdir()
    (alone / "onnx" / "model.onnx").touch()
    with pytest.raises(UserError, match="no export of ours is around it"):
        launcher.run(tmp_path / "no.json", models=[str(alone / "onnx/model.onnx")], data=str(beir))
