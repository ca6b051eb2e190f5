"""What a document says of its own structure: its title, and sections of blocks below headings.

parse("guide.md", text) -> Parsed(title="Guide", sections=[Section(headings=("Install", "Linux"), ...)])

Markdown (ATX and setext headings), HTML (html.parser), reStructuredText, plain text (text taken out of a PDF
too) and Python (docstrings, through ast; nothing is imported or run). A block is a paragraph, a list item, a
table row or a code block; marks of emphasis, links and roles are taken off, their texts stay.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import NamedTuple

SUFFIXES = {
    ".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html", ".xhtml": "html",
    ".rst": "rst", ".txt": "text", ".text": "text", ".py": "python",
}  # fmt: skip


@dataclass
class Section:
    """headings: from the outermost below the title to its own; () before the first.  summary: its author's
    own sentence on the rest, which is not among the blocks."""

    headings: tuple[str, ...] = ()
    blocks: list[str] = field(default_factory=list)
    summary: str = ""


class Parsed(NamedTuple):
    title: str
    sections: list[Section]


def parse(kind: str, text: str) -> Parsed:
    """kind: a value of SUFFIXES. ValueError where a file is not what its name says (Python alone)."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    readers = {"markdown": _markdown, "html": _html, "rst": _rst, "text": _text, "python": _python}
    title, sections = readers[kind](text)
    return Parsed(title, [section for section in sections if section.blocks])


class _Outline:
    """Sections as headings and blocks come in. The only heading of the first level is the title."""

    def __init__(self) -> None:
        self.sections, self._path = [Section()], list[tuple[int, str]]()
        self._first: list[str] = []  # headings of level 1

    def heading(self, level: int, text: str) -> None:
        if text := _line(text):
            self._path = [*((depth, name) for depth, name in self._path if depth < level), (level, text)]
            self._first += [text] if level == 1 else []
            self.sections.append(Section(tuple(name for _, name in self._path)))

    def block(self, text: str) -> None:
        if re.search(r"\w", text):
            self.sections[-1].blocks.append(text.strip("\n").rstrip())

    def close(self, title: str = "") -> Parsed:
        """title: the file's own, where it says one."""
        title = _line(title) or (self._first[0] if len(self._first) == 1 else "")
        for section in self.sections:
            if section.headings and section.headings[0] == title:
                section.headings = section.headings[1:]
        return Parsed(title, self.sections)


def _line(text: str) -> str:
    return " ".join(text.split())


def _paragraph(lines: list[str]) -> str:
    """Hard-wrapped lines as one; a line that begins with a bullet, a number or spaces begins anew."""
    out = ""
    for line in lines:
        begins = re.match(r"\s|[-*+•] |\d+[.)] |\|", line)
        out += f"{chr(10) if begins else ' '}{line}" if out else line
    return re.sub(r"(?<=\S)[ \t]+", " ", out)


# ------------------------------------------------------------------------------------------ Markdown

