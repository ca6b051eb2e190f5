"""Programs that serve an export: what is compared of those that run, how others are judged, and faults.

The slow tests run onnxruntime and llama.cpp on each kind of model, and with each fault that serving is known
for planted into their files; `make consumers` installs them and prints the table.
"""

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODEL, write_tokenizer

from nemo_embed_core.checkpoint.source import Prompts, Usage
from nemo_embed_core.config import ModelConfig, RopeScaling
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.errors import UserError
from nemo_embed_core.export import gguf, onnx, serving
from nemo_embed_core.export.card import serving_section
from nemo_embed_core.export.consumers import NUM_PROMPTED, backend
from nemo_embed_core.export.faults import check_faults
from nemo_embed_core.export.folder import hf_config, write_folder
from nemo_embed_core.export.formats import CONSUMERS, FORMATS, LIBRARIES, VARIANTS, Answer
from nemo_embed_core.merge import merge
from nemo_embed_core.model.spec import hf_shapes

USAGE = Usage(prompts={"qa": Prompts("find it: ", "read: ")}, query_max_length=24, document_max_length=40)
# What of the toy (llama3 positions, grouped heads) each is another in; MODELS["llama"] is the toy.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "smollm": {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4},
    "mistral": {"model_type": "mistral", "rope_scaling": RopeScaling(rope_type="linear", factor=2.0)},
    "qwen2": {"model_type": "qwen2", "rope_scaling": None, "pooling": "cls", "head_dim": 8},
    "qwen3": {"model_type": "qwen3", "rope_scaling": None, "pooling": "last"},
    "yarn": {
        "rope_scaling": RopeScaling(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.3
        )
    },
    "ministral3": {
        "model_type": "ministral3",
        "rope_scaling": RopeScaling(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=8,
            beta_fast=4.0,
            beta_slow=0.5,
            mscale=0.7,
            mscale_all_dim=0.4,
            llama_4_scaling_beta=0.3,
        ),
    },
    "causal": {"is_causal": True, "pooling": "last", "rope_scaling": None},
}


def model_of(name: str) -> ModelConfig:
    own = {"rope_scaling": None} if name == "smollm" else {}
    return replace(MODEL, **{**own, **MODELS[name]})


def write(folder: Path, model: ModelConfig) -> Path:
    files = {file.name: file.read_bytes() for file in write_tokenizer(folder).iterdir()}
    write_folder(folder, replace(model, pooling=model.pooling), "float32", files, usage=USAGE, card={})
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator) / s[-1] ** 0.5 for n, s in hf_shapes(model).items()}
    state = {n: 1 + 0.3 * w.tanh() if n.endswith("norm.weight") else w for n, w in weights.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("serving") / "toy", MODEL)


def embed(texts: list[str], limit: int) -> np.ndarray:
    """Stands for our encoder: rows that no two texts, and no two limits, have in common."""
    rows = [np.random.default_rng([limit, *text.encode()]).normal(size=16) for text in texts]
    return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


# ------------------------------------------------------------------------------------------ what is compared


@pytest.fixture
def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, np.ndarray]]:
    """What a faultless onnxruntime would answer, to be damaged before ask() is called."""
    (folder / "onnx").mkdir(exist_ok=True)
    (folder / "onnx" / "model.onnx").touch()
    tokenizer, texts = backend(folder, 40)
    limit, long_text = 40, texts[-1] * (40 // (40 // 2) + 2)
    rows = [tokenizer.encode(text).ids for text in (*texts, long_text)]
    prompted = texts[:NUM_PROMPTED]
    found = {
        "version": np.array("onnxruntime 9"),
        "token_ids": np.concatenate(rows),
        "token_counts": np.array([len(row) for row in rows]),
        **{key: embed(texts, limit) for key in ("alone_ND", "together_ND", "left_padded_ND")},
        "cut_1D": embed([long_text], limit),
        "queries_MD": embed([f"find it: {text}" for text in prompted], limit),
        "documents_MD": embed([f"read: {text}" for text in prompted], limit),
    }
    monkeypatch.setattr(serving, "_vectors", lambda path, name, request: found)
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: object())
    yield found
    shutil.rmtree(folder / "onnx")


