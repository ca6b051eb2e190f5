"""The rooms of the package and who imports whom, drawn from the code: python -m docs.architecture >
docs/architecture.md.

An arrow is an import in some file of the room, also inside a function. Arrows that others imply are left out:
where a room reaches another one through a third, the picture shows the longer way.
"""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "nemo_embed_core"


def layers() -> list[list[str]]:
    """Rooms side by side, from the top: the contract that lint-imports checks."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    return [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]


def files(room: str) -> list[Path]:
    place = ROOT / room if room in ("kernels", "launch") else ROOT / PACKAGE / room
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def imported(room: str) -> set[str]:
    """Rooms that its files import."""
    found = set()
    for node in (
        node for path in files(room) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module.split(".")[1]} if node.module.startswith(f"{PACKAGE}.") else set()
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith(f"{PACKAGE}.")]
            found |= {name.split(".")[1] for name in names}
    return found - {room}


def reduced(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without arrows to rooms that another arrow's room reaches."""

    def reach(room: str) -> set[str]:
        return arrows[room].union(*map(reach, arrows[room]))

    return {room: targets - set().union(*map(reach, targets)) for room, targets in arrows.items()}


def page() -> str:
    rows = [["launch"], *layers()]
    rooms = {room for row in rows for room in row}
    arrows = reduced({room: imported(room) & rooms for row in rows for room in row})
    drawn = {room for room in rooms if arrows[room] or any(room in targets for targets in arrows.values())}
    lines = [
        *("# Who imports whom", "", "The packages and their imports, drawn. Made by `make docs` from the "
        "imports of every file; `lint-imports` refuses an arrow that points up."),
        *("An arrow that others imply is left out. What each room does: [design.md](design.md).", "",
        "```mermaid", "flowchart TD"),
    ]  # fmt: skip
    lines += [f"  {room}" for row in rows for room in row if room in drawn]
    lines += [f"  {room} --> {target}" for row in rows for room in row for target in sorted(arrows[room])]
    return "\n".join([*lines, "```"]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
