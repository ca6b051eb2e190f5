"""Each fault is planted into a copy of a good folder; the two faults of behaviour need a real reload, the
rest must not."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Server
from safetensors.torch import load_file, save_file
from tiny import llama_tensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nemo_embed_core.checkpoint.source import Prompts, Usage
from nemo_embed_core.config import ModelConfig, RopeScaling
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.errors import UserError
from nemo_embed_core.export import consumers, proof
from nemo_embed_core.export.consumers import TEXTS, backend, check_prompts, check_tokens
from nemo_embed_core.export.folder import hf_config, write_folder
from nemo_embed_core.export.formats import FORMATS
from nemo_embed_core.export.proof import TOLERANCE, compare_vectors, verify_folder
from nemo_embed_core.model.spec import hf_shapes

TESTS = Path(__file__).parents[1]
REMOTE_CODE, AUTO_MAP = FORMATS["compat"].code, FORMATS["compat"].auto_map
MODEL = ModelConfig(
    vocab_size=330,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # not hidden_size / num_attention_heads
    max_position_embeddings=2048,
    rope_scaling=RopeScaling(original_max_position_embeddings=128),
)


USAGE = Usage(
    prompts={
        "qa": Prompts("Instruct: x\nQuery: ", "Instruct: y\nQuery: "),
        "sts": Prompts("Instruct: z\nQuery: "),
    },
    query_max_length=96,
    document_max_length=512,
)


def tokenizer_files() -> dict[str, bytes]:
    """A byte-level BPE of 330 entries that puts BOS before every text, in the manner of Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", pair=f"{special[0]} $A $B", special_tokens=[(special[0], 0)]
    )
    config = {"bos_token": special[0], "eos_token": special[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def random_weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = llama_tensors(hf_config(MODEL, "float32", {}))
    scaled = {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()
    }
    return {name: (1 + 0.1 * w if w.dim() == 1 else w).to(dtype) for name, w in scaled.items()}


def write(folder, dtype: str = "float32", format: str = "native"):
    write_folder(folder, MODEL, dtype, tokenizer_files(), format=format, usage=USAGE, card={})
    save_file(random_weights(getattr(torch, dtype)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("export") / "good")


@pytest.fixture(scope="module")
def compat(tmp_path_factory):
    return write(tmp_path_factory.mktemp("export") / "compat", format="compat")


@pytest.fixture
def folder(good, tmp_path):
    """A copy to damage."""
    return shutil.copytree(good, tmp_path / "folder")


@pytest.fixture
def warm(server: Server, monkeypatch):
    """Where a folder is reloaded: in forks of a process that has the libraries, ten seconds less for each."""
    names = "AutoModel", "AutoTokenizer", "LlamaModel"
    server.preload(*(f"transformers:{n}" for n in names), "sentence_transformers:SentenceTransformer")
    real_run = subprocess.run

    def run(argv, *, env=None, **others):
        if argv[0] != sys.executable:  # git
            return real_run(argv, env=env, **others)
        ended = server.launch(argv[1:], env)
        return subprocess.CompletedProcess(argv, ended.code, "", ended.output)

    monkeypatch.setattr(consumers.subprocess, "run", run)


@pytest.fixture
def no_reload(monkeypatch):
    """Faults of the files must be found before ten seconds of imports."""

    def reached(*_, **__):
        raise AssertionError("the files passed")

    monkeypatch.setattr(proof, "reload_folder", reached)


def edit(file, **changes):
    """Set keys of a JSON object; a value of ... deletes the key."""
    value = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_transformers_has_exactly_the_expected_tensors():
    from transformers import LlamaConfig, LlamaModel

    config = hf_config(MODEL, "float32", {})
    with torch.device("meta"):
        theirs = LlamaModel(LlamaConfig(**config)).state_dict()
    found = {name: tuple(weight.shape) for name, weight in theirs.items()}
    assert found == hf_shapes(MODEL) == llama_tensors(config)


def embed(folder):
    """For verify_folder."""
    return lambda texts, limit: Embedder.load(str(folder), "cpu", "fp32").encode(texts, max_length=limit)


def check_report(report, dtype: str = "float32") -> None:
    assert (report["tensors"], report["dtype"]) == (20, dtype)
    assert report["parameters"] == sum(w.numel() for w in random_weights(torch.float32).values())
    assert report["smallest_first_state_change"] > 1e-3
    pairs = report["max_abs_diff"]
    as_loaded = pairs.pop(f"transformers / sentence-transformers in {dtype}")
    assert (as_loaded > 1e-5) == (dtype == "bfloat16")
    assert as_loaded <= TOLERANCE[dtype][0]
    assert len(pairs) == 6 and all(difference <= 1e-5 for difference in pairs.values())


def test_a_compat_folder_gives_our_embeddings_in_a_fresh_process(compat):
    check_report(verify_folder(compat, embed(compat)))


@pytest.mark.parametrize(
    ("format", "dtype"), [("native", "float32"), ("native", "bfloat16"), ("compat", "bfloat16")]
)
def test_a_good_folder_gives_our_embeddings_everywhere(format, dtype, tmp_path, warm):
    path = write(tmp_path / f"{format}-{dtype}", dtype, format)
    check_report(verify_folder(path, embed(path)), dtype)


def test_our_encoder_cuts_the_long_text_as_the_libraries_do(good):
    embedder = Embedder.load(str(good), "cpu", "fp32")
    embedder.encode(list(TEXTS))
    assert embedder.tokenizer.num_truncated == 1


def test_weights_in_bf16_are_still_compared_at_the_precision_of_fp32(tmp_path, warm):
    path = write(tmp_path / "bf16", "bfloat16")

    def almost(texts: list[str], limit: int) -> np.ndarray:
        rows = embed(path)(texts, limit)
        rows[3, 7] += 1e-3  # far below what bf16 would excuse
        return rows

    with pytest.raises(UserError, match=r"transformers and our encoder disagree.*allowed in float32: 1e-05"):
        verify_folder(path, almost)


def test_a_causal_folder_is_caught_by_its_hidden_states(folder, warm):
    edit(folder / "config.json", is_causal=...)
    with pytest.raises(
        UserError, match=r"causal mask in 8 of 8 cases.*is_causal: false \(found: \"nothing\"\)"
    ):
        verify_folder(folder)


# ----------------------------------------------------------------------------------------- code in the folder

# In the manner of the published Llama-Embed-Nemotron-8B: the layers are told that they are not causal, and a
# method that made the mask until transformers 4.52 is overridden. Newer versions never call it.
PUBLISHED_STYLE = """
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

class LlamaBidirectionalConfig(LlamaConfig):
    model_type = "llama_bidirec"

class LlamaBidirectionalModel(LlamaModel):
    config_class = LlamaBidirectionalConfig

    def __init__(self, config):
        open(config.marker, "w").close()
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.is_causal = False

    def _update_causal_mask(self, attention_mask, input_tensor, *args, **kwargs):
        mask = input_tensor.new_zeros(attention_mask.shape)
        return mask.masked_fill(attention_mask == 0, torch.finfo(mask.dtype).min)[:, None, None, :]
"""


def foreign_code(compat, folder, code: str) -> Path:
    """A compat folder with this code; what of it runs makes the file `ran` beside the folder."""
    shutil.copytree(compat, folder)
    (folder / REMOTE_CODE.name).write_text(code)
    edit(folder / "config.json", is_causal=..., marker=str(folder.with_name("ran")))
    return folder


def test_the_published_style_of_remote_code_is_found_causal(compat, tmp_path, warm):
    path = foreign_code(compat, tmp_path / "published", PUBLISHED_STYLE)
    with pytest.raises(UserError, match=r"runs with a causal mask in 6 of 8 cases") as error:
        verify_folder(path, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    # What makes it treacherous: alone, under sdpa, no mask is made and the layers' own word counts.
    assert "sdpa, padded on the right" in str(error.value)
    assert "sdpa, alone" not in str(error.value)
    assert "does not remove the mask in transformers" in str(error.value)
    said: list[str] = []
    with pytest.raises(UserError, match="causal mask in 6 of 8 cases"):
        verify_folder(path, trust_remote_code=True, ours=False, say=said.append)
    assert said[0].startswith("attention: partly causal, bidirectional in 2 of 8 cases (transformers ")


def test_foreign_code_runs_only_when_it_is_trusted(compat, tmp_path, no_reload):
    path = foreign_code(compat, tmp_path / "published", PUBLISHED_STYLE)
    with pytest.raises(UserError, match=rf"did not write \({REMOTE_CODE.name}\).*--trust-remote-code"):
        verify_folder(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(AssertionError, match="the files passed"):
        verify_folder(path, trust_remote_code=True)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (REMOTE_CODE.name, REMOTE_CODE.read_bytes() + b"\n", rf"\({REMOTE_CODE.name}\)"),
        (REMOTE_CODE.name, None, f"has no {REMOTE_CODE.name}, which auto_map"),
        (
            "config.json",
            {"auto_map": {**AUTO_MAP, "AutoModel": "somebody/else--modeling.Model"}},
            "auto_map in config.json",
        ),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["t.T", None]}},
            "auto_map in tokenizer_config.json",
        ),
        ("processor_config.json", b'{"\\u0061uto_map": {}}', "auto_map in processor_config.json"),
        ("adapter_config.json", b"{}", "adapter_config.json, which loads yet another folder"),
    ],
)
def test_any_way_to_other_code_is_refused(compat, tmp_path, no_reload, file, content, message):
    path = shutil.copytree(compat, tmp_path / "folder")
    if content is None:
        (path / file).unlink()
    elif isinstance(content, bytes):
        (path / file).write_bytes(content)
    else:
        edit(path / file, **content)
    with pytest.raises(UserError, match=message):
        verify_folder(path)