def test_a_faultless_consumer_is_proven_with_its_version(folder: Path, served: dict[str, np.ndarray]) -> None:
    answer = serving.ask(folder, "onnxruntime", embed)
    assert answer.state == "proven"
    assert answer.words.startswith(
        "onnxruntime 9: 21 texts alone, together, padded on the left, one that is cut, 4 "
    )
    card = serving_section([answer, Answer("tei", "refused", "not run; by its source: no")], USAGE)
    assert (
        "`InferenceSession" in card
        and "at most 40 tokens" in card
        and "Prompt before a query: 'find it: '" in card
    )
    assert "text-embeddings-router" not in card, "no command of who would not serve it"


@pytest.mark.parametrize(
    "key", ["alone_ND", "together_ND", "left_padded_ND", "cut_1D", "queries_MD", "documents_MD"]
)
def test_every_kind_of_vectors_is_compared(folder: Path, served: dict[str, np.ndarray], key: str) -> None:
    served[key] = served[key].copy()
    served[key][-1, 3] += 1e-3
    with pytest.raises(UserError, match=r"onnxruntime's vectors .* and our encoder's disagree"):
        serving.ask(folder, "onnxruntime", embed)


def test_other_tokens_are_named(folder: Path, served: dict[str, np.ndarray]) -> None:
    served["token_ids"] = served["token_ids"].copy()
    served["token_ids"][served["token_counts"][0] + 1] += 1  # of the second text
    with pytest.raises(UserError, match=r"onnxruntime gives \d+ tokens .* for 'How do neural"):
        serving.ask(folder, "onnxruntime", embed)


def test_who_is_not_installed_is_said_to_be_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has no onnx/model\.onnx, .* export it with --format onnx"):
        serving.ask(folder, "onnxruntime", embed)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").touch()
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    answer = serving.ask(folder, "onnxruntime", embed)
    shutil.rmtree(folder / "onnx")
    assert (answer.state, "not run" in answer.words) == ("written", True)


# ------------------------------------------------------------------------------------------ variants


NOISE = 0.004  # of a coordinate, of 64: cosines of about 0.9995


def of_variant(
    embedder: Embedder, request: dict[str, Any], noise: float = 0.0, unprompted: bool = False
) -> dict[str, np.ndarray]:
    """clients.py's arrays, as a variant of these weights would give them in eight bits."""
    texts, limit = request["texts"], 40
    long_text = texts[-1] * request["num_repeats"]
    tokenizer = embedder.tokenizer
    rows = tokenizer.encode([*texts, long_text], limit)
    generator = np.random.default_rng(0)

    def noisy(texts: list[str]) -> np.ndarray:
        exact = embedder.encode(texts, max_length=limit)
        near = exact + noise * generator.standard_normal(exact.shape).astype(np.float32)
        return near / np.linalg.norm(near, axis=1, keepdims=True)

    prompted = texts[: request["num_prompted"]]
    query, document = ("", "") if unprompted else ("find it: ", "read: ")
    return {
        "version": np.array("onnxruntime 9"),
        "token_ids": np.concatenate(rows),
        "token_counts": np.array([len(row) for row in rows]),
        **{key: noisy(texts) for key in ("alone_ND", "together_ND", "left_padded_ND")},
        "cut_1D": noisy([long_text]),
        "queries_MD": noisy([query + text for text in prompted]),
        "documents_MD": noisy([document + text for text in prompted]),
    }


