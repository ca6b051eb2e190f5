"""docs/llms.txt, the pages for programs that read (llmstxt.org): python -m docs.llms

The first paragraph of README.md, then each page of the site's navigation with its first sentence.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from docs.pages import ROOT, navigation


def paragraphs(page: Path) -> list[str]:
    """Of the text below the title, without code and tables."""
    body = page.read_text(encoding="utf-8").partition("\n")[2]
    text = re.sub(r"^```.*?^```$", "", body, flags=re.M | re.S)
    blocks = [block for block in re.split(r"\n{2,}", text) if block.strip()]
    return [" ".join(block.split()) for block in blocks if not block.startswith(("    ", "|", "#", "- "))]


def first_sentence(page: Path) -> str:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraphs(page)[0])
    return re.split(r"(?<=[.:])\s", text)[0].rstrip(".:")


def page() -> str:
    front, *parts = navigation().items()
    (readme,) = front[1].values()
    lines = [f"# {readme.read_text(encoding='utf-8').partition(chr(10))[0].removeprefix('# ')}", ""]
    lines += [f"> {paragraphs(readme)[0]}", "", paragraphs(readme)[1]]
    for part, pages in parts:
        lines += ["", f"## {part}", ""]
        for title, path in pages.items():
            place = os.path.relpath(path, ROOT / "docs")
            lines.append(f"- [{title}]({place}): {first_sentence(path)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
