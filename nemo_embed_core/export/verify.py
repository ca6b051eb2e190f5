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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from nemo_embed_core.checkpoint.files import writing
from nemo_embed_core.checkpoint.source import Usage, resolve, usage_of_folder
from nemo_embed_core.config import UserError
from nemo_embed_core.data.tokenizer import load_tokenizer
from nemo_embed_core.export.folder import ARCHITECTURES, AUTO_MAP, REMOTE_CODE
from nemo_embed_core.model.hf_folder import has_weights, open_folder, weight_files

# Two unit vectors for the same text and weights, by the dtype that computed one of them: largest difference of one
# coordinate, and distance. The distance is what binds for wide models: at 4096 channels a coordinate is 0.016, so 2e-2 alone
# says little. About twice what random Llamas of 32 layers measure (tests/export/test_verify.py). A lost RoPE scaling can
# stay below bf16's tolerance, which is why everything is compared in fp32 first.
TOLERANCE = {"float32": (1e-5, 1e-4), "float16": (5e-3, 1e-2), "bfloat16": (2e-2, 4e-2)}

# One word, scripts of one to four bytes a character, a prompt, look-alikes of special tokens, white space at the ends and
# doubled, next to nothing, both Unicode normal forms, and at the end a text that needs cutting.
TEXTS = (
    "hello",
    "How do neural networks learn patterns from examples?",
    "Instruct: Given a question, retrieve passages that answer the question\nQuery: who wrote the Iliad?",
    "  two spaces before, two behind  ",
    "Deep learning models adjust their weights through backpropagation, using gradient descent to minimize error.",
    "Das Wetter in Zürich ist heute schön, naïveté coûte cher.",
    "Zu\u0308rich nai\u0308vete\u0301, decomposed; \ufb01ne ligature",
    "东京是日本的首都。 Привет, мир! مرحبا 🦙",
    "Markup such as <b>, [MASK], </s> and <|end_of_text|> is ordinary text.  Spaces   and\ttabs count.",
    "<s>",
    "<|begin_of_text|>a text that begins and ends like one of theirs</s>",
    "<unk> [PAD] <pad> <|eot_id|>\n<|end_of_text|>",
    "\nlines around\r\n\n",
    "\ttabs around\t",
    "\u00a0no-break spaces\u00a0",
    "",
    " ",
    "\u200b",
    "\n",
    "A\u200bzero\ufeffwidth\u2060text",
    "A long passage is cut at the limit that the folder states, at the same token everywhere. " * 40,
)
PROBE = 1  # of TEXTS: whose last token is replaced
NUM_PROMPTED = 4  # of TEXTS, the first ones: encoded with the folder's prompts too
DEFAULT_LENGTH = 512  # tokens, for a folder that states none
Embed = Callable[[list[str], int], np.ndarray]
Say = Callable[[str], None]


