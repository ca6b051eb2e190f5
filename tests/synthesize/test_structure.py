"""Documents of each kind, written out with the sections that a reader sees in them."""

import pytest

from nemo_embed_core.synthesize.chunks import chunks, sentences
from nemo_embed_core.synthesize.structure import Section, parse

MARKDOWN = """---
title: "The guide"
description: What the guide is about.
---
Some **bold** text with a [link](https://x.org/a) and `code`.
It goes on here.

# The guide
## Install ##
- first item
- second *item*

```python
# no heading
x = 1

y = 2
```
Linux
-----
<!-- hidden -->
Use the <b>package</b> of a snake_case_name.
"""
HTML = """<html><head><title>Guide &amp; more</title><meta name="description" content="About it."></head>
<body><nav><p>menu</p></nav><h2>Install</h2><p>First<br>line.<p>Second &lt;line&gt;.
<pre>a
  b</pre><table><tr><td>one</td><td>two</td></tr></table><script>var no = 1;</script>
<h3>Linux<a>¶</a></h3><ul><li>It<b>em</b></li><li>Other</li></ul><h2>Next <a>#</a></h2>tail</body></html>"""
RST = """=====
Guide
=====

Intro with :ref:`a link <target>`, ``code`` and `site <https://x.org>`_.

.. toctree::
   :maxdepth: 2

   hidden

Install
-------
.. note:: Mind this.

.. code-block:: bash

   pip install

Linux
~~~~~
Text of Linux::

   more

Next
----
Last *one*.
"""
TEXT = """A short title

First para-
graph of
three lines.

2.1 Install it

Body one.\fBODY IN CAPITALS

Body two.

Usage
=====
Body three.
"""
PYTHON = '''"""Module summary.

More of the module.
"""
class A:
    """Class summary
    on two lines.

    Rest of it.

        indented code
    """
    if True:
        def f(self):
            """Only a summary."""

def g():
    """Parameters
    ----------

    x
    """
    def inner():
        """Hidden summary.

        Hidden rest."""
'''


@pytest.mark.parametrize(
    "kind, text, title, sections",
    [
        ("markdown", MARKDOWN, "The guide", [
            ((), ["Some bold text with a link and code. It goes on here."], "What the guide is about."),
            (("Install",), ["- first item\n- second item", "# no heading\nx = 1\n\ny = 2"], ""),
            (("Linux",), ["Use the package of a snake_case_name."], ""),
        ]),
        ("html", HTML, "Guide & more", [
            (("Install",), ["First line.", "Second <line>.", "a\n  b", "one two"], "About it."),
            (("Install", "Linux"), ["Item", "Other"], ""),
            (("Next",), ["tail"], ""),
        ]),
        ("rst", RST, "Guide", [
            ((), ["Intro with a link, code and site."], ""),
            (("Install",), ["Mind this.", "pip install"], ""),
            (("Install", "Linux"), ["Text of Linux:", "more"], ""),
            (("Next",), ["Last one."], ""),
        ]),
        ("text", TEXT, "A short title", [
            ((), ["First paragraph of three lines."], ""),
            (("2.1 Install it",), ["Body one."], ""),
            (("BODY IN CAPITALS",), ["Body two."], ""),
            (("Usage",), ["Body three."], ""),
        ]),
        ("python", PYTHON, "", [
            ((), ["More of the module."], "Module summary."),
            (("A",), ["Rest of it.", "    indented code"], "Class summary on two lines."),
            (("g",), ["x"], ""),
        ]),
    ],
)  # fmt: skip
def test_a_document_has_the_sections_that_a_reader_sees(
    kind: str, text: str, title: str, sections: list[tuple[tuple[str, ...], list[str], str]]
) -> None:
    parsed = parse(kind, text)
    assert parsed.title == title
    found = [(section.headings, section.blocks, section.summary) for section in parsed.sections]
    assert found == sections
    assert parse(kind, text.replace("\n", "\r\n")) == parsed


def test_an_abstract_is_the_summary_of_what_follows() -> None:
    parsed = parse("markdown", "# T\n\n## Abstract\n\nAll of it\nin short.\n\n## Method\n\nThe method.\n")
    assert [(s.headings, s.blocks, s.summary) for s in parsed.sections] == [
        (("Method",), ["The method."], "All of it in short.")
    ]


def test_what_is_no_python_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="not Python that this interpreter reads: SyntaxError"):
        parse("python", "def f(:\n")


def test_sentences_end_where_a_reader_says() -> None:
    text = 'See e.g. Smith et al. Then J. Doe said "No." Why? 3 of them, i.e. few! 第一句。第二句？ end'
    english = ['See e.g. Smith et al. Then J. Doe said "No."', "Why?", "3 of them, i.e. few!"]
    assert sentences(text) == [*english, "第一句。", "第二句？", "end"]


@pytest.mark.parametrize("limit", [1, 7, 20, 33, 1000])
def test_chunks_hold_every_word_once_and_stay_below_their_limit(limit: int) -> None:
    blocks = ["One two. Three four five six. Seven!", "abcdefghij" * 4, "x\n    y\n    z", "last words here"]
    found = chunks(Section((), blocks), limit)
    texts = ["\n\n".join(blocks) for blocks in found]
    assert max(map(len, texts)) <= limit
    assert "".join("".join(texts).split()) == "".join("".join(blocks).split())
    if limit == 1000:
        assert found == [blocks]
    if limit == 33:  # ends of sentences before ends of words
        assert texts[:2] == ["One two. Three four five six.", "Seven!"]
