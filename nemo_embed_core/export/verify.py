"""Proof that a folder gives everywhere the embeddings that we trained: re-open, reload elsewhere, compare, perturb.

Nothing is taken on trust from the writer: names, shapes and types are derived from config.json again, every weight is
read for NaN and infinity, and a process that knows nothing of this package loads the folder as its users will.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from nemo_embed_core.config import UserError
from nemo_embed_core.export.folder import ARCHITECTURES, AUTO_MAP, REMOTE_CODE

# Two unit vectors for the same text and weights, by the dtype that computed one of them: largest difference of one
# coordinate, and distance. The distance is what binds for wide models: at 4096 channels a coordinate is 0.016, so 2e-2 alone
# says little. About twice what random Llamas of 32 layers measure (tests/export/test_verify.py). A lost RoPE scaling can
# stay below bf16's tolerance, which is why everything is compared in fp32 first.
TOLERANCE = {"float32": (1e-5, 1e-4), "float16": (5e-3, 1e-2), "bfloat16": (2e-2, 4e-2)}

# One word, scripts of one to four bytes a character, a prompt, special-token look-alikes, and a text that needs cutting.
TEXTS = (
    "hello",
    "How do neural networks learn patterns from examples?",
    "Instruct: Given a question, retrieve passages that answer the question\nQuery: who wrote the Iliad?",
    "Deep learning models adjust their weights through backpropagation, using gradient descent to minimize error.",
    "Das Wetter in Zürich ist heute schön, naïveté coûte cher.",
    "东京是日本的首都。 Привет, мир! مرحبا 🦙",
    "Markup such as <b>, [MASK], </s> and <|end_of_text|> is ordinary text.  Spaces   and\ttabs count.",
    "A long passage is cut at the limit that the folder states, at the same token everywhere. " * 40,
)
PROBE = 1  # of TEXTS: whose last token is replaced


def verify_folder(
    path: Path | str, embed: Callable[[list[str]], np.ndarray] | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Check an exported folder, weights to embeddings; UserError names the first thing that is wrong.

    embed(texts) -> [N, D] unit rows of our own encoder in fp32 for raw texts (no prompt), cut at the folder's
    max_seq_length. Whatever the weights' dtype is, it must agree with transformers and sentence-transformers in fp32 as
    fp32 does; what sentence-transformers gives in that dtype is held to its own TOLERANCE. Code in the folder is run only
    when it is the file that we write, or with trust_remote_code. Returns what was measured. Takes the time of two loads on
    the CPU and two library imports.
    """
    path = Path(path)
    config = _read_object(path / "config.json")
    has_code = _check_code(path, config, trust_remote_code)
    dtype = _check_config(path, config)
    expected = expected_tensors(config)
    num_parameters = _check_weights(path, expected, dtype)
    max_seq_length = _check_sentence_transformers_files(path, config)
    vectors = _reload(path, max_seq_length, has_code)
    changes = dict(zip(vectors["case_names"].tolist(), vectors["first_state_changes"].tolist(), strict=True))
    _check_bidirectional(path, config, changes, str(vectors["transformers_version"]), has_code)
    _check_tokens(path, vectors, max_seq_length)

    transformers_ND, left_ND = vectors["transformers_ND"], vectors["left_padded_ND"]
    in_fp32 = {"transformers": transformers_ND, "sentence-transformers": vectors["sentence_transformers_ND"]}
    if embed is not None:
        in_fp32["our encoder"] = np.asarray(embed(list(TEXTS)), dtype=np.float32)
    differences = compare_vectors(path, in_fp32, "float32")
    sides = {"padded on the right": transformers_ND[: len(left_ND)], "padded on the left": left_ND}
    differences |= compare_vectors(path, sides, "float32")
    as_loaded = {"transformers": transformers_ND, f"sentence-transformers in {dtype}": vectors["as_loaded_ND"]}
    differences |= compare_vectors(path, as_loaded, dtype)
    return {
        "tensors": len(expected),
        "parameters": num_parameters,
        "dtype": dtype,
        "texts": len(TEXTS),
        "max_abs_diff": differences,
        "tolerance": {name: TOLERANCE[name][0] for name in ("float32", dtype)},
        "smallest_first_state_change": min(changes.values()),
        "transformers": str(vectors["transformers_version"]),
        "sentence_transformers": str(vectors["sentence_transformers_version"]),
    }