@pytest.mark.parametrize(
    ("good_line", "planted", "message"),
    [
        ("attention_mask[:, None, None, :].to(mask.device) == 0", "mask > 0", "transformers and our "
        "encoder disagree"),
        # Right as long as the padding is on the right.
        ("attention_mask[:, None, None, :].to(mask.device) == 0",
         "(attention_mask[:, None, None, :] == 0) & (torch.arange(length) > 0)",
         "padded on the right and padded on the left disagree"),
        ("mask.expand(num_texts, 1, length, length)", "mask - 1e9 * torch.ones(length, length).triu(1)",
        "causal mask in 8"),
    ],
)  # fmt: skip
def test_a_bug_planted_in_our_remote_code_is_caught(compat, tmp_path, warm, good_line, planted, message):
    path = shutil.copytree(compat, tmp_path / f"mutant{len(planted)}")
    code = REMOTE_CODE.read_text()
    assert code.count(good_line) == 1
    (path / REMOTE_CODE.name).write_text(code.replace(good_line, planted))
    with pytest.raises(UserError, match=message):
        verify_folder(path, embed(compat), trust_remote_code=True)


def launcher(monkeypatch, *argv: str):
    """launch/merge.py as a module, this command line set."""
    spec = importlib.util.spec_from_file_location("merge_launcher", TESTS.parent / "launch" / "merge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["merge.py", *argv])
    return module


def test_check_runs_foreign_code_only_with_its_flag(compat, tmp_path, monkeypatch, no_reload, capsys):
    path = str(foreign_code(compat, tmp_path / "published", PUBLISHED_STYLE))
    with pytest.raises(SystemExit) as end:
        launcher(monkeypatch, "--check", path).main()
    assert end.value.code == 2 and "--trust-remote-code" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="the files passed"):
        launcher(monkeypatch, "--check", path, "--trust-remote-code").main()
    with pytest.raises(SystemExit):  # it would say nothing about what is written
        launcher(monkeypatch, path, "-o", str(tmp_path / "out"), "--trust-remote-code").main()


