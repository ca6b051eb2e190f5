"""Bitext: two columns of texts that are translations, or {"translation": {"en": "...", "de": "..."}}.

The first is the query, the second its positive. For both directions give the data twice, the second time with
the dataset's columns turned round.
"""

from __future__ import annotations

import re
from typing import Any

from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.lines import check_text, short

NAME = "bitext"
EXAMPLE = '{"en": "...", "de": "..."}'
OPTIONAL: tuple[str, ...] = ()
COLUMNS = True
PAIRS = {("sentence1", "sentence2"), ("english", "non_english")}
# ISO 639-1, and codes with a script as in FLORES (deu_Latn) or a region (pt-BR).
_CODES = (
    " aa ab af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de"
    " dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia"
    " id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo"
    " lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl"
    " ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk"
    " tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu "
)


def _is_code(name: str) -> bool:
    language, mark, rest = name.replace("_", "-").partition("-")
    is_language = f" {language} " in _CODES or (len(language) == 3 and language.islower() and bool(mark))
    return is_language and (not mark or bool(re.fullmatch(r"[A-Z]{2}|[A-Z][a-z]{3}", rest)))


def sniff(fields: dict[str, Any]) -> bool:
    names = tuple(fields)
    if names == ("translation",):
        return True
    is_pair = len(names) == 2 and all(isinstance(value, str) for value in fields.values())
    return is_pair and (names in PAIRS or all(map(_is_code, names)))


def columns(fields: dict[str, Any]) -> dict[str, Any]:
    """The languages of a translation: keys of an object have no order, and rows are to have that of one."""
    inner = fields.get("translation")
    return inner if len(fields) == 1 and isinstance(inner, dict) else fields


def row(fields: dict[str, Any], path: str, line: int) -> Row:
    if len(fields) != 2:
        raise ValueError(
            f"columns {short(list(fields))}: bitext has two, a text and its translation; ignore others"
        )
    (first, query), (second, pos) = fields.items()
    query, pos = check_text(query, first), check_text(pos, second)
    return Row(query, [pos], [], path, line, lang=first if _is_code(first) else "")
