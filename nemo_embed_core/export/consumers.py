"""What transformers and sentence-transformers make of a folder, asked in a fresh process (reload.py) and
judged here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer

from nemo_embed_core.checkpoint.source import Usage
from nemo_embed_core.config import ModelConfig, Pooling
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import writing
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.model.spec import POOLINGS

# One word, scripts of one to four bytes a character, a prompt, look-alikes of special tokens, white space at
# the ends and doubled, next to nothing, both Unicode normal forms, and at the end a text that needs cutting.
TEXTS = (
    "hello",
    "How do neural networks learn patterns from examples?",
    "Instruct: Given a question, retrieve passages that answer the question\nQuery: who wrote the Iliad?",
    "  two spaces before, two behind  ",
    "Deep learning models adjust their weights through backpropagation, "
    "using gradient descent to minimize error.",
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


# ------------------------------------------------------------------------------------------ another process


def run_reload(
    python: str, path: Path, output: Path, request: dict[str, Any]
) -> subprocess.CompletedProcess[str]:
    """reload.py on the folder with this interpreter; its arrays into `output`, their files beside it."""
    file = output.with_name("request.json")
    file.write_text(json.dumps(request))
    return subprocess.run(
        [python, str(Path(__file__).with_name("reload.py")), str(path.resolve()), str(file), str(output)],
        cwd=output.parent,
        env={
            **os.environ,
            **{"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            "PYTHONSAFEPATH": "1",  # keeps this folder (files.py, folder.py) off the module path of the child
            # Where remote code is copied to and imported from.
            "HF_MODULES_CACHE": str(output.parent / "modules"),
        },
        capture_output=True,
        text=True,
        errors="replace",
    )


def reload_request(
    texts: Sequence[str],
    max_seq_length: int,
    trusted: bool,
    sets_length: bool = False,
    with_theirs: bool = True,
    *,
    pooling: str = ModelConfig.pooling,
    causal: bool = False,
) -> dict[str, Any]:
    """reload.py's REQUEST.json."""
    return {
        **{"texts": list(texts), "num_prompted": NUM_PROMPTED, "probe": PROBE},
        **{"max_seq_length": max_seq_length, "sets_length": sets_length},
        **{"trust_remote_code": trusted, "sentence_transformers": with_theirs},
        # Of anybody's folder that pools as we do not: not compared.
        "pooling": POOLINGS[cast(Pooling, pooling if pooling in POOLINGS else ModelConfig.pooling)].mode,
        "causal": causal,
    }