def test_both_formats_out_of_the_launcher_have_the_same_tensors_and_texts(
    good, tmp_path, monkeypatch, warm, capsys
):
    for format in ("native", "compat"):
        launcher(monkeypatch, str(good), "-o", str(tmp_path / format), "--format", format).main()
    assert "transformers / our encoder" in capsys.readouterr().out
    native, compat = (
        {
            str(file.relative_to(tmp_path / format)): file.read_bytes()
            for file in (tmp_path / format).rglob("*.*")
        }
        for format in ("native", "compat")
    )
    assert compat.keys() - native.keys() == {REMOTE_CODE.name}
    differ = {name for name, content in native.items() if compat[name] != content}
    assert differ == {"config.json", "README.md"}
    assert set(load_file(tmp_path / "compat" / "model.safetensors")) == set(llama_tensors(MODEL_JSON))


MODEL_JSON = hf_config(MODEL, "float32", {})


def test_a_folder_that_does_not_load_is_reported_with_the_last_line_of_the_other_process(
    folder, tmp_path, monkeypatch
):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho 'ValueError: unknown tokenizer' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(UserError, match=r"does not load .*exit code 1\): ValueError: unknown tokenizer"):
        verify_folder(folder)


WEIGHT = "layers.1.mlp.up_proj.weight"


