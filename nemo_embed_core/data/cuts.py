"""Where a text may be cut before it is tokenised: `boundary(tokenizer)` -> pattern or None.

    end = pattern.search(text, n).start();  ids(text[:end]) begins ids(text), special tokens at its end apart

A match is a place between two characters where (1) every step of the normaliser looks at either side alone,
(2) no match of the pre-tokeniser spans it or looks over it, or, without one, no piece of the vocabulary has a
word marker after another character, so that no merge crosses it. Every step has to be on the lists below,
which were read for exactly this.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

# Letters in every version of Unicode, of scripts whose normal forms never reach over a space or the marks
# below.
_RANGES = [
    (0x41, 0x5A), (0x61, 0x7A), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0xFF),  # Latin
    (0x391, 0x3A1), (0x3A3, 0x3A9), (0x3B1, 0x3C9), (0x410, 0x44F),  # Greek, Cyrillic
    # Hebrew, Arabic, Devanagari, Thai.
    (0x5D0, 0x5EA), (0x621, 0x63A), (0x641, 0x64A), (0x905, 0x939), (0xE01, 0xE30),
    (0x3041, 0x3094), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3),  # kana, Han, Hangul
]  # fmt: skip
_LETTERS = "".join(f"{chr(first)}-{chr(last)}" for first, last in _RANGES)
# No alternative of _PATTERNS has a visible character before a space, or a letter or digit before a line end
# or one of these marks (apostrophes are another matter: "'s"), and none looks beyond the run of its own kind
# that it matches.
_WORDS = (
    rf"(?<=[!-~{_LETTERS}])(?= )|(?<=[0-9{_LETTERS}])(?=[\n\u3001\u3002\uff0c\uff01\uff1f\uff1b\u300c\u300d])"
)
# A space alone between two such characters: no step of a normaliser removes or moves it.
_SPACES = rf"(?<=[!-~{_LETTERS}]) (?=[0-9{_LETTERS}])"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {_GPT2, _CL100K % "{1,3}", _CL100K % ""}  # GPT-2; Llama 3; Qwen 2

MARKER = "\u2581"  # the word marker of sentencepiece, made of a space
# One character or one composition at a time.
_LOCAL_NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled", "Prepend")
}
_REPLACEMENTS = [({"String": " "}, MARKER), ({"Regex": "^ +| +$"}, ""), ({"Regex": " {2,}"}, " ")]


def boundary(backend: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """backend as it encodes: special tokens in a text are text."""
    spec: dict[str, Any] = json.loads(backend.to_str())
    added = spec.get("added_tokens") or []
    if any(not token["special"] for token in added) and any(  # looked for in the text itself, before all else
        token["rstrip"] or re.search(rf"[\s{MARKER}]", token["content"]) for token in added
    ):
        return None
    normalizers = _steps(spec["normalizer"], "normalizers")
    splits = _steps(spec["pre_tokenizer"], "pretokenizers")
    model = spec["model"]
    if model.get("dropout") or not all(map(_is_local, normalizers)) or not all(map(_is_known, splits)):
        return None
    if not _keeps_letters_apart(backend):
        return None
    if any(step["type"] == "Split" or step.get("use_regex") for step in splits):
        keeps_marks = all(step["type"] in ("NFC", "NFKC", "Lowercase") for step in normalizers)
        return re.compile(_WORDS if keeps_marks else _SPACES)
    if any(step["type"] == "WhitespaceSplit" or step.get("split") for step in splits):
        return re.compile(_SPACES)
    # Words that are not split, sentencepiece's way: the vocabulary decides.
    has_marker = any(MARKER in (s.get("content"), s.get("replacement")) for s in (*normalizers, *splits))
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    crosses = re.compile(rf"[^{MARKER}]{MARKER}")
    if model["type"] == "BPE" and has_marker and not affixes and MARKER in model["vocab"]:
        return None if any(map(crosses.search, model["vocab"])) else re.compile(_SPACES)
    return None


def _steps(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a (nested) sequence, flat."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[name] for inner in _steps(part, name)]


def _is_local(step: dict[str, Any]) -> bool:
    known = step["type"] in _LOCAL_NORMALIZERS
    return known or (step["type"] == "Replace" and (step["pattern"], step["content"]) in _REPLACEMENTS)


def _is_known(step: dict[str, Any]) -> bool:
    """Whether a pre-tokeniser splits by neighbouring characters alone."""
    if step["type"] == "Split":
        is_plain = step["behavior"] == "Isolated" and not step["invert"]
        return is_plain and step["pattern"].get("Regex") in _PATTERNS
    if step["type"] == "Metaspace":
        return step["replacement"] == MARKER
    return step["type"] in ("ByteLevel", "WhitespaceSplit")


def _keeps_letters_apart(backend: tokenizers.Tokenizer) -> bool:
    """Whether the normaliser leaves one piece of each character of the patterns."""
    if backend.normalizer is None:
        return True
    characters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    characters += [chr(c) for first, last in _RANGES[2:] for c in range(first, last + 1)]
    text = backend.normalizer.normalize_str(" ".join(characters)).removeprefix(MARKER)
    pieces = re.split(f"[ {MARKER}]", text)
    return len(pieces) == len(characters) and all(pieces)
