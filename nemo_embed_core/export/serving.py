"""Who serves an exported folder: each consumer that is installed runs in its own process and its vectors are
compared with ours; another is judged by what its source accepts, and said to be not run.

    ask(path, "onnxruntime", embed)     -> Answer("onnxruntime", "proven", "onnxruntime 1.32.0: ...")
    ask(path, "tei", embed)             -> Answer("tei", "refused", "not run; by its source: ...")
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nemo_embed_core.checkpoint.hf_folder import open_folder
from nemo_embed_core.checkpoint.source import usage_of_folder
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.consumers import NUM_PROMPTED, backend
from nemo_embed_core.export.faults import check_faults, faulty_vectors
from nemo_embed_core.export.files import check_sentence_transformers_files
from nemo_embed_core.export.formats import CONSUMERS, FORMATS, VARIANTS, Answer, Format, State, variants_in
from nemo_embed_core.export.gguf import Q8_0, check_gguf, write_gguf
from nemo_embed_core.export.onnx import check_onnx, write_onnx
from nemo_embed_core.export.onnx_variants import check_libraries, write_fp16, write_int8
from nemo_embed_core.export.proof import Embed, compare_vectors
from nemo_embed_core.files.durable import writing
from nemo_embed_core.files.strict_json import read_object

Tensors = dict[str, np.ndarray]


# ------------------------------------------------------------------------------------------ files of a format

# format -> (UserError where it cannot be written, the writer of its file in a native folder).
FILES: Mapping[str, tuple[Callable[[ModelConfig, Mapping[str, bytes]], None], Callable[[Path], Path]]] = {
    "onnx": (check_onnx, write_onnx),
    "gguf": (check_gguf, write_gguf),
}
# variant -> writer of it, given the format's own file.
WRITERS: Mapping[str, Callable[[Path, Path], Any]] = {
    "fp16": write_fp16,
    "int8": write_int8,
    "q8_0": lambda source, file: write_gguf(source.parent, file, Q8_0),
}


def check_file(
    format: Format, model: ModelConfig, tokenizer_files: Mapping[str, bytes], variants: Sequence[str] = ()
) -> None:
    """UserError, before anything is written, where the files of this format cannot be."""
    if format in FILES:
        FILES[format][0](model, tokenizer_files)
        check_libraries(variants)


def write_files(format: Format, folder: Path, variants: Sequence[str] = ()) -> list[Path]:
    """What this format adds to the native folder, and the variants of it; [] of one that adds none."""
    if format not in FILES:
        return []
    source = FILES[format][1](folder)
    files = [folder / VARIANTS[name].file for name in variants]
    for name, file in zip(variants, files, strict=True):
        WRITERS[name](source, file)
    return [source, *files]


# ------------------------------------------------------------------------------------------ asked


def ask(path: Path, name: str, embed: Embed) -> Answer:
    """What `name`, of CONSUMERS and not of LIBRARIES, makes of the folder; UserError for other vectors.

    embed: of our encoder in fp32, as in proof.py.
    """
    if name in JUDGES:
        state, words = JUDGES[name](read_object(path / "config.json"), open_folder(path).model)
        return Answer(name, state, f"not run; by its source: {words}")
    consumer = CONSUMERS[name]
    if not (path / consumer.file).is_file():
        format = next(format for format, entry in FORMATS.items() if entry.consumer == name)
        raise UserError(
            f"{path} has no {consumer.file}, which {name} reads: export it with --format {format}"
        )
    if importlib.util.find_spec(consumer.module) is None:
        install = f"not run, it is not installed (pip install {consumer.package})"
        return Answer(name, "written", f"{consumer.file} is there; {install}")
    return _run(path, name, embed)


@dataclass
class _Asked:
    """What one consumer is asked of a folder, and our vectors of it.

    kinds: {kind: (key of clients.py's arrays, first of ours_ND, its texts)}.
    """

    path: Path
    name: str
    request: dict[str, Any]
    token_texts: list[str]
    tokens: list[list[int]]
    kinds: dict[str, tuple[str, int, list[str]]]
    ours_ND: np.ndarray

    def answer(self, file: str) -> Tensors:
        found = _vectors(self.path, self.name, {**self.request, "file": file})
        _check_tokens(self.path, self.name, found, self.tokens, self.token_texts)
        return found

    def pairs(self, found: Tensors) -> Iterator[tuple[str, np.ndarray, np.ndarray, list[str]]]:
        """(kind, their rows, ours, the texts) of all kinds that this consumer answers."""
        for kind, (key, first, of) in self.kinds.items():
            if key in found:
                yield kind, found[key].astype(np.float32), self.ours_ND[first : first + len(of)], of


def _run(path: Path, name: str, embed: Embed) -> Answer:
    opened = open_folder(path)
    limit = check_sentence_transformers_files(path, opened.model.hidden_size, opened.model.pooling)
    tokenizer, texts = backend(path, limit)
    left_out = _not_composed(name, tokenizer, texts)
    texts = [text for text in texts if text not in left_out]
    repeats = limit // (len(tokenizer.encode(texts[-1]).ids) // 2) + 2
    long_text = texts[-1] * repeats
    prompted, prompts = texts[:NUM_PROMPTED], usage_of_folder(path).default
    queries, documents = ([prompt + text for text in prompted] for prompt in prompts)
    N, M = len(texts), len(prompted)
    asked = _Asked(
        *(path, name, {"texts": texts, "num_prompted": NUM_PROMPTED, "num_repeats": repeats}),
        token_texts=[*texts, long_text],
        tokens=[tokenizer.encode(text).ids for text in (*texts, long_text)],
        kinds={
            "alone": ("alone_ND", 0, texts),
            "together": ("together_ND", 0, texts),
            "padded on the left": ("left_padded_ND", 0, texts),
            "cut": ("cut_1D", N, [long_text]),
            "queries": ("queries_MD", N + 1, queries),
            "documents": ("documents_MD", N + 1 + M, documents),
        },
        ours_ND=np.asarray(embed([*texts, long_text, *queries, *documents], limit), np.float32),
    )
    found = asked.answer(CONSUMERS[name].file)
    differences, cosines, kinds = list[float](), list[float](), list[str]()
    for kind, theirs, ours, of in asked.pairs(found):
        pair = {f"{name}'s vectors ({kind})": theirs, "our encoder's": ours}
        differences += compare_vectors(path, pair, CONSUMERS[name].precision, of).values()
        cosines.append(float((theirs * ours).sum(1).min()))
        kinds.append(kind)
    return Answer(
        name,
        "proven",
        f"{found['version']}: {N} texts {', '.join(kinds[:-3])}, one that is cut, {M} with the prompts of "
        f"each side; largest difference of a coordinate {max(differences):.1e}, "
        f"lowest cosine {min(cosines):.7f}"
        + (f"; {len(left_out)} left out, as it does not compose characters (NFC)" if left_out else "")
        + "".join(f"; {line}" for line in _variants(asked, texts, limit)),
    )


def _variants(asked: _Asked, texts: list[str], limit: int) -> list[str]:
    """The lowest cosine of each variant in the folder; UserError below its least, or for a fault."""
    lines, variants = [], variants_in(asked.path, asked.name)
    faulty = faulty_vectors(asked.path, texts, limit) if variants else {}
    for name, variant in variants.items():
        found, lowest = asked.answer(variant.file), 1.0
        for kind, theirs, ours, of in asked.pairs(found):
            what = f"{asked.path / variant.file} ({kind})"
            faults = dict(faulty) if of is texts else {}
            if kind in ("queries", "documents"):
                faults = {"a missing prompt": asked.ours_ND[: len(of)]}
            check_faults(what, theirs, ours, faults)
            cosines = (theirs * ours).sum(1) / np.linalg.norm(theirs, axis=1)
            worst = int(cosines.argmin())
            if not cosines[worst] >= variant.cosine:
                raise UserError(
                    f"{what}: its vector of {of[worst][:40]!r} has a cosine of {cosines[worst]:.6f} with "
                    f"ours; {name} must have {variant.cosine}: leave that variant out"
                )
            lowest = min(lowest, float(cosines[worst]))
        lines.append(f"{variant.file}: lowest cosine {lowest:.7f}, measured on these texts")
    return lines


def _not_composed(name: str, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """Texts that the tokenizer composes first (Qwen's does), and llama.cpp, which has no normaliser, not."""
    normalizer = tokenizer.normalizer
    if name != "llama.cpp" or normalizer is None or normalizer.normalize_str("u\u0308") != "ü":
        return []
    return [text for text in texts if unicodedata.normalize("NFC", text) != text]


def _vectors(path: Path, name: str, request: Mapping[str, Any]) -> Tensors:
    """clients.py's arrays, of a fresh interpreter."""
    with tempfile.TemporaryDirectory() as scratch, writing(Path(scratch), 100 << 20, "the proof"):
        file, output = Path(scratch) / "request.json", Path(scratch) / "vectors.npz"
        file.write_text(json.dumps(request))
        script = str(Path(__file__).with_name("clients.py"))
        child = subprocess.run(
            [sys.executable, script, name, str(path.resolve()), str(file), str(output)],
            cwd=scratch,
            # The second keeps this folder (onnx.py, files.py) off the module path of the child.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
            errors="replace",
        )
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{path} does not load in {name} (exit code {child.returncode}): {reason}")
        with np.load(output, allow_pickle=False) as arrays:
            return dict(arrays)


def _check_tokens(path: Path, name: str, found: Tensors, ours: list[list[int]], texts: list[str]) -> None:
    theirs = np.split(found["token_ids"], found["token_counts"].cumsum()[:-1])
    for text, row, ids in zip(texts, theirs, ours, strict=True):
        if row.tolist() != ids:
            raise UserError(
                f"{path}: {name} gives {len(row)} tokens {row[:6].tolist()}... for {text[:40]!r} and "
                f"tokenizer.json {len(ids)} tokens {ids[:6]}..."
            )


# ------------------------------------------------------------------------------------------ judged


def _vllm(config: Mapping[str, Any], model: ModelConfig) -> tuple[State, str]:
    """By vllm/model_executor/models (registry.py, llama.py, qwen2.py, qwen3.py)."""
    if model.pooling == "weightedmean":
        return "refused", "it has no pooling=weightedmean"
    (name,) = config["architectures"]
    if name not in ("LlamaModel", "LlamaBidirectionalModel", "MistralModel", "Qwen2Model"):
        return "unknown", f"{name} is not named among its embedding models"
    return "accepted", f"{name} is an embedding model, is_causal and the pooling of modules.json are read"


def _tei(config: Mapping[str, Any], model: ModelConfig) -> tuple[State, str]:
    """By its backends/candle/src/models (flash_mistral.rs, flash_qwen2.rs, flash_qwen3.rs) and router."""
    if model.pooling == "weightedmean":
        return "refused", "it has no pooling=weightedmean"
    if model.model_type == "ministral3":
        return "refused", "it has no Ministral 3"
    if model.model_type == "qwen2":
        return "refused", "its Qwen2 wants tensors named model.*, and exports have the names of Qwen2Model"
    if model.model_type == "llama" and model.rope_scaling is not None:
        return "refused", "its Llama takes no rope_scaling; without that key it would give other vectors"
    if model.rope_scaling is not None:
        return "wrong", "it leaves rope_scaling out and gives other vectors without a word"
    if model.model_type in ("mistral", "qwen3") and not model.is_causal:
        return "wrong", "its attention is causal whatever config.json says: other vectors without a word"
    return (
        "accepted",
        "on CUDA in fp16 alone; use_bidirectional_attention and the flags of 1_Pooling are read",
    )


JUDGES: Mapping[str, Callable[[Mapping[str, Any], ModelConfig], tuple[State, str]]] = {
    "vllm": _vllm,
    "tei": _tei,
}
