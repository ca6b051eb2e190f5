"""Which texts are one text: spellings that readers do not see are, other words, numbers and symbols are
not."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_embed_core.data.normal_form import has_content, normal_form, normal_key

TEXT = "Café Zürich opens at nine o'clock"
SAME = {
    "decomposed": unicodedata.normalize("NFD", TEXT),
    "full-width": "Ｃａｆé Zürich opens at nine o'clock",
    "curly apostrophe": "Café Zürich opens at nine o’clock",
    "final stop": TEXT + ".",
    "quoted": f"“{TEXT}!”",
    "zero-width space": "Café\u200b Zürich opens at nine o'clock",
    "byte order mark": "\ufeff" + TEXT,
    "soft hyphen": "Café Zür\u00adich opens at nine o'clock",
    "no-break spaces": TEXT.replace(" ", "\u00a0"),
    "doubled and outer spaces": f"  {TEXT.replace(' ', '  ')}\n",
    "capitals": TEXT.upper(),
    "ideographic full stop": TEXT + "。",
}


@pytest.mark.parametrize("name", SAME)
def test_spellings_of_one_text(name: str) -> None:
    assert SAME[name] != TEXT
    assert normal_form(SAME[name]) == normal_form(TEXT)
    assert normal_key(SAME[name]) == normal_key(TEXT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("C", "C++"),
        ("1.5", "15"),
        ("-5", "5"),
        ("a b", "ab"),
        (".", "!"),
        ("what is x", "what is y"),
        ("50%", "50"),
        ("°", ""),
    ],
)
def test_other_texts_stay_apart(one: str, other: str) -> None:
    assert normal_form(one) != normal_form(other)
    assert normal_key(one) != normal_key(other)


@given(st.text(max_size=40))
def test_the_normal_form_is_its_own_normal_form(text: str) -> None:
    assert normal_form(normal_form(text)) == normal_form(text)


@pytest.mark.parametrize(
    "text", ["", " \t\n", "\u200b", "\ufeff\u00ad", "\ufffd\ufffd", "\x00\x07", "\u00a0\u3000", "\u3164"]
)
def test_without_content(text: str) -> None:
    assert not has_content(text)


@pytest.mark.parametrize("text", [".", "0", "null", "é", "\u0301", "京", "👍", "a\ufffd"])
def test_with_content(text: str) -> None:
    assert has_content(text)