def expected_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a headless Llama with this config.json, no more and no less."""
    hidden_size, intermediate_size = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden_size // config["num_attention_heads"]
    q_rows = config["num_attention_heads"] * head_dim
    kv_rows = config["num_key_value_heads"] * head_dim
    tensors: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config["vocab_size"], hidden_size)}
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}"
        tensors |= {
            f"{layer}.self_attn.q_proj.weight": (q_rows, hidden_size),
            f"{layer}.self_attn.k_proj.weight": (kv_rows, hidden_size),
            f"{layer}.self_attn.v_proj.weight": (kv_rows, hidden_size),
            f"{layer}.self_attn.o_proj.weight": (hidden_size, q_rows),
            f"{layer}.mlp.gate_proj.weight": (intermediate_size, hidden_size),
            f"{layer}.mlp.up_proj.weight": (intermediate_size, hidden_size),
            f"{layer}.mlp.down_proj.weight": (hidden_size, intermediate_size),
            f"{layer}.input_layernorm.weight": (hidden_size,),
            f"{layer}.post_attention_layernorm.weight": (hidden_size,),
        }
    return tensors | {"norm.weight": (hidden_size,)}


def compare_vectors(path: Path, named: dict[str, np.ndarray], dtype: str) -> dict[str, float]:
    """Largest coordinate difference of every pair in {who: [N, D]}; UserError above TOLERANCE or for another shape."""
    max_difference, max_distance = TOLERANCE[dtype]
    differences = {}
    names = list(named)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a_ND, b_ND = named[first], named[second]
            if a_ND.shape != b_ND.shape:
                raise UserError(
                    f"{path}: {first} gives embeddings of shape {a_ND.shape} for {len(TEXTS)} texts and {second} "
                    f"{b_ND.shape}; the folder and the encoder it is compared with are not the same model"
                )
            difference_N = np.abs(a_ND - b_ND).max(axis=1)
            distance_N = np.linalg.norm(a_ND - b_ND, axis=1)
            worst = int(distance_N.argmax())  # NaN counts as the largest
            if not (difference_N.max() <= max_difference and distance_N[worst] <= max_distance):
                raise UserError(
                    f"{path}: {first} and {second} disagree, most for the text {TEXTS[worst][:40]!r}: one coordinate by "
                    f"{difference_N[worst]:.2e} (allowed in {dtype}: {max_difference:.0e}), distance {distance_N[worst]:.2e} "
                    f"(allowed: {max_distance:.0e}); compare pooling, normalisation, prompt, RoPE settings and weights"
                )
            differences[f"{first} / {second}"] = float(difference_N.max())
    return differences


# ------------------------------------------------------------------------------------------ what the files say


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {file.name}; an exported folder needs it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, IsADirectoryError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); export the folder again") from None


def _read_object(file: Path) -> dict[str, Any]:
    value = _read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__} and must hold an object")
    return value


def _require(file: Path, found: Any, wanted: Any, what: str) -> None:
    if type(found) is not type(wanted) or found != wanted:
        raise UserError(f"{file}: {what} is {json.dumps(found)} and must be {json.dumps(wanted)}")


def _check_code(path: Path, config: dict[str, Any], trusted: bool) -> bool:
    """Whether loading the folder runs Python that it names. UserError unless that is our file, byte for byte, or `trusted`."""
    foreign, has_code = [], False
    for file in sorted(path.rglob("*.json")):
        # The key by which transformers imports a class out of the folder, or out of another folder or repository.
        auto_map = value.get("auto_map") if isinstance(value := _read_json(file), dict) else None
        if auto_map is not None:
            has_code = True
            if file != path / "config.json" or auto_map != AUTO_MAP:
                foreign.append(f"auto_map in {file.relative_to(path)}")
            elif not (path / REMOTE_CODE.name).is_file():
                raise UserError(
                    f"{path} has no {REMOTE_CODE.name}, which auto_map in config.json names; export it again"
                )
            elif (path / REMOTE_CODE.name).read_bytes() != REMOTE_CODE.read_bytes():
                foreign.append(REMOTE_CODE.name)
    if has_code and (path / "adapter_config.json").exists():
        foreign.append("adapter_config.json, which loads yet another folder")
    if foreign and not trusted:
        raise UserError(
            f"{path} brings code that this version did not write ({', '.join(foreign)}), and checking the folder would run it. "
            f"Read it, then add --trust-remote-code; without that flag a folder may name no code, or exactly the "
            f"{REMOTE_CODE.name} of --format compat"
        )
    return has_code


def _check_bidirectional(
    path: Path, config: dict[str, Any], changes: dict[str, float], version: str, has_code: bool
) -> None:
    causal = [case for case, change in changes.items() if not change > 0]
    if not causal:
        return
    found = json.dumps(config.get("is_causal", "nothing"))
    if has_code:
        remedy = f"The code that the folder brings does not remove the mask in transformers {version}"
    else:
        remedy = f"config.json must have is_causal: false (found: {found}) and transformers must be >= 5.2 (found: {version})"
        remedy += ", older ones ignore it"
    raise UserError(
        f"{path} runs with a causal mask in {len(causal)} of {len(changes)} cases ({'; '.join(causal)}): replacing the last "
        f"token leaves the first token's hidden state unchanged. {remedy}"
    )


def _check_config(path: Path, config: dict[str, Any]) -> str:
    """The dtype of the weights. Whether attention is causal is not read here but seen in the hidden states."""
    file = path / "config.json"
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UserError(f"{file}: model_type is {json.dumps(model_type)} and must be one of {', '.join(ARCHITECTURES)}")
    _require(file, config.get("architectures"), [ARCHITECTURES[model_type]], "architectures")
    for key in ("attention_bias", "mlp_bias"):
        _require(file, config.get(key, False), False, key)
    _require(file, config.get("hidden_act", "silu"), "silu", "hidden_act")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in (*sizes, "num_key_value_heads"):
        value = config.get(key)
        if type(value) is not int or value < (0 if key == "num_hidden_layers" else 1):
            raise UserError(f"{file}: {key} is {json.dumps(value)} and must be a positive integer")
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in TOLERANCE:
        raise UserError(f"{file}: dtype is {json.dumps(dtype)} and must be one of {', '.join(TOLERANCE)}")
    _require(file, config.get("torch_dtype", dtype), dtype, "torch_dtype")
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new is not None and "rope_theta" in config:
        # Two spellings for two generations of readers: where they differ, the same folder gives two sets of vectors.
        legacy = {**(old or {"rope_type": "default"}), "rope_theta": config["rope_theta"]}
        _require(file, new, legacy, "rope_parameters, against rope_theta and rope_scaling,")
    return dtype


def _check_sentence_transformers_files(path: Path, config: dict[str, Any]) -> int:
    """max_seq_length, after checking that the modules are Transformer, mean pooling, Normalize."""
    file = path / "modules.json"
    modules = _read_json(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{file} must hold a list of objects with type and path")
    wanted = [["Transformer", ""], ["Pooling", "1_Pooling"], ["Normalize", "2_Normalize"]]
    wanted = [[f"sentence_transformers.models.{name}", folder] for name, folder in wanted]
    found = [[module.get("type"), module.get("path")] for module in modules]
    _require(file, found, wanted, "the list of types and paths")

    file = path / "1_Pooling" / "config.json"
    pooling = _read_object(file)
    for key, value in pooling.items():
        if key.startswith("pooling_mode_"):
            _require(file, value, key == "pooling_mode_mean_tokens", key)
    _require(file, pooling.get("pooling_mode_mean_tokens"), True, "pooling_mode_mean_tokens")
    _require(file, pooling.get("include_prompt", True), True, "include_prompt")
    _require(file, pooling.get("word_embedding_dimension"), config["hidden_size"], "word_embedding_dimension")

    file = path / "config_sentence_transformers.json"
    prompts = _read_object(file).get("prompts")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise UserError(f'{file}: prompts is {json.dumps(prompts)} and must be strings under names, {{"query": "..."}}')

    file = path / "sentence_bert_config.json"
    max_seq_length = _read_object(file).get("max_seq_length")
    if type(max_seq_length) is not int or max_seq_length < 2:
        raise UserError(
            f"{file}: max_seq_length is {json.dumps(max_seq_length)} and must be a number of tokens, at least 2"
        )
    return max_seq_length


# ------------------------------------------------------------------------------------------ weights


def _check_weights(path: Path, expected: dict[str, tuple[int, ...]], dtype: str) -> int:
    """Every tensor that config.json implies, once, with its shape and dtype and finite; the number of parameters."""
    files = _weight_files(path)
    seen: dict[str, str] = {}
    for file, listed in files.items():
        try:
            with safe_open(file, framework="pt") as tensors:
                names = set(tensors.keys())
                if listed is not None and names != listed:
                    raise UserError(
                        f"{file} and model.safetensors.index.json disagree on the tensors {sorted(names ^ listed)[:4]}; "
                        f"the folder mixes two exports, write it again"
                    )
                for name in sorted(names):
                    if name in seen:
                        raise UserError(f"tensor {name} is both in {seen[name]} and in {file.name} of {path}")
                    seen[name] = file.name
                    if name in expected:
                        _check_tensor(file, name, tensors.get_slice(name), expected[name], dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} does not open as safetensors ({error}); copy or export it again") from None
    missing, extra = expected.keys() - seen.keys(), seen.keys() - expected.keys()
    for problem, names in (("lacks", missing), ("should not have", extra)):
        if names:
            raise UserError(
                f"{path} {problem} {len(names)} tensors, the first of them {min(names)} "
                f"({len(seen)} found, {len(expected)} implied by config.json)"
            )
    return sum(math.prod(shape) for shape in expected.values())


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """{file: its tensors by the index, None where there is no index}; every .safetensors file of the folder is one."""
    present = {file.name for file in path.glob("*.safetensors")}
    if (path / "model.safetensors.index.json").exists():
        file = path / "model.safetensors.index.json"
        weight_map = _read_object(file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{file}: weight_map must be an object of tensor names and file names")
        listed: dict[str, set[str]] = {}
        for tensor, name in weight_map.items():
            listed.setdefault(name, set()).add(tensor)
    elif "model.safetensors" in present:
        listed = {"model.safetensors": set()}
    else:
        raise UserError(
            f"{path} has neither model.safetensors nor model.safetensors.index.json; merge the checkpoint first"
        )
    if present != set(listed):
        missing, extra = sorted(set(listed) - present), sorted(present - set(listed))
        raise UserError(f"{path}: weight files are missing {missing} or extra {extra}; export into an empty folder")
    return {path / name: tensors or None for name, tensors in sorted(listed.items())}


def _check_tensor(file: Path, name: str, tensor: Any, shape: tuple[int, ...], dtype: str) -> None:
    """`tensor` is a lazy slice: read by blocks of rows, so that memory stays at 64 MB beside any size of tensor."""
    if tuple(tensor.get_shape()) != shape:
        raise UserError(f"{file}: {name} has shape {tuple(tensor.get_shape())}; config.json implies {shape}")
    rows = max(1, (16 << 20) // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        block = tensor[start : start + rows]
        if block.dtype != getattr(torch, dtype):
            raise UserError(f"{file}: {name} is {str(block.dtype).removeprefix('torch.')}; config.json says {dtype}")
        finite = torch.isfinite(block)
        if not finite.all():
            row = start + int((~finite).reshape(len(block), -1).any(dim=1).nonzero()[0])
            raise UserError(
                f"{file}: {name} has {int((~finite).sum())} values that are NaN or infinite in rows {start} to "
                f"{start + len(block) - 1}, the first in row {row}; the run diverged or the file is damaged, take an "
                f"earlier checkpoint"
            )


# ------------------------------------------------------------------------------------------ another process


def run_reload(
    python: str, path: Path, output: Path, max_seq_length: int, trust_remote_code: bool
) -> subprocess.CompletedProcess[str]:
    """reload.py on the folder with this interpreter, its arrays into `output`; beside it, what the libraries write."""
    request = output.with_name("request.json")
    settings = {"max_seq_length": max_seq_length, "probe": PROBE, "trust_remote_code": trust_remote_code}
    request.write_text(json.dumps({"texts": TEXTS, **settings}))
    return subprocess.run(
        [python, str(Path(__file__).with_name("reload.py")), str(path.resolve()), str(request), str(output)],
        cwd=output.parent,
        env={
            **os.environ,
            **{"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            "PYTHONSAFEPATH": "1",  # keeps this folder (verify.py, folder.py) off the module path of the child
            "HF_MODULES_CACHE": str(output.parent / "modules"),  # where remote code is copied to and imported from
        },
        capture_output=True,
        text=True,
        errors="replace",
    )


def _reload(path: Path, max_seq_length: int, trust_remote_code: bool) -> dict[str, np.ndarray]:
    """reload.py's arrays. A fresh interpreter: nothing that this one has imported, patched or cached takes part."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError("verifying an export needs sentence-transformers: pip install 'nemo_embed_core[eval]'")
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "vectors.npz"
        child = run_reload(sys.executable, path, output, max_seq_length, trust_remote_code)
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(
                f"{path} does not load in transformers and sentence-transformers (exit code {child.returncode}): {reason}"
            )
        with np.load(output, allow_pickle=False) as arrays:
            return dict(arrays)


def _check_tokens(path: Path, vectors: dict[str, np.ndarray], max_seq_length: int) -> None:
    """AutoTokenizer must read tokenizer.json as written: some of its classes rebuild the pipeline by their own rules."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_seq_length)
    tokenizer.encode_special_tokens = bool(_read_object(path / "tokenizer_config.json").get("split_special_tokens"))
    ends = vectors["token_counts_N"].cumsum()
    for text, theirs in zip(TEXTS, np.split(vectors["token_ids"], ends[:-1]), strict=True):
        ours: Sequence[int] = tokenizer.encode(text).ids
        if list(ours) != theirs.tolist():
            raise UserError(
                f"{path}: AutoTokenizer gives {len(theirs)} tokens {theirs[:6].tolist()}... for {text[:40]!r} and "
                f"tokenizer.json {len(ours)} tokens {list(ours[:6])}...; check tokenizer_class, bos_token and add_bos_token in "
                f"tokenizer_config.json"
            )
