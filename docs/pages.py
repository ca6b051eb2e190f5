"""The site's pages: those of docs/ and of the root, whose README.md is the front page. A hook of mkdocs
(`make site`), and what docs/llms.py knows of pages; it imports nothing of ours.

In the repository links lead from file to file; the site has all pages in one folder, beside copies of the
files that they link to. Each page is there as Markdown too, for programs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
FRONT = "index.md"  # README.md
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def navigation() -> dict[str, dict[str, Path]]:
    """Part -> title -> file of the repository, in mkdocs.yml's order; the front page is of the part ""."""
    parts: dict[str, dict[str, Path]] = {}
    for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]:
        ((title, inside),) = entry.items()
        pages = (
            {title: inside} if isinstance(inside, str) else {k: v for page in inside for k, v in page.items()}
        )
        part = "" if isinstance(inside, str) else title
        parts[part] = {name: source(uri) for name, uri in pages.items()}
    return parts


def source(uri: str) -> Path:
    """File of the repository that a page of the site is made of."""
    if uri == FRONT:
        return ROOT / "README.md"
    return ROOT / uri if (ROOT / uri).is_file() else ROOT / "docs" / uri


def links(page: Path) -> Iterator[tuple[str, Path, str]]:
    """(link, file or folder, anchor) of each link of a page that leads into the repository; an anchor of ""
    is its top."""
    for _, link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in link and not link.startswith("mailto:"):
            place, _, anchor = link.partition("#")
            yield link, Path(os.path.normpath(page.parent / place)) if place else page, anchor


def place_on_site(path: Path) -> str:
    """Of a file of the repository; "": a folder, which the site has not."""
    if path.is_dir():
        return ""
    uri = path.relative_to(ROOT).as_posix()
    return FRONT if uri == "README.md" else uri.removeprefix("docs/")


def for_the_site(text: str, page: Path) -> str:
    """The text of a page with links that are right on the site; one to a folder becomes its text."""

    def moved(match: re.Match[str]) -> str:
        words, link = match.groups()
        if "://" in link or link.startswith("#"):
            return match[0]
        place, _, anchor = link.partition("#")
        there = place_on_site(Path(os.path.normpath(page.parent / place)))
        return f"[{words}]({there}{'#' * bool(anchor)}{anchor})" if there else words

    return LINK.sub(moved, text)


# ------------------------------------------------------------------------------------------ hooks of mkdocs


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the pages of the root, and every other file that a page links to."""
    from mkdocs.structure.files import File

    pages = [page for part in navigation().values() for page in part.values()]
    linked = {target for page in pages for _, target, _ in links(page) if target.is_file()}
    for path in sorted({*pages, *linked}):
        if path.parent != ROOT / "docs":
            files.append(File.generated(config, place_on_site(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    return for_the_site(markdown, source(page.file.src_uri))


def on_post_build(*, config: Any) -> None:
    """Pages as Markdown beside those for people; the build fails where something would be loaded from
    elsewhere."""
    from mkdocs.exceptions import PluginError

    site = Path(config.site_dir)
    for page in (page for part in navigation().values() for page in part.values()):
        text = for_the_site(page.read_text(encoding="utf-8"), page)
        (site / place_on_site(page)).write_text(text, encoding="utf-8")
    llms = ROOT / "docs" / "llms.txt"
    (site / llms.name).write_text(for_the_site(llms.read_text(encoding="utf-8"), llms), encoding="utf-8")
    if found := [f"{page.name}: {what}" for page in sorted(site.rglob("*.html")) for what in loaded(page)]:
        raise PluginError("the site loads from elsewhere: " + ", ".join(found))


def loaded(page: Path) -> list[str]:
    """Addresses with a host that a page of HTML loads when it is opened; links that are followed by hand are
    none."""

    class Resources(HTMLParser):
        found: list[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            for name, value in attrs:
                opened = name in ("src", "srcset", "data", "poster") or (name == "href" and tag == "link")
                if opened and re.match(r"(?:\w+:)?//", value or ""):
                    self.found.append(value or "")

        def handle_data(self, data: str) -> None:
            self.found += re.findall(r"(?:@import\s*|url\()[\"']?((?:https?:)?//[^\s\"')]+)", data)

    parser = Resources()
    parser.found = []
    parser.feed(page.read_text(encoding="utf-8"))
    return parser.found