@pytest.fixture
def with_variant(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ask() of a copy of the toy with this variant, of these weights; the rest is faultless."""
    path = shutil.copytree(folder, tmp_path / "toy")
    (path / "onnx").mkdir()
    exact = Embedder.load(str(path), "cpu", "fp32")

    def ask(name: str, embedder: Embedder | None = None, **how: Any) -> Answer:
        for file in ("model.onnx", f"model_{name}.onnx"):
            (path / "onnx" / file).touch()

        def vectors(path: Path, consumer: str, request: dict[str, Any]) -> dict[str, np.ndarray]:
            if request["file"] == "onnx/model.onnx":
                return of_variant(exact, request)
            return of_variant(embedder or exact, request, NOISE, **how)

        monkeypatch.setattr(serving, "_vectors", vectors)
        monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: object())
        return serving.ask(path, "onnxruntime", lambda texts, limit: exact.encode(texts, max_length=limit))

    return ask


def test_a_variants_lowest_cosine_is_said_and_fp16_has_to_keep_its_own(with_variant: Any) -> None:
    words = with_variant("int8").words
    assert re.search(
        r"cosine \d\.\d{7}; onnx/model_int8\.onnx: lowest cosine 0\.999[1-8]\d{3}, measured", words
    )
    with pytest.raises(
        UserError, match=r"model_fp16\.onnx .* a cosine of 0\.99\d+ with ours; fp16 must have 0\.99"
    ):
        with_variant("fp16")


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("causal mask", "a causal mask"),
        ("other pooling", "pooling=cls"),
        ("dropped final norm", "no final norm"),
        ("missing prompt", "a missing prompt"),
    ],
)
def test_a_fault_is_found_under_the_noise_of_eight_bits(
    folder: Path, tmp_path: Path, with_variant: Any, fault: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(folder, tmp_path / "other")
    faulty = Embedder.load(str(damaged(copy, fault, monkeypatch)), "cpu", "fp32")
    with pytest.raises(UserError, match=rf"model_int8\.onnx .*: \d+% of what {named} would change"):
        with_variant("int8", faulty, unprompted=fault == "missing prompt")


def test_vectors_of_any_length_are_found_in_a_variant() -> None:
    rows = np.eye(3, 4, dtype=np.float32)
    check_faults("a", rows, rows, {"unseen": rows + 1e-5})
    with pytest.raises(UserError, match=r"rows of length 1\.000 to 1\.010, not normalised"):
        check_faults("a", rows * np.array([[1], [1.01], [1]]), rows, {})


def test_variants_are_of_their_format(tmp_path: Path) -> None:
    for format, variants in (("native", ["fp16"]), ("gguf", ["q8_0", "int8"]), ("onnx", ["int4"])):
        with pytest.raises(
            UserError, match=f"--format {format} has no variant {variants[-1]}; there are fp16"
        ):
            merge.merge("runs/x", tmp_path / "out", format=format, variants=variants)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ who is judged


@pytest.mark.parametrize(
    ("consumer", "changes", "state"),
    [
        ("vllm", {}, "accepted"),
        ("vllm", {"pooling": "weightedmean"}, "refused"),
        ("vllm", {"model_type": "qwen3"}, "unknown"),
        ("tei", {}, "refused"),  # llama3 positions
        ("tei", {"rope_scaling": None}, "accepted"),
        ("tei", {"rope_scaling": None, "pooling": "weightedmean"}, "refused"),
        ("tei", {"rope_scaling": None, "model_type": "qwen2"}, "refused"),
        ("tei", MODELS["ministral3"], "refused"),
        ("tei", {"rope_scaling": None, "model_type": "qwen3"}, "wrong"),
        ("tei", {"rope_scaling": None, "model_type": "qwen3", "is_causal": True}, "accepted"),
        (
            "tei",
            {"rope_scaling": RopeScaling(rope_type="linear"), "model_type": "mistral", "is_causal": True},
            "wrong",
        ),
    ],
)
def test_who_cannot_be_run_here_is_judged_by_its_source(
    consumer: str, changes: dict[str, Any], state: str
) -> None:
    model = replace(MODEL, **changes)
    assert serving.JUDGES[consumer](hf_config(model, "float32", {}), model)[0] == state


def test_check_names_those_that_would_not_serve_it(folder: Path) -> None:
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"is not for tei: not run; by its source: its Llama takes no rope_scaling"
    ):
        merge.check(folder, consumers=["vllm", "tei"], say=said.append)
    assert any("vllm: accepted, not run" in line for line in said)
    with pytest.raises(UserError, match="'ollama' is none of transformers"):
        merge.check(folder, consumers=["ollama"])
    assert set(LIBRARIES) < set(CONSUMERS)


# ------------------------------------------------------------------------------------------ onnx


@pytest.mark.parametrize("pooling", onnx.POOL)
def test_pooling_inside_the_file_takes_padding_on_either_side(pooling: Any) -> None:
    hidden_NLD = torch.randn(3, 5, 4, dtype=torch.float64)
    mask_NL = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    rows = []
    for hidden_LD, mask_L in zip(hidden_NLD, mask_NL, strict=True):
        own = hidden_LD[mask_L.bool()]
        weights = torch.arange(1, len(own) + 1, dtype=torch.float64)
        rows.append({
            "mean": own.mean(0), "last": own[-1], "cls": own[0],
            "weightedmean": (own * weights[:, None]).sum(0) / weights.sum(),
        }[pooling])  # fmt: skip
    torch.testing.assert_close(onnx.POOL[pooling](hidden_NLD, mask_NL.double()), torch.stack(rows))


# consumer -> (what writes its file, the modules that this takes)
RUN = {
    "onnxruntime": (onnx.write_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "llama.cpp": (gguf.write_gguf, ("gguf", "xllamacpp")),
}
runs = pytest.mark.parametrize(
    "consumer",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                any(importlib.util.find_spec(module) is None for module in modules),
                reason=f"no {', '.join(modules)}: `make consumers` installs them",
            ),
        )
        for name, (_, modules) in RUN.items()
    ],
)


def ours(folder: Path) -> Any:
    return lambda texts, limit: Embedder.load(str(folder), "cpu", "fp32").encode(texts, max_length=limit)


@pytest.mark.slow
@runs
def test_every_base_model_gives_our_vectors_where_it_is_served(
    tmp_path: Path, capsys: Any, consumer: str
) -> None:
    rows = []
    format = next(format for format, entry in FORMATS.items() if entry.consumer == consumer)
    variants = [name for name, variant in VARIANTS.items() if variant.format == format]
    for name in MODELS:
        path = write(tmp_path / name, model_of(name))
        file = serving.write_files(format, path, variants)[0].relative_to(path)
        rows.append((consumer, str(file), name, *serving.ask(path, consumer, ours(path))[1:]))
    with capsys.disabled():
        print("\n\n| consumer | file | model | result | |\n|---|---|---|---|---|")
        for row in rows:
            print(f"| {' | '.join(row)} |")
    assert {row[3] for row in rows} == {"proven"}


def damaged(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that says or holds the fault, of which the served file is written."""
    copy = shutil.copytree(folder, folder.with_name(f"{folder.name}-{fault.replace(' ', '-')}"))
    for file, key, value in {
        "causal mask": [
            ("config.json", "is_causal", True),
            ("config.json", "use_bidirectional_attention", False),
        ],
        "other pooling": [
            ("config.json", "pooling", "cls"),
            ("1_Pooling/config.json", "pooling_mode_mean_tokens", False),
            ("1_Pooling/config.json", "pooling_mode_cls_token", True),
        ],
    }.get(fault, []):
        (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), key: value}))
    if fault == "dropped final norm":
        state = load_file(copy / "model.safetensors")
        state["norm.weight"].fill_(1)
        save_file(state, copy / "model.safetensors", {"format": "pt"})
    if fault == "vectors of any length":
        monkeypatch.setattr(torch.nn.functional, "normalize", lambda x, **_: x)
    return copy