def test_nan_and_infinity_are_found_with_their_row(folder, no_reload):
    for value in (math.nan, math.inf, -math.inf):
        edit_weights(folder, lambda weights: weights[WEIGHT][37, 5].fill_(value))  # noqa: B023
        with pytest.raises(
            UserError, match=rf"{WEIGHT} has 1 values that are NaN or infinite .*first in row 37"
        ):
            verify_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(WEIGHT), rf"lacks 1 tensors, the first of them {WEIGHT} \(19 found, 20 implied"),
        (
            lambda w: w.update({"lm_head.weight": torch.zeros(2, 2)}),
            "should not have 1 tensors, .* lm_head.weight",
        ),
        (
            lambda w: w.update({WEIGHT: torch.zeros(48, 64)}),
            r"has shape \(48, 64\); config.json implies \(64, 48\)",
        ),
        (
            lambda w: w.update({WEIGHT: w[WEIGHT].half()}),
            "up_proj.weight is float16; config.json says float32",
        ),
        (
            lambda w: w.update({f"model.{WEIGHT}": w.pop(WEIGHT)}),
            f"lacks 1 tensors, the first of them {WEIGHT}",
        ),
    ],
)
def test_tensors_must_be_exactly_those_of_the_config(folder, no_reload, change, message):
    edit_weights(folder, change)
    with pytest.raises(UserError, match=message):
        verify_folder(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True},
            "pooling_mode_",
        ),
        (
            "1_Pooling/config.json",
            {"pooling_mode_lasttoken": True},
            "pooling_mode_lasttoken is true and must be false",
        ),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": ...}, "mean_tokens is null and must be true"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt"),
        ("1_Pooling/config.json", {"word_embedding_dimension": 64}, "is 64 and must be 48"),
        ("config.json", {"vocab_size": 331}, r"shape \(330, 48\); config.json implies \(331, 48\)"),
        ("config.json", {"num_hidden_layers": 3}, r"lacks 9 tensors, .*layers.2.*\(20 found, 29 implied"),
        (
            "config.json",
            {"head_dim": ...},
            r"k_proj.weight has shape \(32, 48\); config.json implies \(24, 48\)",
        ),
        (
            "config.json",
            {"rope_theta": 1e4},
            r"rope_theta=10000\.0, which transformers 4 reads, and rope_parameters\.rope_theta=",
        ),
        ("config.json", {"rope_scaling": None}, "rope_parameters, against rope_theta"),
        ("config.json", {"dtype": "float64"}, "dtype"),
        ("config.json", {"torch_dtype": "bfloat16"}, "torch_dtype"),
        (
            "config.json",
            {"model_type": "gemma2"},
            r"model_type is 'gemma2'; only \"llama\" and \"llama_bidirec\" and .* are read",
        ),
        ("config.json", {"model_type": "llama_bidirec"}, r'architectures is \["LlamaModel"\] and must be'),
        ("config.json", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("config.json", {"hidden_size": 48.0}, r"model\.hidden_size=48\.0 must be an integer"),
        ("sentence_bert_config.json", {"max_seq_length": ...}, "max_seq_length is null"),
        ("config_sentence_transformers.json", {"prompts": {"query": None}}, 'prompts is {"query": null}'),
    ],
)
def test_a_wrong_setting_is_named(folder, no_reload, file, change, message):
    edit(folder / file, **change)
    with pytest.raises(UserError, match=message):
        verify_folder(folder)


