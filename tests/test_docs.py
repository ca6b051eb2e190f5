"""What the texts say is so: pages that a command makes are its output, links lead somewhere, commands are
accepted."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from recipes import ROOT, commands

from docs import pages
from nemo_embed_core import config
from nemo_embed_core.cli import VERBS as VERBS_OF_CLI
from nemo_embed_core.command_line import load_config
from nemo_embed_core.errors import UserError

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize(
    "page, command",
    [
        ("docs/benchmarks.md", ["-m", "benchmarks.report"]),
        ("docs/architecture.md", ["-m", "docs.architecture"]),
        ("docs/options.md", ["-m", "docs.options"]),
        ("docs/experiments.md", ["-m", "docs.experiments"]),
        ("docs/llms.txt", ["-m", "docs.llms"]),
    ],
)
def test_a_page_is_what_its_command_makes(page: str, command: list[str]) -> None:
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    same = (ROOT / page).read_text(encoding="utf-8") == result.stdout
    assert same, f"{page} is out of date: python {' '.join(command)} > {page}"


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Of its headings, as code hosts and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found: list[str] = []
    for head in re.findall(r"^#+ (.*)$", text, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head).lower()
        word = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(f"{word}-{found.count(word)}" if word in found else word)
    return set(found)


def test_relative_links_lead_to_files_and_headings() -> None:
    inside = [(page, link) for page in PAGES for link in links(page) if "://" not in link]
    assert len(inside) > 100 and len([link for _, link in inside if "#" in link]) > 20
    wrong = []
    for page, link in inside:
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(f"{page.name}: {link}")
    assert not wrong, "\n".join(wrong)


def test_every_page_is_reached_from_the_readme() -> None:
    found, todo = set[Path](), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        found.add(page)
        links = re.findall(r"\]\(([^):#\s]+\.md)", page.read_text(encoding="utf-8"))
        todo += [place for link in links if (place := (page.parent / link).resolve()) not in found]
    assert not set(PAGES) - found


def test_the_readme_is_short_and_in_order() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100
    heads = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    path = "Your data to a served model in five commands"
    assert heads == ["Install", "Two commands", path, "Python", "Map", "Links"]
    section = "\n".join(lines).split(f"## {path}")[1].split("```")[1]
    assert len(section.strip().splitlines()) == 5


# ------------------------------------------------------------------------------------------ the site


def test_every_page_stands_in_the_navigation_once() -> None:
    """Of mkdocs.yml: those of docs/ and of the root, whose README.md is the front page."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    front, *parts = (next(iter(entry.values())) for entry in nav)
    uris = [front, *(uri for part in parts for page in part for uri in page.values())]
    assert sorted(uris) == sorted("index.md" if page.name == "README.md" else page.name for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_site_has_the_lists_and_tables_that_a_code_host_shows(page: Path) -> None:
    """Its parser wants a blank line before a list, and ends a table elsewhere."""
    markdown = pytest.importorskip("markdown")
    markdown_it = pytest.importorskip("markdown_it")
    text = page.read_text(encoding="utf-8")
    html = markdown.markdown(text, extensions=["tables", "fenced_code"])
    other = markdown_it.MarkdownIt("commonmark").enable("table").render(text)
    for tag in ("h2", "li", "ul", "ol", "tr", "table", "pre"):
        assert html.count(f"<{tag}>") == other.count(f"<{tag}>"), tag


def test_links_are_those_of_the_site() -> None:
    text = "[a](../SECURITY.md#x) [b](mining.md) [c](../benchmarks/results) [d](#here) [e](https://f.g/h.md)"
    there = "[a](SECURITY.md#x) [b](mining.md) c [d](#here) [e](https://f.g/h.md)"
    assert pages.for_the_site(text, ROOT / "docs/training.md") == there
    text = "[a](docs/mining.md) [b](examples/x.ipynb) [c](README.md)"
    assert (
        pages.for_the_site(text, ROOT / "README.md") == "[a](mining.md) [b](examples/x.ipynb) [c](index.md)"
    )


@pytest.mark.parametrize(
    "html, address",
    [
        ('<script src="https://a.b/c.js"></script>', "https://a.b/c.js"),
        ('<link rel="stylesheet" href="//a.b/c.css">', "//a.b/c.css"),
        ('<img src="http://a.b/c.png">', "http://a.b/c.png"),
        ("<style>@import url(https://a.b/c.css);</style>", "https://a.b/c.css"),
        ('<a href="https://a.b">followed by hand</a><script src="assets/x.js"></script>', None),
    ],
)
def test_what_a_page_of_the_site_would_load_from_elsewhere_is_found(
    tmp_path: Path, html: str, address: str | None
) -> None:
    page = tmp_path / "page.html"
    page.write_text(html)
    assert pages.loaded(page) == ([address] if address else [])


# ------------------------------------------------------------------------------------------ commands


COMMANDS = [(page.name, verb, argv) for page in PAGES for verb, argv in commands(page)]


def test_every_verb_has_a_command_in_the_docs() -> None:
    assert {verb for _, verb, _ in COMMANDS} == {*config.LAUNCHERS, "merge"} and len(COMMANDS) > 15


VERBS = {
    "prepare": "preparing", "synthesize": "synthesis", "train": "training", "mine": "mining",
    "merge": "merging", "evaluate": "evaluation", "plan": "planning", "experiment": "experiments",
    "pipeline": "pipeline",
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_the_page_of_a_verb_begins_with_its_command_and_links_its_options(verb: str) -> None:
    text = (ROOT / f"docs/{VERBS[verb]}.md").read_text(encoding="utf-8")
    top = text.split("\n## ")[0]
    assert f"launch/{verb}.py " in "\n".join(top.splitlines()[:12]), "a sentence, then the command"
    assert f"](options.md#launch{verb}py)" in top and set(VERBS) == set(VERBS_OF_CLI)


@pytest.mark.parametrize("verb", config.LAUNCHERS)
def test_commands_are_accepted(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = [(page, argv) for page, of, argv in COMMANDS if of == verb]
    for page, argv in commands:
        try:
            load_config(config.LAUNCHERS[verb], argv)
        except UserError as error:
            pytest.fail(f"{page}: {verb} {shlex.join(argv)}: {error}")


def test_commands_of_merge_have_its_options() -> None:
    result = subprocess.run(
        [sys.executable, "launch/merge.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", result.stdout.split("options:")[-1]))
    assert "--weights" in known and "-o" in known
    unknown = [
        (page, word) for page, of, argv in COMMANDS if of == "merge" for word in argv if word.startswith("-")
    ]
    assert not [(page, word) for page, word in unknown if word not in known]


# ------------------------------------------------------------------------------------------ what is printed


def texts_of_the_code() -> list[str]:
    """Every string of the package and the launchers, with NUL where a value stands."""
    found = []
    for path in sorted([*ROOT.glob("nemo_embed_core/**/*.py"), *ROOT.glob("launch/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [text.replace("\n", " ") for text in found]


def test_messages_that_troubleshooting_quotes_are_the_codes() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        line for block in re.findall(r"^```text\n(.*?)^```", page, re.M | re.S) for line in block.splitlines()
    ]
    assert len(quoted) > 30
    code = texts_of_the_code()

    def is_printed(line: str) -> bool:
        parts = [part for part in line.split("...") if part.strip()]
        pattern = re.compile(".*".join(map(re.escape, parts)))
        return any(pattern.search(text) for text in code if parts[0] in text)

    assert not [line for line in quoted if not is_printed(line)]
    assert not is_printed("... of ... rows can never have more than ... tokens")


# ------------------------------------------------------------------------------------------ who carries on


def test_a_recipe_names_at_most_three_files_besides_tests() -> None:
    """CONTRIBUTING: '### A data format' and the files below it; where one moves, the recipe moves with it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## How to add")[1].split("\n## ")[0]
    recipes = {part.splitlines()[0]: part for part in text.split("\n### ")[1:]}
    assert list(recipes) == [
        "A data format",
        "A base model",
        "A pooling",
        "An export format",
        "A loss term",
        "An optimizer",
        "A tracker",
        "An evaluation task",
        "A kernel",
    ]
    for name, recipe in recipes.items():
        files = set(re.findall(r"`((?:\w+/)*[\w.]+\.(?:py|md|yaml))`", recipe))
        assert files and not [file for file in files if not (ROOT / file).is_file()], (name, files)
        assert any(file.startswith("tests/") for file in files), name
        assert len({file for file in files if not file.startswith("tests/")}) <= 3, (name, files)
        assert len(recipe.strip().splitlines()[1:]) <= 6, name  # five lines and the blank one below the title


def test_every_package_that_setup_asks_for_is_pinned_in_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    (call,) = [
        node.value for node in ast.parse((ROOT / "setup.py").read_text()).body if isinstance(node, ast.Expr)
    ][1:]
    asked = {
        keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg in _ASKED
    }  # type: ignore[attr-defined]
    names = ("eval", "demo", "log", "inspect", "synthesize", "dev")
    extras = [item for name in names for item in asked["extras_require"][name]]
    requirements = [Requirement(text) for text in (*asked["install_requires"], *extras)]
    for requirement in requirements:
        name = requirement.name.lower().replace("_", "-")
        if name not in ("torch", "triton"):
            assert requirement.specifier.contains(pins[name]), f"{requirement} and {name}=={pins.get(name)}"
    assert not {"torch", "triton"} & set(pins)


_ASKED = {"install_requires", "extras_require"}