_FENCE = re.compile(r" {0,3}(```+|~~~+)")
_MARKDOWN = (
    (re.compile(r"<!--.*?-->\s*", re.S), ""),
    (re.compile(r"!\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r"\[([^\]]+)\](\([^)]*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r"<(https?://[^>\s]+)>"), r"\1"),
    (re.compile(r"</?[a-zA-Z][^<>\n]*>"), ""),
    (re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1"), r"\2"),
    (re.compile(r"(?<![\w*])([*_])(?=\S)([^*_\n]+?)(?<=\S)\1(?![\w*])"), r"\2"),
    (re.compile(r"``? ?(.+?) ?``?"), r"\1"),
    (re.compile(r"\\([\\`*_{}\[\]()#+.!>-])"), r"\1"),
)


def _plain(text: str, marks: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in marks:
        text = pattern.sub(replacement, text)
    return text


def _markdown(text: str) -> Parsed:
    outline, title, description = _Outline(), "", ""
    if match := re.match(r"---\n(.*?)\n(?:---|\.\.\.)\n", text, re.S):
        text = text[match.end() :]
        fields = dict(re.findall(r"^(\w+):[ \t]*[\"']?(.*?)[\"']?[ \t]*$", match[1], re.M))
        title, description = fields.get("title", ""), fields.get("description") or fields.get("summary", "")
    lines, paragraph, fence = text.split("\n"), list[str](), ""
    code: list[str] = []

    def end() -> None:
        outline.block(_plain(_paragraph(paragraph), _MARKDOWN))
        paragraph.clear()

    for line in lines:
        mark = _FENCE.match(line)
        if fence:
            if mark and line.strip().startswith(fence):
                outline.block("\n".join(code))
                fence = ""
            else:
                code.append(line)
        elif mark:
            end()
            fence, code = mark[1], []
        elif match := re.match(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$", line):
            end()
            outline.heading(len(match[1]), _plain(match[2], _MARKDOWN))
        elif len(paragraph) == 1 and re.fullmatch(r" {0,3}(=+|-+)[ \t]*", line):
            outline.heading(1 if "=" in line else 2, _plain(paragraph.pop(), _MARKDOWN))
        elif not line.strip() or re.fullmatch(r" {0,3}([-*_])( ?\1){2,} *|[|: -]+", line):
            end()
        elif not re.match(r"\[[^\]]+\]:\s", line):  # where a link leads
            paragraph.append(re.sub(r"^ {0,3}> ?", "", line))
    if fence:  # never closed: to the end, as CommonMark says
        outline.block("\n".join(code))
    end()
    return _with_summary(outline.close(title), _line(description))


def _with_summary(parsed: Parsed, description: str) -> Parsed:
    """The file's description, or its section Abstract, as the summary of its first section with text."""
    for section in parsed.sections:
        own = section.headings[-1].lower().strip(":.") if section.headings else ""
        if not description and own in ("abstract", "summary", "tl;dr", "tldr") and section.blocks:
            description = _line(" ".join(section.blocks))
            section.blocks = []
    for section in parsed.sections:
        if section.blocks and description:
            section.summary = description
            break
    return parsed


# ------------------------------------------------------------------------------------------ HTML


class _Page(HTMLParser):
    SKIPPED = frozenset((
        "script", "style", "nav", "header", "footer", "aside", "noscript", "template", "form", "svg",
        "button",
    ))  # fmt: skip
    BLOCKS = frozenset((
        "p", "li", "dt", "dd", "tr", "td", "th", "div", "section", "article", "main", "blockquote",
        "pre", "table", "ul", "ol", "dl", "figure", "figcaption", "body", "hr",
    ))  # fmt: skip

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.outline, self.title, self.description = _Outline(), "", ""
        self._text: list[str] = []
        self._skipped: list[str] = []
        self._heading, self._in_title, self._in_pre = 0, False, False

    def _end(self) -> None:
        text = "".join(self._text)
        if self._heading:
            self.outline.heading(self._heading, re.sub(r"\s*[¶#]\s*$", "", text))
            self._heading = 0
        else:
            self.outline.block(text if self._in_pre else _line(text))
        self._text = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIPPED:
            self._skipped.append(tag)
        elif tag == "title":
            self._in_title = not self._skipped  # of an svg: no
        elif tag == "meta" and ("name", "description") in attrs:
            self.description = dict(attrs).get("content") or ""
        elif tag == "br":
            self._text.append("\n" if self._in_pre else " ")
        elif tag in ("td", "th"):
            self._text.append(" ")
        elif tag in self.BLOCKS:
            self._end()
            self._in_pre = self._in_pre or tag == "pre"
        elif re.fullmatch("h[1-6]", tag):
            self._end()
            self._heading = int(tag[1])

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipped:
            while self._skipped.pop() != tag:
                pass
        elif tag == "title":
            self._in_title = False
        elif (tag in self.BLOCKS and tag not in ("td", "th")) or re.fullmatch("h[1-6]", tag):
            self._end()
            self._in_pre = self._in_pre and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._skipped:
            self._text.append(data)


def _html(text: str) -> Parsed:
    page = _Page()
    page.feed(text)
    page.close()
    page._end()
    titled = page.outline.close()
    return _with_summary(titled if titled.title else page.outline.close(page.title), _line(page.description))


# ------------------------------------------------------------------------------------------ rST, plain text

_UNDERLINE = re.compile(r"([=\-~^\"'`#*+:.<>_])\1{2,}[ \t]*")
_RST = (
    (re.compile(r":[\w:.+-]+:`([^`<]+?)\s*<[^`>]+>`"), r"\1"),
    (re.compile(r":[\w:.+-]+:`[~!]?([^`]+)`"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]+>`__?"), r"\1"),
    (re.compile(r"``(.+?)``"), r"\1"),
    (re.compile(r"`([^`]+)`_{0,2}"), r"\1"),
    (re.compile(r"(\*\*?)(?=\S)(.+?)(?<=\S)\1"), r"\2"),
    (re.compile(r"\|(\S[^|]*\S)\|_{0,2}"), r"\1"),
    (re.compile(r"::$", re.M), ":"),
)
_NO_TEXT = frozenset((
        "toctree", "image", "figure", "contents", "include", "highlight", "index", "raw",
        "autosummary", "automodule", "autoclass", "autofunction", "currentmodule", "module",
        "meta", "csv-table",
    ))  # fmt: skip


def _rst(text: str) -> Parsed:
    outline, paragraph, levels = _Outline(), list[str](), list[str]()
    lines, i = text.expandtabs().split("\n"), 0
    hidden = -1  # indentation of a directive or comment whose content is no text

    def end() -> None:
        outline.block(_plain(_paragraph(paragraph), _RST))
        paragraph.clear()

    while i < len(lines):
        line = lines[i]
        indent = len(line) - len(line.lstrip())
        under = lines[i + 1] if i + 1 < len(lines) else ""
        over = (
            bool(_UNDERLINE.fullmatch(line)) and i + 2 < len(lines) and lines[i + 2].rstrip() == line.rstrip()
        )
        if hidden >= 0 and line.strip() and indent <= hidden:
            hidden = -1
        if hidden >= 0:
            pass
        elif over and under.strip():
            end()
            outline.heading(_level(levels, line[0] * 2), _plain(under, _RST))
            i += 2
        elif (
            not indent and line and _UNDERLINE.fullmatch(under) and len(under.rstrip()) >= len(line.rstrip())
        ):
            end()
            outline.heading(_level(levels, under[0]), _plain(line, _RST))
            i += 1
        elif match := re.match(r"\s*\.\. (?:([\w:.+-]+)::(.*)|.*)$", line):
            end()
            if match[1] is None or match[1].split(":")[-1] in _NO_TEXT:
                hidden = indent
            elif match[1].split(":")[-1] in ("note", "warning", "tip", "important") and match[2].strip():
                paragraph.append(match[2].strip())
        elif (
            re.match(r"\s*:[\w -]+:(\s|$)", line) or not line.strip() or _UNDERLINE.fullmatch(line.strip())
        ):  # an option or field: metadata
            end()
        else:
            paragraph.append(line.strip() if indent else line)
        i += 1
    end()
    return _with_summary(outline.close(), "")


def _level(levels: list[str], style: str) -> int:
    """Levels of reStructuredText are the styles in the order of their first use."""
    if style not in levels:
        levels.append(style)
    return levels.index(style) + 1


def _text(text: str) -> Parsed:
    """Headings: underlined lines, numbered ones ("2.1 Install") and lines in capitals that stand alone."""
    outline, title = _Outline(), ""
    text = re.sub(r"(?<=[a-zà-ÿ])-\n(?=[a-zà-ÿ])", "", text)  # of a PDF: "exam-" "ple"
    paragraphs = [part.split("\n") for part in re.split(r"\n\s*\n|\f", text.expandtabs()) if part.strip()]
    for number, lines in enumerate(paragraphs):
        lines = [line.rstrip() for line in lines if line.strip()]
        first = lines[0].strip()
        if len(lines) >= 2 and _UNDERLINE.fullmatch(lines[1].strip()) and re.search(r"\w", first):
            outline.heading(1 if lines[1].strip()[0] == "=" else 2, first)
            lines = lines[2:]
        elif len(lines) == 1 and len(first) <= 80 and not re.search(r"[.,;:]$", first):
            numbered = re.match(r"(\d+(?:\.\d+)*)\.?\s+(?=[^\W\d])", first)
            is_capitals = first.isupper() and len(first) >= 4
            if number == 0 and not numbered:
                title, lines = first, []
            elif numbered or is_capitals:
                outline.heading(2 + numbered[1].count(".") if numbered else 2, first)
                lines = []
        if lines:
            outline.block(_paragraph(lines))
    return outline.close(title)


# ------------------------------------------------------------------------------------------ Python


def _python(text: str) -> Parsed:
    """A section for each docstring: its first paragraph is the summary, headings are its names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError) as error:  # ValueError: null bytes
            raise ValueError(f"not Python that this interpreter reads: {type(error).__name__}") from None
    sections, stack = list[Section](), list[tuple[tuple[str, ...], ast.AST]]([((), tree)])
    while stack:
        names, node = stack.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = (*names, node.name)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
            summary, _, rest = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").partition("\n\n")
            blocks = [block.strip("\n") for block in re.split(r"\n\s*\n", rest) if block.strip()]
            is_heading = re.search(r"[=~^`-]{4}", summary)  # "Parameters ----------" in place of a summary
            sections.append(Section(names, blocks, "" if is_heading else _line(summary)))
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            stack += [(names, child) for child in reversed(children)]
    return Parsed("", sections)