def test_the_modules_are_transformer_pooling_normalize(folder, no_reload):
    modules = json.loads((folder / "modules.json").read_text())
    for broken in (modules[:2], [modules[0], modules[2], modules[1]], {}, ["Transformer"]):
        (folder / "modules.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"modules\.json"):
            verify_folder(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "modules.json", "model.safetensors", "1_Pooling/config.json"]
)
def test_a_missing_or_torn_file_is_named(folder, no_reload, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name):
        verify_folder(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name.split("/")[-1]):
        verify_folder(folder)


def test_sharded_weights_need_every_shard_and_no_other(folder, no_reload):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(sorted(weights.items())[:9]), dict(sorted(weights.items())[9:])]
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for half, file in zip(halves, files, strict=True):
        save_file(half, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for half, file in zip(halves, files, strict=True) for name in half}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(AssertionError, match="the files passed"):
        verify_folder(folder)

    index.write_text(json.dumps({"weight_map": {**weight_map, min(weight_map): files[1]}}))
    with pytest.raises(
        UserError, match=rf"weight_map says that {min(weight_map)} is in {files[1]}, but it is in {files[0]}"
    ):
        verify_folder(folder)
    index.write_text(json.dumps({"weight_map": {**weight_map, min(weight_map): "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match=r"names '\.\./elsewhere.* not a file of"):
        verify_folder(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(folder / files[0], folder / "model.safetensors")
    with pytest.raises(UserError, match=r"two sets of weights: model\.safetensors, which transformers reads"):
        verify_folder(folder)
    (folder / "model.safetensors").unlink()
    (folder / files[0]).unlink()
    with pytest.raises(UserError, match=r"names 'model-00001-of-00002.* not a file of"):
        verify_folder(folder)


def unit_rows(num_channels: int) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(len(TEXTS), num_channels))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_vectors_that_differ_are_refused_with_the_text_that_shows_it(tmp_path):
    good = unit_rows(64)
    assert compare_vectors(tmp_path, {"a": good, "b": good + np.float32(5e-6)}, "float32")["a / b"] <= 1e-5
    for dtype, step in (("float32", 2e-5), ("bfloat16", 3e-2), ("float32", np.nan)):
        bad = good.copy()
        bad[3, 7] += step
        with pytest.raises(UserError, match=f"a and b disagree, most for the text {TEXTS[3][:40]!r}"):
            compare_vectors(tmp_path, {"a": good, "b": bad}, dtype)
    with pytest.raises(UserError, match=r"shape \(21, 64\) .*\(21, 32\)"):
        compare_vectors(tmp_path, {"a": good, "b": good[:, :32]}, "float32")


@pytest.mark.parametrize("scale", [1.0, 0.3])  # of the weights: agitated, and as gentle as a trained model
def test_the_tolerance_is_about_twice_what_rounding_measures_and_far_below_a_causal_mask(scale):
    from transformers import LlamaConfig, LlamaModel

    generator = torch.Generator().manual_seed(0)
    shape = {**hf_config(MODEL, "float32", {}), "num_hidden_layers": 32, "hidden_size": 64}
    weights = {name: torch.randn(size, generator=generator) for name, size in llama_tensors(shape).items()}
    weights = {n: 1 + 0.1 * w if w.dim() == 1 else scale * w / w.shape[-1] ** 0.5 for n, w in weights.items()}
    weights = {name: w.bfloat16().float() for name, w in weights.items()}
    rows = [torch.randint(3, 300, (1, length), generator=generator) for length in (2, 9, 40)]

    def vectors(dtype=torch.float32, **config) -> torch.Tensor:
        model = LlamaModel(LlamaConfig(**{**shape, "pad_token_id": None, **config})).eval()
        model.load_state_dict(weights)
        with torch.no_grad():
            states = [model.to(dtype)(input_ids=row).last_hidden_state.float().mean(dim=1) for row in rows]
        return torch.nn.functional.normalize(torch.cat(states), dim=-1)

    def error(**change) -> tuple[float, float]:
        """(coordinate, distance), the largest."""
        difference_ND = vectors(**change) - truth_ND
        return float(difference_ND.abs().max()), float(difference_ND.norm(dim=1).max())

    truth_ND = vectors()
    for dtype in (torch.bfloat16, torch.float16):
        allowed = TOLERANCE[str(dtype).removeprefix("torch.")]
        for measured, limit in zip(error(dtype=dtype), allowed, strict=True):
            assert limit / 20 < 2 * measured <= 1.5 * limit, f"{dtype}: {measured:.1e} of {limit:.0e}"
    assert error(is_causal=True)[1] > 10 * TOLERANCE["bfloat16"][1]
    _, no_scaling = error(
        rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": MODEL.rope_theta}
    )
    assert no_scaling > 20 * TOLERANCE["float32"][1]
    if scale < 1:
        assert no_scaling < TOLERANCE["bfloat16"][1]  # only the comparison in fp32 finds it


def test_the_bf16_tolerance_means_something_for_wide_models(tmp_path):
    """At 4096 channels unrelated unit vectors can stay within 2e-2 in most coordinates: the distance must
    bind."""
    good = unit_rows(4096)
    bad = good + 0.01 * np.sign(np.random.default_rng(1).normal(size=good.shape)).astype(np.float32)
    assert np.abs(bad - good).max() < 2e-2
    with pytest.raises(UserError, match="distance"):
        compare_vectors(tmp_path, {"a": good, "b": bad}, "bfloat16")


@pytest.mark.parametrize("prefix", ["", "st_"])
def test_a_tokenizer_that_a_library_reads_otherwise_is_caught(good, prefix):
    tokenizer, texts = backend(good, 100)
    rows = [tokenizer.encode(text).ids for text in (*texts, texts[-1] * 9)]

    def as_read(rows):
        counts = np.array([len(row) for row in rows])
        found = {
            f"{prefix}token_ids": np.array([i for row in rows for i in row]),
            f"{prefix}token_counts": counts,
        }
        return {**found, "num_repeats": np.array(9)}

    assert texts == list(TEXTS)
    check_tokens(good, as_read(rows), tokenizer, texts)
    for wrong, message in (
        ([rows[0][1:], *rows[1:]], r"for 'hello' and tokenizer.json"),  # BOS lost
        ([*rows[:15], rows[15] + [1], *rows[16:]], r"for '' and tokenizer.json"),  # EOS added
        ([*rows[:-1], rows[-1][:-1]], "at 99 tokens, not at 100"),
        ([*rows[:-1], tokenizer.encode(texts[-1][1:] * 9).ids], "for 'A long passage.*truncation_side"),
    ):
        with pytest.raises(UserError, match=message):
            check_tokens(good, as_read(wrong), tokenizer, texts)


def test_another_shape_tokenizer_or_precision_is_another_model(good: Path, tmp_path: Path) -> None:
    """The same weights: what mining has encoded with them otherwise must not be taken for theirs."""
    digests = [Embedder.load(str(good), "cpu", precision).digest for precision in ("fp32", "bf16")]
    for file, change in (
        ("config.json", lambda value: value.update(rms_norm_eps=0.1)),
        ("tokenizer.json", lambda value: value["model"].update(unk_token="[UNK]", byte_fallback=True)),
    ):
        folder = shutil.copytree(good, tmp_path / file)
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))
        digests.append(Embedder.load(str(folder), "cpu", "fp32").digest)
    assert len(set(digests)) == 4
    assert Embedder.load(str(good), "cpu", "fp32").digest == digests[0]


# ------------------------------------------------------------------------------------------ anybody's folder


@pytest.fixture(scope="module")
def anybodys(good, tmp_path_factory) -> Path:
    """What transformers saves of the good folder's model: LlamaForCausalLM's prefix and head, and no word of
    embeddings."""
    folder = tmp_path_factory.mktemp("anybodys") / "plain"
    folder.mkdir()
    weights = {f"model.{name}": weight for name, weight in load_file(good / "model.safetensors").items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    drop = ("use_bidirectional_attention", "pooling", "rope_theta", "rope_scaling", "torch_dtype", "head_dim")
    config = {key: value for key, value in MODEL_JSON.items() if key not in drop}
    config |= {"architectures": ["LlamaForCausalLM"], "head_dim": 16, "transformers_version": "5.24.0"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(good / name, folder)
    edit(folder / "tokenizer_config.json", model_max_length=1e30)  # as transformers writes "none"
    edit(folder / "config.json", max_position_embeddings=...)
    return folder


def as_sentence_transformers_6(plain: Path, folder: Path, **pooling) -> Path:
    """As sentence_transformers 6.2 saves it: other module names, short pooling config, no max_seq_length."""
    shutil.copytree(plain, folder)
    (folder / "1_Pooling").mkdir()
    files = {
        "modules.json": [
            {
                **{"idx": 0, "name": "0", "path": ""},
                "type": "sentence_transformers.base.modules.transformer.Transformer",
            },
            {
                **{"idx": 1, "name": "1", "path": "1_Pooling"},
                "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
            },
        ],
        "1_Pooling/config.json": {
            "embedding_dimension": 48, "pooling_mode": "mean", "include_prompt": True, **pooling
        },
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer", "prompts": {"query": "q: ", "document": "d: "},
            "similarity_fn_name": "cosine",
        },
    }  # fmt: skip
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def checked(path: Path, capsys) -> tuple[str, str, int]:
    """(what --check prints, its error, its exit code)."""
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        module = launcher(patch, "--check", str(path))
        try:
            module.main()
        except SystemExit as end:
            code = end.code
    out, err = capsys.readouterr()
    return out, err, code


def test_a_plain_hugging_face_folder_is_proven_as_far_as_it_goes(anybodys, warm, capsys):
    out, err, code = checked(anybodys, capsys)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("  attention: bidirectional in 8 of 8 cases (transformers ")
    for words in (
        "weights: 20 tensors as config.json implies",
        "sentence-transformers: not there",
        "vectors: transformers, our encoder agree on 21 texts",
        "not proven for text-embeddings-inference",
    ):
        assert words in out, words


def test_whether_a_plain_folder_is_causal_is_answered_first(anybodys, tmp_path, warm, capsys):
    path = shutil.copytree(anybodys, tmp_path / "causal")
    edit(path / "config.json", is_causal=...)
    edit(path / "config.json", rope_theta=9.0)
    out, err, code = checked(path, capsys)
    assert code == 2 and out.splitlines()[0].startswith("  attention: causal in 8 of 8 cases (")
    # The other fault is named too, and what was not compared.
    assert "causal mask in 8 of 8" in err and "rope_theta" in err
    assert "not compared" in out and "vectors: transformers" not in out


def test_hidden_states_that_are_nan_are_not_called_causal(anybodys, tmp_path, warm, capsys):
    path = shutil.copytree(anybodys, tmp_path / "nan")
    edit_weights(path, lambda w: w["model.norm.weight"][3].fill_(math.nan))
    out, err, code = checked(path, capsys)
    assert code == 2 and "attention: no answer" in out and "causal" not in out + err
    assert "hidden states are NaN" in err and "norm.weight has 1 values that are NaN" in err


def test_a_folder_without_a_tokenizer_still_has_its_causality_answered(anybodys, tmp_path, warm, capsys):
    path = shutil.copytree(anybodys, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    out, err, code = checked(path, capsys)
    assert code == 2 and "attention: bidirectional" in out and "no tokenizer.json" in err


def test_a_folder_of_sentence_transformers_6_is_proven_in_its_own_spelling(anybodys, tmp_path, warm, capsys):
    path = as_sentence_transformers_6(anybodys, tmp_path / "st6")
    out, err, code = checked(path, capsys)
    assert code == 0, err
    assert out.splitlines()[0].startswith("  attention: bidirectional")
    assert (
        "vectors: transformers, sentence-transformers, our encoder agree on 21 texts, and 4 with the prompts"
        in out
    )
    assert "limit: the folder states none; compared at 512 tokens" in out
    assert '"q: "; before documents: "d: "' in out
    assert "read other spellings" in out and "modules.json" in out


def test_what_does_not_load_in_sentence_transformers_alone_has_its_causality_answered(
    anybodys, tmp_path, warm, capsys
):
    path = as_sentence_transformers_6(anybodys, tmp_path / "broken", pooling_mode="best")
    out, err, code = checked(path, capsys)
    assert code == 2 and "attention: bidirectional" in out and "weights: 20 tensors" in out
    assert "does not load in sentence-transformers: " in err and "best" in err


def test_another_pooling_is_said_and_not_compared(anybodys, tmp_path, warm, capsys):
    path = as_sentence_transformers_6(anybodys, tmp_path / "max", pooling_mode="max")
    out, err, code = checked(path, capsys)
    assert code == 0, err
    assert "sentence-transformers: pooling by max, which is not what this package computes" in out
    assert "vectors: only transformers' own" in out and "our encoder: not compared" in out


def test_texts_of_which_the_folder_makes_special_tokens_are_left_out_and_counted(
    anybodys, tmp_path, warm, capsys
):
    path = shutil.copytree(anybodys, tmp_path / "special")
    edit(path / "tokenizer_config.json", split_special_tokens=...)
    out, err, code = checked(path, capsys)
    assert code == 0, err
    assert "tokens: 3 of 21 texts hold special tokens" in out
    assert "vectors: transformers, our encoder agree on 18 of 21 texts\n" in out
    path = as_sentence_transformers_6(path, tmp_path / "special-st6")
    out, err, code = checked(path, capsys)
    assert code == 0, err
    agree = (
        "transformers, sentence-transformers agree on 21 texts, "
        "our encoder with them on 18 of these, and 4 with the"
    )
    assert f"vectors: {agree} prompts of each side\n" in out


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"rms_norm_eps": 0.5}, "disagree"),
        ("tokenizer_config.json", {"padding_side": "left", "truncation_side": "left"}, "truncation_side in"),
        ("sentence_bert_config.json", {"max_seq_length": 100}, None),
    ],
)
def test_a_fault_in_anybodys_folder_is_named(anybodys, tmp_path, warm, capsys, file, change, message):
    path = as_sentence_transformers_6(anybodys, tmp_path / "folder")
    edit(path / "sentence_bert_config.json", max_seq_length=64)
    edit(path / file, **change)
    if "rms_norm_eps" in change:  # ours alone sees it
        own = shutil.copytree(anybodys, tmp_path / "own")
        with pytest.raises(UserError, match=message):
            verify_folder(path, embed(own), ours=False)
        return
    out, err, code = checked(path, capsys)
    assert (code, message or "") == (2 if message else 0, message if message and message in err else ""), (
        out,
        err,
    )