def verify_folder(
    path: Path | str,
    embed: Embed | None = None,
    trust_remote_code: bool = False,
    *,
    ours: bool = True,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Check a folder, weights to embeddings; UserError names what is wrong. Returns what was measured.

    embed(texts, max_length) -> [N, D] unit rows of our own encoder in fp32; prompts are in the texts already.
    Whatever the weights' dtype is, it must agree with transformers and sentence-transformers in fp32 as fp32 does; what
    sentence-transformers gives in that dtype is held to its own TOLERANCE. Code in the folder is run only when it is the
    file that we write, or with trust_remote_code. Takes the time of two loads on the CPU and two library imports.

    ours: an export of this version, whose files must be spelled as it writes them; the first fault ends it. Otherwise anybody's
    folder of a Llama: whether it is causal is answered first, then all that can be; what cannot be proven is said, and is no
    fault. say: gets each answer as a line, as soon as it is there.
    """
    path = Path(path)
    config = _read_object(path / "config.json")
    if not ours and config.get("model_type") not in ARCHITECTURES:
        raise UserError(
            f"{path / 'config.json'}: model_type is {json.dumps(config.get('model_type'))}; only Llama folders "
            f"({', '.join(ARCHITECTURES)}) can be proven here, so nothing of this one was looked at"
        )
    has_code = _check_code(path, config, trust_remote_code)
    if has_weights(path):
        weight_files(path, config)  # two sets of weights: whatever is proven of one says nothing of the other
    return (_verify_ours if ours else _verify_anybodys)(path, config, embed, has_code, say)


def _verify_ours(path: Path, config: dict[str, Any], embed: Embed | None, has_code: bool, say: Say) -> dict[str, Any]:
    dtype = _check_config(path, config)
    expected = expected_tensors(config)
    _check_weights(path, expected, dtype)
    max_seq_length = _check_sentence_transformers_files(path, config)
    usage = usage_of_folder(path)
    tokenizer, texts = _backend(path, max_seq_length)
    vectors = _reload(path, texts, max_seq_length, has_code)
    say(_weights_line(expected, {dtype}))
    changes = dict(zip(vectors["case_names"].tolist(), vectors["first_state_changes"].tolist(), strict=True))
    _check_bidirectional(path, config, changes, str(vectors["transformers_version"]), has_code)
    say(_attention_line(changes, vectors))
    if reason := str(vectors["tokenizer_error"]):
        raise UserError(f"{path}: AutoTokenizer does not load: {reason}")
    _check_tokens(path, vectors, tokenizer, texts)
    if (length := int(vectors["default_length"])) != max_seq_length:
        raise UserError(
            f"{path}: AutoTokenizer with truncation=True cuts at {length} tokens, not at {max_seq_length}; set model_max_length "
            f"in tokenizer_config.json"
        )
    say(
        f"tokens: {len(texts)} texts and one that is cut, equal in tokenizer.json, transformers and sentence-transformers"
    )
    _check_prompts_of(path, vectors, usage)
    report = {"dtype": dtype, **_compare(path, texts, usage, max_seq_length, vectors, embed, {dtype}, say)}
    return {**report, **_measured(expected, changes, vectors)}


def _verify_anybodys(
    path: Path, config: dict[str, Any], embed: Embed | None, has_code: bool, say: Say
) -> dict[str, Any]:
    faults: list[str] = []

    def attempt(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except UserError as error:
            faults.append(str(error))

    attempt(lambda: resolve(path))  # what contradicts in it, also where our encoder is not compared
    modules = attempt(lambda: _modules(path))
    usage = attempt(lambda: usage_of_folder(path)) or Usage()
    stated = usage.document_max_length and max(usage.query_max_length or 0, usage.document_max_length)
    positions = config.get("max_position_embeddings")
    max_seq_length = stated or min(DEFAULT_LENGTH, positions if type(positions) is int else DEFAULT_LENGTH)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: set[str] = set()

    def weights() -> None:
        opened = open_folder(path)
        shapes.update(expected_tensors({"num_key_value_heads": config["num_attention_heads"], **config}))
        for name, (stored, file) in opened.where.items():
            if name in shapes:
                with safe_open(path / file, framework="pt") as tensors:
                    dtypes.add(_check_tensor(path / file, stored, tensors.get_slice(stored), shapes[name], None))

    tokenizer, texts = attempt(
        lambda: _backend(path, max_seq_length, load_tokenizer(path).files["tokenizer.json"])
    ) or (
        None,
        list(TEXTS),
    )
    try:
        vectors = _reload(path, texts, max_seq_length, has_code, not stated, modules is not None, partly=True)
    except UserError:
        weights()  # says more, where a file is the reason
        raise
    changes = dict(zip(vectors["case_names"].tolist(), vectors["first_state_changes"].tolist(), strict=True))
    say(_attention_line(changes, vectors))
    attempt(lambda: _check_bidirectional(path, config, changes, str(vectors["transformers_version"]), has_code))
    attempt(weights)
    if dtypes:
        say(_weights_line(shapes, dtypes))
    report: dict[str, Any] = {}
    if reason := str(vectors["tokenizer_error"]):
        faults.append(f"{path}: AutoTokenizer does not load: {reason}")
    if "error" in vectors:
        faults.append(f"{path} does not load in sentence-transformers: {vectors['error']}")
    if "transformers_ND" not in vectors:
        say("tokens and vectors: not compared, because of the above")
    elif tokenizer is not None:
        pooling = _pooling(path, modules) if modules is not None else ""
        if modules is None:
            say("sentence-transformers: not there (no modules.json); prompts, limit and pooling are nowhere stated")
        elif pooling:
            say(
                f"sentence-transformers: {pooling}, which is not what this package computes; its vectors are not compared"
            )
        if modules is not None and not stated:
            say(f"limit: the folder states none; compared at {max_seq_length} tokens")
        attempt(lambda: _check_tokens(path, vectors, tokenizer, texts))
        others = _texts_of_other_rules(path, tokenizer, texts, vectors)
        if pooling:
            embed = None  # ours pools by the mean
        if others:
            say(
                f"tokens: {len(others)} of {len(texts)} texts hold special tokens, which this folder's transformers tokenizer takes for "
                f"tokens and we for text (split_special_tokens); not compared with our encoder"
            )
        if "prompts" in vectors:
            default = replace(
                usage, prompts={"query": usage.default}
            )  # of others only texts are known, not their sides
            attempt(lambda: _check_prompts_of(path, vectors, default))
        if not faults:
            compared = {**vectors, "without_sentence_transformers": np.array(bool(pooling) or modules is None)}
            report = (
                attempt(lambda: _compare(path, texts, usage, max_seq_length, compared, embed, dtypes, say, others))
                or {}
            )
    spelling: list[Callable[[], Any]] = [lambda: _check_config(path, config)]
    if modules is not None:
        spelling.append(lambda: _check_sentence_transformers_files(path, config))
    for check in spelling:
        try:
            check()
        except UserError as error:
            say(
                f"not proven for text-embeddings-inference, llama.cpp and older libraries, which read other spellings: {error}"
            )
    if faults:
        raise UserError("; ".join(dict.fromkeys(faults)))
    return {**report, **_measured(shapes, changes, vectors)}


def _attention_line(changes: dict[str, float], vectors: dict[str, np.ndarray]) -> str:
    if any(math.isnan(change) for change in changes.values()):
        return "attention: no answer, hidden states are NaN"
    free = sum(change > 0 for change in changes.values())
    how = "bidirectional" if free == len(changes) else "causal" if not free else "partly causal"
    return f"attention: {how}, bidirectional in {free} of {len(changes)} cases (transformers {vectors['transformers_version']})"


def _weights_line(expected: dict[str, tuple[int, ...]], dtypes: set[str]) -> str:
    parameters = sum(math.prod(shape) for shape in expected.values())
    return f"weights: {len(expected)} tensors as config.json implies, {parameters:,} parameters, {', '.join(sorted(dtypes))}, all finite"


def _measured(
    expected: dict[str, tuple[int, ...]], changes: dict[str, float], vectors: dict[str, np.ndarray]
) -> dict[str, Any]:
    return {
        "tensors": len(expected),
        "parameters": sum(math.prod(shape) for shape in expected.values()),
        "smallest_first_state_change": min(changes.values()),
        "transformers": str(vectors["transformers_version"]),
        "sentence_transformers": str(vectors.get("sentence_transformers_version", "not there")),
    }


def _compare(
    path: Path,
    texts: list[str],
    usage: Usage,
    max_seq_length: int,
    vectors: dict[str, np.ndarray],
    embed: Embed | None,
    dtypes: set[str],
    say: Say,
    others: Sequence[int] = (),
) -> dict[str, Any]:
    """Vectors of all that gave some; others: texts that our encoder is not asked for."""
    has_theirs = "sentence_transformers_ND" in vectors and not vectors.get("without_sentence_transformers")
    prompted, prompts = texts[:NUM_PROMPTED], usage.default
    transformers_ND, left_ND = vectors["transformers_ND"], vectors["left_padded_ND"]
    in_fp32 = {"transformers": transformers_ND}
    loosest = max(dtypes, key=lambda name: TOLERANCE[name][0])
    differences: dict[str, float] = {}
    if has_theirs:
        in_fp32["sentence-transformers"] = _unit(vectors["sentence_transformers_ND"])
    if embed is not None:
        given = texts + [prompts.query + text for text in prompted] + [prompts.document + text for text in prompted]
        ours_ND = np.asarray(embed(given, max_seq_length), dtype=np.float32)
        N, M = len(texts), len(prompted)
        mine = {"our encoder": ours_ND[:N], "queries": ours_ND[N : N + M], "documents": ours_ND[N + M :]}
        keep = [i for i in range(N) if i not in others]
        for name, rows_ND in in_fp32.items():
            pair = {name: rows_ND[keep], "our encoder": mine["our encoder"][keep]}
            differences |= compare_vectors(path, pair, "float32", [texts[i] for i in keep])
        for side in ("queries", "documents") if has_theirs else ():
            theirs_MD = _unit(vectors[f"{side}_MD"])
            pair = {f"sentence-transformers' {side}": theirs_MD, f"our encoder's {side}": mine[side]}
            differences |= compare_vectors(path, pair, "float32", prompted)
    differences |= compare_vectors(path, in_fp32, "float32", texts)
    sides = {"padded on the right": transformers_ND[: len(left_ND)], "padded on the left": left_ND}
    differences |= compare_vectors(path, sides, "float32", texts)
    if has_theirs:
        as_loaded = {
            "transformers": transformers_ND,
            f"sentence-transformers in {loosest}": _unit(vectors["as_loaded_ND"]),
        }
        differences |= compare_vectors(path, as_loaded, loosest, texts)
    who = [*in_fp32, *(["our encoder"] if embed is not None else [])]
    also = f", and {len(prompted)} with the prompts of each side" if has_theirs and embed is not None else ""
    agree = f"{', '.join(who)} agree" if len(who) > 1 else "only transformers' own, which agree with either padding,"
    say(f"vectors: {agree} on {len(texts)} texts{also}")
    for names, difference in differences.items():
        say(f"  {names}: {difference:.1e}")
    if embed is None:
        say("our encoder: not compared, it does not run this folder")
    return {
        "texts": len(texts),
        "max_abs_diff": differences,
        "tolerance": {name: TOLERANCE[name][0] for name in ("float32", loosest)},
    }


def _unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1: where a folder has no Normalize, cosines do it."""
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


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


def compare_vectors(
    path: Path, named: dict[str, np.ndarray], dtype: str, texts: Sequence[str] = TEXTS
) -> dict[str, float]:
    """Largest coordinate difference of every pair in {who: [N, D]}; UserError above TOLERANCE or for another shape."""
    max_difference, max_distance = TOLERANCE[dtype]
    differences = {}
    names = list(named)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a_ND, b_ND = named[first], named[second]
            if a_ND.shape != b_ND.shape:
                raise UserError(
                    f"{path}: {first} gives embeddings of shape {a_ND.shape} for {len(texts)} texts and {second} "
                    f"{b_ND.shape}; the folder and the encoder it is compared with are not the same model"
                )
            difference_N = np.abs(a_ND - b_ND).max(axis=1)
            distance_N = np.linalg.norm(a_ND - b_ND, axis=1)
            worst = int(distance_N.argmax())  # NaN counts as the largest
            if not (difference_N.max() <= max_difference and distance_N[worst] <= max_distance):
                raise UserError(
                    f"{path}: {first} and {second} disagree, most for the text {texts[worst][:40]!r}: one coordinate by "
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
    if any(math.isnan(change) for change in changes.values()):
        raise UserError(
            f"{path}: hidden states are NaN, which says nothing of a mask; the weights or rms_norm_eps are wrong"
        )
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
    _check_settings(path, config)
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in TOLERANCE:
        raise UserError(f"{file}: dtype is {json.dumps(dtype)} and must be one of {', '.join(TOLERANCE)}")
    _require(file, config.get("torch_dtype", dtype), dtype, "torch_dtype")
    return dtype


def _check_settings(path: Path, config: dict[str, Any]) -> None:
    """What of config.json decides vectors, in any folder of a Llama."""
    file = path / "config.json"
    for key in ("attention_bias", "mlp_bias"):
        _require(file, config.get(key, False), False, key)
    _require(file, config.get("hidden_act", "silu"), "silu", "hidden_act")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in (*sizes, "num_key_value_heads"):
        value = config.get(key, config.get("num_attention_heads") if key == "num_key_value_heads" else None)
        if type(value) is not int or value < (0 if key == "num_hidden_layers" else 1):
            raise UserError(f"{file}: {key} is {json.dumps(value)} and must be a positive integer")
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new is not None and "rope_theta" in config:
        # Two spellings for two generations of readers: where they differ, the same folder gives two sets of vectors.
        legacy = {**(old or {"rope_type": "default"}), "rope_theta": config["rope_theta"]}
        _require(file, new, legacy, "rope_parameters, against rope_theta and rope_scaling,")


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


def _check_weights(path: Path, expected: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Every tensor that config.json implies, once, with its shape and dtype and finite, and no other."""
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


def _check_tensor(file: Path, name: str, tensor: Any, shape: tuple[int, ...], dtype: str | None) -> str:
    """Its dtype. `tensor` is a lazy slice: read by blocks of rows, so that memory stays at 64 MB beside any size of tensor."""
    if tuple(tensor.get_shape()) != shape:
        raise UserError(f"{file}: {name} has shape {tuple(tensor.get_shape())}; config.json implies {shape}")
    rows, found = max(1, (16 << 20) // math.prod(shape[1:])), ""
    for start in range(0, shape[0], rows):
        block = tensor[start : start + rows]
        found = str(block.dtype).removeprefix("torch.")
        if found != (dtype or found) or found not in TOLERANCE:
            raise UserError(
                f"{file}: {name} is {found}; config.json says {dtype or 'nothing'}, and it must be one of {', '.join(TOLERANCE)}"
            )
        finite = torch.isfinite(block)
        if not finite.all():
            row = start + int((~finite).reshape(len(block), -1).any(dim=1).nonzero()[0])
            raise UserError(
                f"{file}: {name} has {int((~finite).sum())} values that are NaN or infinite in rows {start} to "
                f"{start + len(block) - 1}, the first in row {row}; the run diverged or the file is damaged, take an "
                f"earlier checkpoint"
            )
    return found


# ------------------------------------------------------------------------------------------ another process


def run_reload(python: str, path: Path, output: Path, request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """reload.py on the folder with this interpreter, its arrays into `output`; beside it, what the libraries write."""
    file = output.with_name("request.json")
    file.write_text(json.dumps(request))
    return subprocess.run(
        [python, str(Path(__file__).with_name("reload.py")), str(path.resolve()), str(file), str(output)],
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


def reload_request(
    texts: Sequence[str], max_seq_length: int, trusted: bool, sets_length: bool = False, with_theirs: bool = True
) -> dict[str, Any]:
    """reload.py's REQUEST.json."""
    return {
        **{"texts": list(texts), "num_prompted": NUM_PROMPTED, "probe": PROBE},
        **{"max_seq_length": max_seq_length, "sets_length": sets_length},
        **{"trust_remote_code": trusted, "sentence_transformers": with_theirs},
    }


def _reload(path: Path, *request: Any, partly: bool = False) -> dict[str, np.ndarray]:
    """reload.py's arrays. A fresh interpreter: nothing that this one has imported, patched or cached takes part.

    partly: where only sentence-transformers does not load it, what transformers gave, and the reason as "error".
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError("verifying an export needs sentence-transformers: pip install 'nemo_embed_core[eval]'")
    with tempfile.TemporaryDirectory() as scratch, writing(Path(scratch), 100 << 20, "the proof"):
        output = Path(scratch) / "vectors.npz"
        child = run_reload(sys.executable, path, output, reload_request(*request))
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or ["no output"])[-1]
            if partly and output.is_file():
                with np.load(output, allow_pickle=False) as arrays:
                    return {**arrays, "error": np.array(reason)}
            raise UserError(
                f"{path} does not load in transformers and sentence-transformers (exit code {child.returncode}): {reason}"
            )
        with np.load(output, allow_pickle=False) as arrays:
            return dict(arrays)


def _backend(path: Path, max_seq_length: int, content: bytes | None = None) -> tuple[Tokenizer, list[str]]:
    """(tokenizer.json as transformers is told to use it, the TEXTS of which it makes at least one token)."""
    tokenizer = Tokenizer.from_buffer(content or (path / "tokenizer.json").read_bytes())
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_seq_length)
    file = path / "tokenizer_config.json"
    tokenizer.encode_special_tokens = bool(file.is_file() and _read_object(file).get("split_special_tokens"))
    return tokenizer, [text for text in TEXTS if tokenizer.encode(text).ids]


def _rows(vectors: dict[str, np.ndarray], prefix: str = "") -> list[list[int]]:
    ends = vectors[f"{prefix}token_counts"].cumsum()
    return [row.tolist() for row in np.split(vectors[f"{prefix}token_ids"], ends[:-1])]


def _check_tokens(path: Path, vectors: dict[str, np.ndarray], tokenizer: Tokenizer, texts: list[str]) -> None:
    """Everybody must read tokenizer.json as written, and cut where `tokenizer` does: some classes of transformers rebuild the
    pipeline by their own rules. The last row is of the long text, repeated until it must be cut.
    """
    long_text = texts[-1] * int(vectors["num_repeats"])
    for who, prefix in (("AutoTokenizer", ""), ("sentence-transformers", "st_")):
        if f"{prefix}token_ids" not in vectors:
            continue
        for text, theirs in zip([*texts, long_text], _rows(vectors, prefix), strict=True):
            ours = list(tokenizer.encode(text).ids)
            if len(ours) != len(theirs) and text is long_text:
                raise UserError(
                    f"{path}: {who} cuts a long text at {len(theirs)} tokens, not at {len(ours)}; check max_seq_length in "
                    f"sentence_bert_config.json"
                )
            if ours != theirs:
                raise UserError(
                    f"{path}: {who} gives {len(theirs)} tokens {theirs[:6]}... for {text[:40]!r} and "
                    f"tokenizer.json {len(ours)} tokens {ours[:6]}...; check tokenizer_class, bos_token, add_bos_token, "
                    f"add_prefix_space and truncation_side in tokenizer_config.json"
                )


def _texts_of_other_rules(
    path: Path, tokenizer: Tokenizer, texts: list[str], vectors: dict[str, np.ndarray]
) -> list[int]:
    """Texts of which the folder's tokenizer makes special tokens, and ours, as in training, never does."""
    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    others = [i for i, row in enumerate(_rows(vectors)[:-1]) if row != tokenizer.encode(texts[i]).ids]
    tokenizer.encode_special_tokens = before
    return others


def _check_prompts_of(path: Path, vectors: dict[str, np.ndarray], usage: Usage) -> None:
    """sentence-transformers has the prompts and the similarity that the folder says it was trained with."""
    theirs = json.loads(str(vectors["prompts"]))
    for name, prompt in usage.named_prompts().items():
        if theirs.get(name, "") != prompt:
            raise UserError(
                f"{path}: sentence-transformers has the prompt {name!r} {json.dumps(theirs.get(name))} and the model is used with "
                f"{json.dumps(prompt)}; check prompts in config_sentence_transformers.json"
            )
    if (similarity := str(vectors["similarity"])) != usage.similarity:
        raise UserError(
            f"{path}: sentence-transformers compares by {similarity} and the model is used with {usage.similarity}"
        )


# ------------------------------------------------------------------------------------------ modules of anybody's folder


def _modules(path: Path) -> list[dict[str, Any]] | None:
    if not (path / "modules.json").is_file():
        return None
    modules = _read_json(path / "modules.json")
    if not isinstance(modules, list) or not all(
        isinstance(m, dict) and isinstance(m.get("type"), str) for m in modules
    ):
        raise UserError(f"{path / 'modules.json'} must hold a list of objects with type and path")
    return modules


def _pooling(path: Path, modules: list[dict[str, Any]]) -> str:
    """ "" for Transformer, mean pooling and at most Normalize, in any version's spelling; else what else it is."""
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        return f"its modules are {', '.join(kinds)}"
    pooling = _read_object(path / str(modules[1].get("path", "1_Pooling")) / "config.json")
    modes = [
        key.removeprefix("pooling_mode_") for key, v in pooling.items() if key.startswith("pooling_mode_") and v is True
    ]
    named = pooling.get("pooling_mode") or []
    modes = modes or ([named] if isinstance(named, str) else list(named))
    if modes not in (["mean"], ["mean_tokens"]):
        return f"its pooling is {', '.join(modes) or 'not stated'}"
    return "" if pooling.get("include_prompt", True) is True else "its pooling leaves the prompt out"
