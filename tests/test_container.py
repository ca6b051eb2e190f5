"""The Dockerfile: what it copies is there, what it installs is asked for and pinned, and it is not root."""

import re

import pytest
from recipes import ROOT

TEXT = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
LINES = [line.split(" ", 1) for line in TEXT.splitlines() if line and not line.startswith("#")]
ARGS = dict(rest.split("=", 1) for word, rest in LINES if word == "ARG")
COPIED = [source for word, rest in LINES if word == "COPY" for source in rest.split()[:-1]]


def test_it_is_of_known_instructions_and_begins_with_the_base() -> None:
    words = [word for word, _ in LINES]
    assert set(words) <= {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "CMD"}
    assert LINES[:2] == [["ARG", f"BASE={ARGS['BASE']}"], ["FROM", "${BASE}"]] and words.count("FROM") == 1


def test_what_is_copied_is_there_and_nothing_else_reaches_the_builder() -> None:
    let_in = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()[1] == "*"
    assert sorted(let_in) == sorted(COPIED) and all((ROOT / name).exists() for name in COPIED)
    links = [path for path in (ROOT / "nemo_embed_core").iterdir() if path.is_symlink()]
    assert len(links) == 3 and {path.resolve().name for path in links} <= set(COPIED)


def test_it_installs_what_setup_offers_at_the_tested_versions() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert all(re.search(rf'^        "{extra}": \[', setup, re.M) for extra in ARGS["EXTRAS"].split(","))
    installs = re.findall(r"pip install [^&\n]*", TEXT)
    assert len(installs) == 2 and all('"$TORCH" -c constraints.txt' in command for command in installs)
    (torch,) = re.findall(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert ARGS["TORCH"] == torch


def test_it_ends_as_a_user_that_is_not_root_and_holds_no_secret() -> None:
    assert [rest for word, rest in LINES if word == "USER"] == ["10001"] and "--uid 10001 " in TEXT
    after = [word for word, _ in LINES[[word for word, _ in LINES].index("USER") :]]
    assert after == ["USER", "WORKDIR", "CMD"]
    assert not re.search(r"(?i)key|token|secret|passw", TEXT)


@pytest.mark.parametrize("name", ["BASE", "TORCH", "EXTRAS"])
def test_the_page_has_its_defaults(name: str) -> None:
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert f"| `{name}` | `{ARGS[name]}` |" in page
