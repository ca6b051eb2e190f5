"""Languages that texts are asked for in, and whether a text is in one of them.

is_in("Wie alt wird ein Dachs?", "German") -> True

By the script of its letters; of languages that share a script by their commonest words: a text is refused
only where words of another language are more frequent, so that a short text without any passes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from nemo_embed_core.data.statistics import script, scripts


class Language(NamedTuple):
    code: str
    scripts: Sequence[str]
    common: frozenset[str]  # its commonest words that no other language of its script here has
    per_word: float = 1.0  # characters that say as much as a word, in scripts without spaces


_COMMON = {
    "English": "the and of to is that it for with was are this be at by have not you from they which",
    "German": "der die das und ist nicht ein eine zu den mit sich auf für von dem auch wird wie oder ich",
    "French": "le la les et est des une dans que pour qui pas sur au avec ce il elle sont du nous vous",
    "Spanish": "el los las y es una en que por con para su del se como más pero lo al qué cómo",
    "Portuguese": "o os as e é um uma em não que com para do da no na dos ao mais como você",
    "Italian": "il lo gli e è un una di che non per con del della sono si come più nel alla anche",
    "Dutch": "de het een en van is dat niet op te met voor zijn er aan ook als bij door maar wordt",
    "Polish": "i w nie na się z do to jest że jak po od za przez są jego lub oraz dla czy",
    "Russian": "и в не на что он с как это по но из у за от для или при его был",
    "Ukrainian": "і в не на що він з як це але та до від для або при його був є чи",
}


def _own(name: str) -> frozenset[str]:
    others = " ".join(words for other, words in _COMMON.items() if other != name).split()
    return frozenset(_COMMON[name].split()) - set(others)


LANGUAGES = {
    **{
        name: Language(code, ("Cyrillic",) if name in ("Russian", "Ukrainian") else ("Latin",), _own(name))
        for name, code in zip(
            _COMMON, ["en", "de", "fr", "es", "pt", "it", "nl", "pl", "ru", "uk"], strict=True
        )
    },
    "Chinese": Language("zh", ("Han",), frozenset(), 1.7),
    "Japanese": Language("ja", ("Kana", "Han"), frozenset(), 2.0),
    "Korean": Language("ko", ("Hangul",), frozenset()),
    "Arabic": Language("ar", ("Arabic",), frozenset()),
    "Hindi": Language("hi", ("Devanagari",), frozenset()),
}


def is_in(text: str, name: str) -> bool:
    language = LANGUAGES[name]
    if (found := script(text)) not in language.scripts:
        return False
    has_kana = "Kana" in scripts(text)
    if name == "Japanese" and not has_kana:
        return len(text) < 12  # a name, or Chinese
    if name == "Chinese" and has_kana:
        return False
    words = re.findall(r"[^\W\d_]+", text.lower())
    hits = {
        other: sum(word in known.common for word in words)
        for other, known in LANGUAGES.items()
        if found in known.scripts
    }
    return hits[name] >= max(hits.values())


def num_words(text: str, name: str) -> float:
    """Words, or what says as much as so many words in a script without spaces."""
    per_word = LANGUAGES[name].per_word
    return len(text.split()) if per_word == 1.0 else len("".join(text.split())) / per_word
