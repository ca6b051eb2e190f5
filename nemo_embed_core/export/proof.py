"""Proof that a folder gives our embeddings everywhere: re-open, reload elsewhere, compare, perturb.

Nothing is taken on trust from the writer: names, shapes and types are derived from config.json again, every
weight is read for NaN and infinity, and a process that knows nothing of this package loads the folder as its
users will.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nemo_embed_core.checkpoint.hf_folder import has_weights, open_folder, weight_files
from nemo_embed_core.checkpoint.source import (
    DEFAULT_LENGTH,
    Modules,
    Usage,
    modules_of,
    resolve,
    usage_of_folder,
)
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.data.tokenizer import load_tokenizer
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.consumers import (
    NUM_PROMPTED,
    TEXTS,
    backend,
    check_attention,
    check_prompts,
    check_tokens,
    first_state_changes,
    reload_folder,
    texts_of_other_rules,
)
from nemo_embed_core.export.files import (
    check_code,
    check_config,
    check_sentence_transformers_files,
    check_weights,
)
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.model.spec import ARCHITECTURES, pooling_of_modes

# Two unit vectors for the same text and weights, by the dtype that computed one of them: largest difference
# of one coordinate, and distance. The distance is what binds for wide models: at 4096 channels a coordinate
# is 0.016, so 2e-2 alone says little. About twice what random Llamas of 32 layers measure
# (tests/export/test_proof.py). A lost RoPE scaling can stay below bf16's tolerance, which is why everything
# is compared in fp32 first.
TOLERANCE = {"float32": (1e-5, 1e-4), "float16": (5e-3, 1e-2), "bfloat16": (2e-2, 4e-2)}
Config = dict[str, Any]
Report = dict[str, Any]
Vectors = dict[str, np.ndarray]  # reload.py's arrays
Embed = Callable[[list[str], int], np.ndarray]
Say = Callable[[str], None]
T = TypeVar("T")


def verify_folder(
    path: Path | str,
    embed: Embed | None = None,
    trust_remote_code: bool = False,
    *,
    ours: bool = True,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """max |theirs - embed(texts)| <= TOLERANCE, and d(first hidden state) / d(last token) != 0, or
    == 0 where config.json says is_causal: true.

    embed(texts, max_length) -> [N, D] unit rows of our own encoder in fp32; prompts are in the texts already.
    theirs: of transformers and sentence-transformers in fp32, whatever the weights' dtype is, and of
    sentence-transformers in that dtype with its own TOLERANCE.  trust_remote_code: run code in the folder
    that is not the file that we write. say: gets each answer as a line, as soon as it is there.

    ours: an export of this version, whose files must be spelled as it writes them; the first fault ends it.
    Otherwise anybody's folder: whether it is causal is answered first, then all that can be; what
    cannot be proven is said, and is no fault.

    Returns what was measured; UserError names what is wrong. Takes the time of two loads on the CPU and two
    imports.
    """
    path = Path(path)
    config = read_object(path / "config.json")
    if not ours and config.get("model_type") not in ARCHITECTURES:
        raise UserError(
            f"{path / 'config.json'}: model_type is {json.dumps(config.get('model_type'))}; only "
            f"folders of {', '.join(ARCHITECTURES)} can be proven here, so nothing of this one was looked at"
        )
    has_code = check_code(path, trust_remote_code)
    if has_weights(path):
        weight_files(path, config)  # two sets of weights: whatever is proven of one says nothing of the other
    return (_verify_ours if ours else _verify_anybodys)(path, config, embed, has_code, say)


def _verify_ours(path: Path, config: Config, embed: Embed | None, has_code: bool, say: Say) -> Report:
    opened, dtype = open_folder(path), check_config(path, config)
    shapes, dtypes = check_weights(opened, dtype)
    max_length = check_sentence_transformers_files(path, opened.model.hidden_size, opened.model.pooling)
    usage = usage_of_folder(path)
    tokenizer, texts = backend(path, max_length)
    vectors = reload_folder(path, texts, max_length, has_code, pooling=opened.model.pooling)
    say(_weights_line(shapes, dtypes))
    check_attention(path, config, vectors, has_code)
    say(_attention_line(vectors))
    if reason := str(vectors["tokenizer_error"]):
        raise UserError(f"{path}: AutoTokenizer does not load: {reason}")
    check_tokens(path, vectors, tokenizer, texts)
    if (length := int(vectors["default_length"])) != max_length:
        raise UserError(
            f"{path}: AutoTokenizer with truncation=True cuts at {length} tokens, not at {max_length}; set "
            f"model_max_length in tokenizer_config.json"
        )
    everywhere = "tokenizer.json, transformers and sentence-transformers"
    say(f"tokens: {len(texts)} texts and one that is cut, equal in {everywhere}")
    check_prompts(path, vectors, usage)
    compared = _compare(path, texts, usage, max_length, vectors, embed, dtypes, say)
    return {"dtype": dtype, **compared, **_measured(shapes, vectors)}


# ------------------------------------------------------------------------------------------ anybody's folder


class _Faults(list[str]):
    """Those of a folder that is looked at to the end."""

    def attempt(self, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except UserError as error:
            self.append(str(error))
            return None


def _verify_anybodys(path: Path, config: Config, embed: Embed | None, has_code: bool, say: Say) -> Report:
    faults = _Faults()
    faults.attempt(lambda: resolve(path))  # what contradicts in it, also where our encoder is not compared
    modules = faults.attempt(lambda: modules_of(path))
    usage = faults.attempt(lambda: usage_of_folder(path)) or Usage()
    stated = usage.document_max_length and usage.longest
    positions = config.get("max_position_embeddings")
    max_length = stated or min(DEFAULT_LENGTH, positions if type(positions) is int else DEFAULT_LENGTH)
    found = faults.attempt(lambda: backend(path, max_length, load_tokenizer(path).files["tokenizer.json"]))
    tokenizer, texts = found or (None, list(TEXTS))
    has_modules = modules is not None
    try:
        request = (texts, max_length, has_code, not stated, has_modules)
        vectors = reload_folder(path, *request, pooling=usage.pooling, partly=True)
    except UserError:
        check_weights(open_folder(path))  # says more, where a file is the reason
        raise
    say(_attention_line(vectors))
    faults.attempt(lambda: check_attention(path, config, vectors, has_code))
    shapes, dtypes = faults.attempt(lambda: check_weights(open_folder(path))) or ({}, set())
    if dtypes:
        say(_weights_line(shapes, dtypes))
    if reason := str(vectors["tokenizer_error"]):
        faults.append(f"{path}: AutoTokenizer does not load: {reason}")
    if "error" in vectors:
        faults.append(f"{path} does not load in sentence-transformers: {vectors['error']}")
    report: Report = {}
    if "transformers_ND" not in vectors:
        say("tokens and vectors: not compared, because of the above")
    elif tokenizer is not None:
        unlike = _say_what_is_stated(modules, bool(stated), max_length, say)
        faults.attempt(lambda: check_tokens(path, vectors, tokenizer, texts))
        others = texts_of_other_rules(tokenizer, texts, vectors)
        if others:
            say(
                f"tokens: {len(others)} of {len(texts)} texts hold special tokens, which this folder's "
                "transformers "
                "tokenizer takes for tokens and we for text (split_special_tokens); not compared with our "
                "encoder"
            )
        if "prompts" in vectors:
            # Of other tasks only their texts are known, not their sides.
            default = replace(usage, prompts={"query": usage.default})
            faults.attempt(lambda: check_prompts(path, vectors, default))
        if not faults:
            ours, theirs = None if unlike else embed, has_modules and not unlike
            compared = (path, texts, usage, max_length, vectors, ours, dtypes, say, others, theirs)
            report = faults.attempt(lambda: _compare(*compared)) or {}
    _say_other_spellings(path, config, modules, say)
    if faults:
        raise UserError("; ".join(dict.fromkeys(faults)))
    return {**report, **_measured(shapes, vectors)}


def _say_what_is_stated(modules: Modules | None, has_limit: bool, max_length: int, say: Say) -> str:
    """What of modules.json our encoder does not compute; "" where it computes the same."""
    if modules is None:
        say(
            "sentence-transformers: not there (no modules.json); prompts, limit and pooling are nowhere "
            "stated"
        )
        return ""
    unlike = modules.unlike_ours()
    if unlike:
        say(
            f"sentence-transformers: {unlike}, which is not what this package computes; its vectors are not "
            "compared"
        )
    if not has_limit:
        say(f"limit: the folder states none; compared at {max_length} tokens")
    return unlike


def _say_other_spellings(path: Path, config: Config, modules: Modules | None, say: Say) -> None:
    """What readers that know one spelling would miss; no fault of the folder."""
    spelling = _Faults()
    spelling.attempt(lambda: check_config(path, config))
    if modules is not None:
        pooling = pooling_of_modes(modules.pooling_modes) or ModelConfig.pooling
        hidden_size = config.get("hidden_size", 0)
        spelling.attempt(lambda: check_sentence_transformers_files(path, hidden_size, pooling))
    readers = "text-embeddings-inference, llama.cpp and older libraries"
    for fault in spelling:
        say(f"not proven for {readers}, which read other spellings: {fault}")


# ------------------------------------------------------------------------------ what is said and measured


def _attention_line(vectors: Vectors) -> str:
    changes = first_state_changes(vectors)
    if any(math.isnan(change) for change in changes.values()):
        return "attention: no answer, hidden states are NaN"
    free = sum(change > 0 for change in changes.values())
    how = "partly causal, bidirectional" if 0 < free < len(changes) else "bidirectional" if free else "causal"
    cases = f"{free or len(changes)} of {len(changes)} cases"
    return f"attention: {how} in {cases} (transformers {vectors['transformers_version']})"


def _num_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _weights_line(shapes: Mapping[str, tuple[int, ...]], dtypes: set[str]) -> str:
    kinds = ", ".join(sorted(dtypes))
    parameters = f"{_num_parameters(shapes):,} parameters"
    return f"weights: {len(shapes)} tensors as config.json implies, {parameters}, {kinds}, all finite"


def _measured(shapes: Mapping[str, tuple[int, ...]], vectors: Vectors) -> dict[str, Any]:
    return {
        "tensors": len(shapes),
        "parameters": _num_parameters(shapes),
        "smallest_first_state_change": min(first_state_changes(vectors).values()),
        "transformers": str(vectors["transformers_version"]),
        "sentence_transformers": str(vectors.get("sentence_transformers_version", "not there")),
    }


# ------------------------------------------------------------------------------------------ vectors


def _compare(
    path: Path,
    texts: list[str],
    usage: Usage,
    max_length: int,
    vectors: Vectors,
    embed: Embed | None,
    dtypes: set[str],
    say: Say,
    others: Sequence[int] = (),
    has_theirs: bool = True,
) -> Report:
    """Vectors of all that gave some; others: texts that our encoder is not asked for.

    has_theirs: sentence-transformers computes what we do.
    """
    has_theirs = has_theirs and "sentence_transformers_ND" in vectors
    prompted, prompts = texts[:NUM_PROMPTED], usage.default
    transformers_ND, left_ND = vectors["transformers_ND"], vectors["left_padded_ND"]
    in_fp32 = {"transformers": transformers_ND}
    loosest = max(dtypes, key=lambda name: TOLERANCE[name][0])
    differences: dict[str, float] = {}
    if has_theirs:
        in_fp32["sentence-transformers"] = _unit(vectors["sentence_transformers_ND"])
    keep = [i for i in range(len(texts)) if i not in others]
    if embed is not None:
        N, M = len(texts), len(prompted)
        given = [prompt + text for prompt in prompts for text in prompted]
        ours_ND = np.asarray(embed(texts + given, max_length), dtype=np.float32)
        mine = {"our encoder": ours_ND[:N], "queries": ours_ND[N : N + M], "documents": ours_ND[N + M :]}
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
        theirs_ND = _unit(vectors["as_loaded_ND"])
        as_loaded = {"transformers": transformers_ND, f"sentence-transformers in {loosest}": theirs_ND}
        differences |= compare_vectors(path, as_loaded, loosest, texts)
    say(
        f"vectors: {_agreement(list(in_fp32), embed is not None, len(texts), len(keep))}"
        + (f", and {len(prompted)} with the prompts of each side" if has_theirs and embed is not None else "")
    )
    for names, difference in differences.items():
        say(f"  {names}: {difference:.1e}")
    if embed is None:
        say("our encoder: not compared, it does not run this folder")
    return {
        "texts": len(texts),
        "max_abs_diff": differences,
        "tolerance": {name: TOLERANCE[name][0] for name in ("float32", loosest)},
    }


def _agreement(libraries: list[str], has_ours: bool, num_texts: int, num_ours: int) -> str:
    """Who agrees on how many texts; num_ours: of those that our encoder was compared on."""
    if not has_ours and len(libraries) == 1:
        return f"only {libraries[0]}' own, which agree with either padding, on {num_texts} texts"
    if not has_ours:
        return f"{', '.join(libraries)} agree on {num_texts} texts"
    if num_ours == num_texts:
        return f"{', '.join(libraries)}, our encoder agree on {num_texts} texts"
    if len(libraries) == 1:
        return f"{libraries[0]}, our encoder agree on {num_ours} of {num_texts} texts"
    return f"{', '.join(libraries)} agree on {num_texts} texts, our encoder with them on {num_ours} of these"


def _unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1: where a folder has no Normalize, cosines do it."""
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def compare_vectors(
    path: Path, named: dict[str, np.ndarray], dtype: str, texts: Sequence[str] = TEXTS
) -> dict[str, float]:
    """max |a - b| of every pair in {who: [N, D]}; UserError above TOLERANCE or for another shape."""
    max_difference, max_distance = TOLERANCE[dtype]
    differences = {}
    names = list(named)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a_ND, b_ND = named[first], named[second]
            if a_ND.shape != b_ND.shape:
                raise UserError(
                    f"{path}: {first} gives embeddings of shape {a_ND.shape} for {len(texts)} texts and "
                    f"{second} {b_ND.shape}; the folder and the encoder it is compared with are not the same "
                    "model"
                )
            difference_N = np.abs(a_ND - b_ND).max(axis=1)
            distance_N = np.linalg.norm(a_ND - b_ND, axis=1)
            worst = int(distance_N.argmax())  # NaN counts as the largest
            if not (difference_N.max() <= max_difference and distance_N[worst] <= max_distance):
                raise UserError(
                    f"{path}: {first} and {second} disagree, most for the text {texts[worst][:40]!r}: one "
                    f"coordinate by {difference_N[worst]:.2e} (allowed in {dtype}: {max_difference:.0e}), "
                    f"distance {distance_N[worst]:.2e} (allowed: {max_distance:.0e}); compare pooling, "
                    "normalisation, prompt, RoPE settings and weights"
                )
            differences[f"{first} / {second}"] = float(difference_N.max())
    return differences
