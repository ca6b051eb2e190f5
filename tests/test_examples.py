"""The notebooks of examples/: their cells run in order in an empty folder, and print what stands below them.

python tests/test_examples.py      runs them and writes the outputs into the files (make docs)
"""

import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.ipynb"))


def run(notebook: dict[str, Any]) -> list[str]:
    """What each code cell prints, in the working directory; one namespace, as in a kernel."""
    printed, names = [], {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec("".join(cell["source"]), names)
            printed.append(out.getvalue())
    return printed


def stored(notebook: dict[str, Any]) -> list[str]:
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join(text for output in cell["outputs"] for text in output["text"]) for cell in cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_shows(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)

    def without_numbers(texts: list[str]) -> list[str]:  # the last digits are a processor's own
        return [re.sub(r"\d+\.\d+", "#", text) for text in texts]

    assert without_numbers(run(notebook)) == without_numbers(stored(notebook))
    assert all(stored(notebook)) and not [c for c in notebook["cells"] if c.get("execution_count", 1) is None]


def write(path: Path) -> None:
    """Run it and put the outputs into its cells, as Jupyter does."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        printed = run(notebook)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, (cell, text) in enumerate(zip(cells, printed, strict=True), 1):
        cell["execution_count"] = count
        cell["outputs"] = [
            {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        ]
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    for notebook in NOTEBOOKS:
        write(notebook)