def reload_folder(
    path: Path, *request: Any, pooling: str = ModelConfig.pooling, partly: bool = False
) -> dict[str, np.ndarray]:
    """reload.py's arrays, of a fresh interpreter: nothing that this one imported or patched takes part.

    partly: where only sentence-transformers does not load it, what transformers gave, and the reason as
    "error".
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        install = "pip install 'nemo_embed_core[eval]'"
        raise UserError(f"verifying an export needs sentence-transformers: {install}")
    config = read_object(path / "config.json")
    how: Any = {"pooling": pooling, "causal": config.get("is_causal") is True}
    with tempfile.TemporaryDirectory() as scratch, writing(Path(scratch), 100 << 20, "the proof"):
        output = Path(scratch) / "vectors.npz"
        child = run_reload(sys.executable, path, output, reload_request(*request, **how))
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or ["no output"])[-1]
            if partly and output.is_file():
                with np.load(output, allow_pickle=False) as arrays:
                    return {**arrays, "error": np.array(reason)}
            raise UserError(
                f"{path} does not load in transformers and sentence-transformers (exit code "
                f"{child.returncode}): {reason}"
            )
        with np.load(output, allow_pickle=False) as arrays:
            return dict(arrays)


# ------------------------------------------------------------------------------------------ attention


def first_state_changes(vectors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """{way of attention and padding: change of the first hidden state when the last token is replaced}."""
    return dict(zip(vectors["case_names"].tolist(), vectors["first_state_changes"].tolist(), strict=True))


def check_attention(
    path: Path, config: Mapping[str, Any], vectors: Mapping[str, np.ndarray], has_code: bool
) -> None:
    """UserError unless all first_state_changes() are above 0, or, where config.json says is_causal: true,
    exactly 0, as they are under a causal mask."""
    changes, version = first_state_changes(vectors), str(vectors["transformers_version"])
    if any(math.isnan(change) for change in changes.values()):
        nan = "hidden states are NaN, which says nothing of a mask"
        raise UserError(f"{path}: {nan}; the weights or rms_norm_eps are wrong")
    causal = [case for case, change in changes.items() if not change > 0]
    if config.get("is_causal") is True:
        if free := [case for case in changes if case not in causal]:
            raise UserError(
                f"{path} runs without a causal mask in {len(free)} of {len(changes)} cases "
                f"({'; '.join(free)}): replacing the last token changes the first token's hidden state, and "
                f"config.json says is_causal: true (transformers {version})"
            )
        return
    if not causal:
        return
    found = json.dumps(config.get("is_causal", "nothing"))
    if has_code:
        remedy = f"The code that the folder brings does not remove the mask in transformers {version}"
    else:
        remedy = (
            f"config.json must have is_causal: false (found: {found}) and transformers must be >= 5.2 "
            f"(found: {version}), older ones ignore it"
        )
    raise UserError(
        f"{path} runs with a causal mask in {len(causal)} of {len(changes)} cases ({'; '.join(causal)}): "
        f"replacing the last token leaves the first token's hidden state unchanged. {remedy}"
    )


# ------------------------------------------------------------------------------------- tokens and prompts


def backend(path: Path, max_seq_length: int, content: bytes | None = None) -> tuple[Tokenizer, list[str]]:
    """(tokenizer.json as transformers is told to use it, the TEXTS of which it makes at least one token)."""
    tokenizer = Tokenizer.from_buffer(content or (path / "tokenizer.json").read_bytes())
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_seq_length)
    file = path / "tokenizer_config.json"
    tokenizer.encode_special_tokens = bool(file.is_file() and read_object(file).get("split_special_tokens"))
    return tokenizer, [text for text in TEXTS if tokenizer.encode(text).ids]


def _rows(vectors: dict[str, np.ndarray], prefix: str = "") -> list[list[int]]:
    ends = vectors[f"{prefix}token_counts"].cumsum()
    return [row.tolist() for row in np.split(vectors[f"{prefix}token_ids"], ends[:-1])]


def check_tokens(path: Path, vectors: dict[str, np.ndarray], tokenizer: Tokenizer, texts: list[str]) -> None:
    """Everybody must read tokenizer.json as written, and cut where `tokenizer` does: some classes of
    transformers rebuild the pipeline by their own rules. The last row is of the long text, repeated until it
    must be cut.
    """
    long_text = texts[-1] * int(vectors["num_repeats"])
    for who, prefix in (("AutoTokenizer", ""), ("sentence-transformers", "st_")):
        if f"{prefix}token_ids" not in vectors:
            continue
        for text, theirs in zip([*texts, long_text], _rows(vectors, prefix), strict=True):
            ours = tokenizer.encode(text).ids
            if len(ours) != len(theirs) and text is long_text:
                raise UserError(
                    f"{path}: {who} cuts a long text at {len(theirs)} tokens, not at {len(ours)}; check "
                    f"max_seq_length in sentence_bert_config.json"
                )
            if ours != theirs:
                raise UserError(
                    f"{path}: {who} gives {len(theirs)} tokens {theirs[:6]}... for {text[:40]!r} and "
                    f"tokenizer.json {len(ours)} tokens {ours[:6]}...; check tokenizer_class, bos_token, "
                    f"add_bos_token, add_prefix_space and truncation_side in tokenizer_config.json"
                )


def texts_of_other_rules(tokenizer: Tokenizer, texts: list[str], vectors: dict[str, np.ndarray]) -> list[int]:
    """Texts of which the folder's tokenizer makes special tokens, and ours, as in training, never does."""
    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    others = [i for i, row in enumerate(_rows(vectors)[:-1]) if row != tokenizer.encode(texts[i]).ids]
    tokenizer.encode_special_tokens = before
    return others


def check_prompts(path: Path, vectors: dict[str, np.ndarray], usage: Usage) -> None:
    """sentence-transformers has the prompts and the similarity that the folder says it was trained with."""
    theirs = json.loads(str(vectors["prompts"]))
    for name, prompt in usage.named_prompts().items():
        if theirs.get(name, "") != prompt:
            raise UserError(
                f"{path}: sentence-transformers has the prompt {name!r} {json.dumps(theirs.get(name))} and "
                f"the model is used with {json.dumps(prompt)}; check prompts in "
                "config_sentence_transformers.json"
            )
    if (similarity := str(vectors["similarity"])) != usage.similarity:
        compares = f"sentence-transformers compares by {similarity}"
        raise UserError(f"{path}: {compares} and the model is used with {usage.similarity}")
