"""When are two texts the same text? One rule for the store, mining, reports and overlap.

    normal_form(text)  NFKC, case folded, format characters (zero-width, soft hyphen, byte order mark)
                       removed, curly quotes and dashes as in ASCII, runs of white space as one space,
                       and no space, closing punctuation, quote or bracket at either end

Inner punctuation stays ("1.5" is not "15"), and so do symbols ("C++" is not "C"). A text that is nothing but
punctuation keeps it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

_SPELLINGS = {"\ufffd": ""} | dict.fromkeys("‘’‚‛′ʼ`´", "'") | dict.fromkeys("“”„‟″«»", '"')
_SPELLINGS |= dict.fromkeys("‐‑‒–—―−", "-") | {"…": "..."}
# str.translate would look up every character in a dict, and few of them change.
_SPELLED = re.compile(f"[{re.escape(''.join(_SPELLINGS))}]")
_ENDS = " .,;:!?'\"()[]{}<>" + "。、，．：；！？؟،؛।॥·¿¡「」『』【】〈〉《》"
_FORMAT = re.compile(
    "[\u00ad\u034f\u061c\u070f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


def normal_form(text: str) -> str:
    """Equal for two texts that a reader would call the same; "" without content (has_content)."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _FORMAT.sub("", text))
        text = _SPELLED.sub(lambda found: _SPELLINGS[found[0]], text)
        text = unicodedata.normalize("NFKC", text.casefold())  # folding may leave what NFKC composes again
    whole = " ".join(text.casefold().replace("`", "'").split())
    return whole.strip(_ENDS) or whole


def normal_key(text: str) -> bytes:
    """16 bytes, equal where normal_form is equal."""
    return form_key(normal_form(text))


def form_key(form: str) -> bytes:
    """normal_key of a text with this normal form."""
    return bytes_key(form.encode("utf-8", "surrogatepass"))


def exact_key(text: str) -> bytes:
    """16 bytes of the text as it is."""
    return bytes_key(text.encode())


def bytes_key(data: bytes) -> bytes:
    """BLAKE2b-128."""
    return hashlib.blake2b(data, digest_size=16).digest()


def has_content(text: str) -> bool:
    """Whether more than white space, control and format characters and U+FFFD ("unreadable") is in it."""
    if text.isascii():
        return any(character > " " and character != "\x7f" for character in text)
    return any(
        not (character.isspace() or character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cf"))
        for character in _FORMAT.sub("", text)
    )