@pytest.mark.parametrize("config", [{"model_type": "gemma3"}, {}])
def test_of_what_is_no_llama_nothing_is_looked_at_and_it_is_said(tmp_path, no_reload, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"model_type is .*; only folders of llama, .* nothing of this one was looked at"
    ):
        verify_folder(tmp_path, ours=False)


def test_an_export_whose_prompts_were_edited_does_not_pass_its_check(folder, warm, capsys):
    file = folder / "config_sentence_transformers.json"
    settings = json.loads(file.read_text())
    edit(file, prompts={**settings["prompts"], "sts": "other: "})
    out, err, code = checked(folder, capsys)
    assert (
        "attention: bidirectional" in out
        and code == 2
        and "the prompt 'sts' is \"other: \" in prompts" in err
    )


def test_sentence_transformers_must_have_the_prompts_of_the_folder(good):
    named = USAGE.named_prompts()
    assert set(named) == {"query", "document", "qa", "qa-document", "sts", "sts-document"}

    def as_read(prompts, similarity="cosine"):
        return {"prompts": np.array(json.dumps(prompts)), "similarity": np.array(similarity)}

    check_prompts(good, as_read(named), USAGE)
    for name in named:
        with pytest.raises(UserError, match=f"has the prompt '{name}' \"x\""):
            check_prompts(good, as_read({**named, name: "x"}), USAGE)
    with pytest.raises(UserError, match="compares by dot"):
        check_prompts(good, as_read(named, "dot"), USAGE)


@pytest.mark.parametrize(
    ("lost", "side"), [(USAGE.default.query, "queries"), (USAGE.default.document, "documents")]
)
def test_a_prompt_that_one_side_leaves_out_is_caught(good, warm, lost, side):
    def without(texts: list[str], limit: int) -> np.ndarray:
        return embed(good)([text.replace(lost, "") for text in texts], limit)

    with pytest.raises(UserError, match=f"sentence-transformers' {side} and our encoder's {side} disagree"):
        verify_folder(good, without)
