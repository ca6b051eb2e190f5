"""What reports of data and of mining say of numbers and of texts: quantiles, the script of a text."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def quantiles(values: np.ndarray, at: Sequence[float] = QUANTILES) -> dict[str, float] | None:
    """{"0.5": the median}, interpolated between neighbours as numpy does; None of no values."""
    if not len(values):
        return None
    return {f"{q:g}": round(float(v), 6) for q, v in zip(at, np.quantile(values, at), strict=True)}


def script(text: str) -> str:
    """The script that most letters of a text are written in: "Latin", "Han", "Cyrillic"; not its language."""
    found = scripts(text)
    return min(found, key=lambda name: (-found[name], name)) if found else "no letters"


def scripts(text: str) -> Counter[str]:
    """Letters of a text by their script."""
    found: Counter[str] = Counter()
    for character, count in Counter(text).items():
        name = _script_of(character)
        if name:
            found[name] += count
    return found


@cache
def _script_of(character: str) -> str:
    """By the first word of the letter's Unicode name, "" for what is no letter."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    words = unicodedata.name(character, "UNKNOWN").split()
    word = words[1] if words[0] in ("FULLWIDTH", "HALFWIDTH", "MODIFIER") and len(words) > 1 else words[0]
    return {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}.get(word.split("-")[0], word.capitalize())
