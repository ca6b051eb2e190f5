"""The formats of an export, and who reads them. No torch import: the launcher lists them.

A new one of the same tensors is an entry here, its model_type in model/spec.py and the code that it brings;
one that adds a file to a native folder is an entry here and in serving.py's FILES.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from nemo_embed_core.config import ModelConfig
from nemo_embed_core.errors import UserError

Format = Literal["native", "compat", "onnx", "gguf"]
PLACE = "path/to/this/folder"  # in a card's examples, until it has a name on the hub


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """How a folder of this format differs from the others."""

    model_type: str = ""  # of its code; "": the model's own (model/spec.py)
    readers: str  # the least that reads it, for --help
    transformers_4: bool = False  # whether its tokenizer must load there too
    # Copied beside the weights as it is, never imported by this package; users trust it by trust_remote_code.
    code: Path | None = None
    auto_map: Mapping[str, str] = field(default_factory=dict)  # transformers' class -> MODULE.CLASS of `code`
    requirements: tuple[str, ...]  # lines of the model card
    consumer: str = ""  # of CONSUMERS: who reads the file that it adds to a native folder


_NATIVE = (
    "It needs transformers >= 5.2: older versions ignore `is_causal: false` in config.json, "
    "run the model with a causal",
    "mask and return other vectors without an error.",
)
FORMATS: Mapping[Format, ExportFormat] = {
    "native": ExportFormat(readers="transformers >= 5.2", requirements=_NATIVE),
    "compat": ExportFormat(
        model_type="llama_bidirec",
        readers=">= 4.51",
        transformers_4=True,
        code=Path(__file__).with_name("remote") / "modeling_llama_bidirec.py",
        auto_map={
            "AutoConfig": "modeling_llama_bidirec.LlamaBidirectionalConfig",
            "AutoModel": "modeling_llama_bidirec.LlamaBidirectionalModel",
        },
        requirements=(
            "It needs transformers >= 4.51 and `trust_remote_code=True`, which runs the fifty lines of",
            "`modeling_llama_bidirec.py` in this folder: transformers before 5.2 has no Llama without a "
            "causal mask.",
        ),
    ),
    "onnx": ExportFormat(
        readers="native, and onnx/model.onnx for onnxruntime", requirements=_NATIVE, consumer="onnxruntime"
    ),
    "gguf": ExportFormat(
        readers="native, and model.gguf for llama.cpp", requirements=_NATIVE, consumer="llama.cpp"
    ),
}


@dataclass(frozen=True)
class Variant:
    """A smaller file beside a format's own.  cosine: the least with our vectors; 0: measured, and said."""

    file: str
    format: Format
    cosine: float = 0.0


VARIANTS: Mapping[str, Variant] = {
    "fp16": Variant("onnx/model_fp16.onnx", "onnx", 0.9999),
    "int8": Variant("onnx/model_int8.onnx", "onnx"),
    "q8_0": Variant("model-q8_0.gguf", "gguf"),
}


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A program that serves an exported folder.

    module: is imported where it is installed, "": by no Python.  package: how pip calls it.
    file: what it reads of the folder, "": the folder itself.
    precision: what it computes in, a key of proof.TOLERANCE.
    command: of the model card, with the {limit} of tokens, {all}: four times that.
    differs: from training, said in the card.
    """

    module: str = ""
    package: str = ""
    file: str = ""
    precision: str = "float32"
    command: str = ""
    differs: str = ""


# proven: it gave our vectors.  written: its file is there and it is not installed.
# By its source alone: accepted, refused, unknown; wrong: it would give other vectors without a word.
State = Literal["proven", "written", "accepted", "refused", "wrong", "unknown"]


class Answer(NamedTuple):
    """words: of versions and figures, or why not."""

    consumer: str
    state: State
    words: str


LIBRARIES = ("transformers", "sentence-transformers")  # which proof.py asks, always together
CONSUMERS: Mapping[str, Consumer] = {
    "transformers": Consumer(
        module="transformers", differs="the caller pools and normalises, as under Usage"
    ),
    "sentence-transformers": Consumer(
        module="sentence_transformers", differs="before version 6 it strips white space at the ends of texts"
    ),
    "onnxruntime": Consumer(
        module="onnxruntime",
        package="onnxruntime",
        file="onnx/model.onnx",
        command='InferenceSession("onnx/model.onnx").run(["sentence_embedding"], '
        '{"input_ids": ids, "attention_mask": mask})',
        differs="the caller puts the prompt before the text and tokenises by tokenizer.json "
        "(encode_special_tokens, at most {limit} tokens); pooling and normalisation are inside",
    ),
    "llama.cpp": Consumer(
        module="xllamacpp",
        package="xllamacpp",
        file="model.gguf",
        precision="float16",  # of keys and values in its cache
        command="llama-server -m model.gguf --embedding --kv-unified -np 4 -c {all} -b {all} -ub {all}",
        differs="the caller puts the prompt before the text and cuts it at {limit} tokens, an end token "
        "included; text that looks like a special token is one; without --kv-unified, or with less in -b and "
        "-ub than -np times the longest text, texts served together get other vectors without a word",
    ),
    "vllm": Consumer(
        command=f"vllm serve {PLACE} --runner pooling", differs="the caller puts the prompt before the text"
    ),
    "tei": Consumer(
        command=f"text-embeddings-router --model-id {PLACE} --dtype float16 --default-prompt-name query",
        differs="one prompt for all requests of a server; text that looks like a special token is one",
    ),
}


def variants_in(path: Path, consumer: str) -> dict[str, Variant]:
    """Of the folder, those that this consumer reads."""
    its = {name: one for name, one in VARIANTS.items() if FORMATS[one.format].consumer == consumer}
    return {name: one for name, one in its.items() if (path / one.file).is_file()}


def check_variants(format: str, variants: Sequence[str]) -> None:
    """UserError for those of another format."""
    for name in variants:
        if name not in VARIANTS or VARIANTS[name].format != format:
            known = ", ".join(f"{n} (--format {one.format})" for n, one in VARIANTS.items())
            raise UserError(f"--format {format} has no variant {name}; there are {known}")


def check_format(format: Format, model: ModelConfig) -> None:
    """UserError for a model that the format's code does not compute."""
    if FORMATS[format].code is not None and (model.model_type != "llama" or model.is_causal):
        causal = "causal " if model.is_causal else ""
        raise UserError(
            f"format={format} brings the code of a bidirectional Llama, and this is a "
            f"{causal}{model.model_type}: use format=native"
        )
