"""What the recipes are: files of configs/ that go over others, and the commands of a page, loops unrolled and
run."""

import contextlib
import importlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_embed_core.config import LAUNCHERS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
MIX = CONFIGS / "mix-release.yaml"


def launcher(path: Path) -> Any:
    """The prefix names it; a mix is for prepare too."""
    return LAUNCHERS[path.stem.split("-")[0].replace("mix", "train")]


def files(path: Path) -> list[Path]:
    """What the comment at the top of an overlay says that it goes over, and itself."""
    stage = [CONFIGS / f"train-8b-stage{i}.yaml" for i in (1, 2)]
    head = path.read_text(encoding="utf-8").split("\n")[0]
    over = {"# Over a s": stage[:1], "# Data of s": stage[1:], "# Run": [stage[1], MIX]}
    before = [found for start, found in over.items() if head.startswith(start)]
    return [*(before[0] if before else []), path]


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(launcher, its arguments) of every line of a page that starts one; a line that ends in a backslash goes
    on, and `for name in a b; do` up to `done` is once with each."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    loop = re.compile(r"^for (\w+) in (.*); do\n((?:  .*\n)+)done$", re.M)
    text = loop.sub(lambda m: "".join(m[3].replace(f"${m[1]}", word) for word in m[2].split()), text)
    for line in text.splitlines():
        if (match := re.match(r"\s*(?:python|torchrun)\s.*?launch/(\w+)\.py\b(.*)", line)) and match[
            1
        ] != "demo":
            yield match[1], shlex.split(match[2], comments=True)


def run_commands(folder: str, given: list[tuple[str, list[str]]]) -> list[tuple[int, str]]:
    """(exit code, what it printed) of each; in one process, by main() of its launcher."""
    from nemo_embed_core.merge import merge
    from nemo_embed_core.mine import run

    os.chdir(folder)
    merge.check = lambda *args, **options: {"consumers": []}  # in other libraries: tests/export
    run.plot_report = run.plot_datasets = lambda *args: None  # 15 plots: tests/mine
    found: list[tuple[int, str]] = []
    for verb, argv in given:
        sys.argv = [f"launch/{verb}.py", *argv]
        out, code = io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                importlib.import_module(f"launch.{verb}").main()
            except SystemExit as end:
                code = int(end.code or 0)
        found.append((code, out.getvalue()))
    return found
