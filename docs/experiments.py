"""docs/experiments.md: docs/experiments/about.md, the grids of configs/experiments/ with their commands, and
the tables of those whose results lie in docs/experiments/: python -m docs.experiments

    cp runs/thresholds/results.json docs/experiments/thresholds.json        # then make docs
"""

from __future__ import annotations

from pathlib import Path

from nemo_embed_core.experiments.grid import read_grid
from nemo_embed_core.experiments.table import markdown, read_results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "experiments"


def page() -> str:
    parts = [(RESULTS / "about.md").read_text(encoding="utf-8")]
    for path in sorted((ROOT / "configs" / "experiments").glob("*.yaml")):
        grid, name = read_grid(str(path)), path.stem
        results = RESULTS / f"{name}.json"
        command = f"python launch/experiment.py --grid configs/experiments/{path.name} --output runs/{name}"
        parts += [f"## {name}\n", f"{grid.question.strip()}\n", f"    {command}\n"]
        parts.append(f"{markdown(read_results(results))}\n" if results.is_file() else "No results yet.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