@pytest.mark.slow
@runs
@pytest.mark.parametrize(
    "fault", ["causal mask", "other pooling", "dropped final norm", "vectors of any length", "missing prompt"]
)
def test_a_fault_of_serving_is_found_in_each(
    tmp_path: Path, fault: str, consumer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write_file = write(tmp_path / "toy", MODEL), RUN[consumer][0]
    if fault == "vectors of any length" and consumer == "llama.cpp":
        pytest.skip("the server normalises, no file can stop it")
    embedder = Embedder.load(str(folder), "cpu", "fp32")
    write_file(damaged(folder, fault, monkeypatch), folder / CONSUMERS[consumer].file)
    monkeypatch.undo()
    if fault == "missing prompt":  # of what the caller reads; how the model was trained is still known
        file = folder / "config_sentence_transformers.json"
        settings = json.loads(file.read_text())
        prompts = {**settings["prompts"], "query": ""}
        file.write_text(json.dumps({**settings, "prompts": prompts}))
        monkeypatch.setattr(serving, "usage_of_folder", lambda path: USAGE)
    message = rf"{consumer}'s vectors \({'queries' if fault == 'missing prompt' else 'alone'}\) .* disagree"
    with pytest.raises(UserError, match=message):
        serving.ask(folder, consumer, lambda texts, limit: embedder.encode(texts, max_length=limit))


@pytest.mark.slow
@runs
@pytest.mark.parametrize("fault", ["causal mask", "other pooling", "dropped final norm"])
def test_a_fault_of_a_variant_alone_is_found_in_each(
    tmp_path: Path, fault: str, consumer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "toy", MODEL)
    RUN[consumer][0](folder)
    format = next(format for format, entry in FORMATS.items() if entry.consumer == consumer)
    names = [name for name, variant in VARIANTS.items() if variant.format == format]
    copy = damaged(folder, fault, monkeypatch)
    serving.write_files(format, copy, names)
    for name in names:
        file = VARIANTS[name].file
        shutil.copy(copy / file, folder / file)
        with pytest.raises(UserError, match=rf"{file} \(alone\): \d+% of what .* would change is in"):
            serving.ask(folder, consumer, ours(folder))
        (folder / file).unlink()
