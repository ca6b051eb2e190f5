"""What a power cut may leave behind, after every operation of a save: kill -9 cannot show it, the page cache
survives that.

The real save_checkpoint runs on a real folder while every fsync, rename, unlink and rmdir is recorded (new
entries and bytes are found by looking). For each prefix of that record all disks are built that POSIX allows:
  data that was not fsynced is whole, half, empty or half with zeros behind;
  of a folder's changes since its last fsync a prefix is there.
On each of them the real reader must find the checkpoint whose save() had returned, or a newer one, and
nothing else.
"""

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import manifest_meta

from nemo_embed_core.checkpoint import manifest as manifest_module
from nemo_embed_core.checkpoint import write as write_module
from nemo_embed_core.checkpoint.manifest import CheckpointError, verify_checkpoint
from nemo_embed_core.checkpoint.reader import Reader
from nemo_embed_core.checkpoint.runs import checkpoints, newest_whole
from nemo_embed_core.checkpoint.write import Piece, save_checkpoint
from nemo_embed_core.errors import UserError
from nemo_embed_core.files import durable

STEPS = 4
SAMPLES = 40  # disks per state of the root, where there are more
SHAPE = (64, 2)
META = manifest_meta({"num_hidden_layers": 0})


class Recorder:
    """ops: ("link"|"unlink", folder, name, id), ("rename", folder, old, new), ("data", id, bytes), ("fsync",
    id), ("returned", None, step)."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, skip_fsync: Callable[[str], bool]):
        self.root, self.ops = root, []
        self.ids: dict[str, int] = {str(root): 0}
        self.contents: dict[int, bytes] = {}
        self._count = itertools.count(1)
        real = {name: getattr(os, name) for name in ("rename", "unlink", "rmdir")}

        def fsync(fd: int) -> None:
            path = os.readlink(f"/proc/self/fd/{fd}")
            self.look()
            if not skip_fsync(os.path.relpath(path, root)):
                self.ops.append(("fsync", self.ids[path]))

        def rename(old: Path, new: Path) -> None:
            self.look()
            real["rename"](old, new)
            assert Path(old).parent == Path(new).parent == root
            self.ops.append(("rename", 0, Path(old).name, Path(new).name))
            inside = {p: i for p, i in self.ids.items() if p == str(old) or p.startswith(f"{old}/")}
            for path, identity in inside.items():
                del self.ids[path]
                self.ids[str(new) + path.removeprefix(str(old))] = identity

        def remove(kind: str) -> Callable[..., None]:
            def call(name: Any, *, dir_fd: int | None = None) -> None:
                path = (
                    os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), name)
                    if dir_fd is not None
                    else str(name)
                )
                self.look()
                real[kind](name, dir_fd=dir_fd)
                self.ops.append(("unlink", self.ids[os.path.dirname(path)], os.path.basename(path), None))
                del self.ids[path]

            return call

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "rename", rename)
        monkeypatch.setattr(os, "unlink", remove("unlink"))
        monkeypatch.setattr(os, "rmdir", remove("rmdir"))

    def look(self) -> None:
        """Record what has been created and written since the last look."""
        for folder, folders, names in os.walk(self.root):
            for name in sorted(folders) + sorted(names):
                path = os.path.join(folder, name)
                new = path not in self.ids
                if new:
                    self.ids[path] = next(self._count)
                if name in names:
                    data = Path(path).read_bytes()
                    if self.contents.get(self.ids[path]) != data:
                        self.contents[self.ids[path]] = data
                        self.ops.append(("data", self.ids[path], data))
                if new:
                    self.ops.append(("link", self.ids[folder], name, self.ids[path]))

    def returned(self, step: int) -> None:
        self.look()
        self.ops.append(("returned", None, step))


Tree = dict[str, bytes | None]  # path below the root -> bytes of a file, None for a folder


def disks(ops: list[tuple], rng: random.Random) -> Iterator[Tree]:
    """Every disk that a power cut after these operations may leave; of one state of the root SAMPLES where
    there are more."""
    changes: dict[int, list[tuple]] = {0: []}
    synced: dict[int, int] = {}
    data: dict[int, list[bytes]] = {}
    for op in ops:
        if op[0] in ("link", "unlink", "rename"):
            changes.setdefault(op[1], []).append((op[0], *op[2:]))
        elif op[0] == "data":
            half, size = len(op[2]) // 2, len(op[2])
            data[op[1]] = list(dict.fromkeys([op[2], op[2][:half], op[2][:half] + bytes(size - half), b""]))
        elif op[0] == "fsync":
            synced[op[1]] = len(changes.get(op[1], []))
            if op[1] in data:
                del data[op[1]][1:]

    def states(folder: int) -> list[dict[str, int]]:
        """name -> id after each prefix of the folder's changes that may have reached the disk."""
        entries: dict[str, int] = {}
        found = [{}] if not synced.get(folder) else []
        for i, (kind, name, value) in enumerate(changes.get(folder, []), 1):
            if kind == "link":
                entries[name] = value
            elif kind == "rename":
                entries[value] = entries.pop(name)
            else:
                entries.pop(name)
            if i >= synced.get(folder, 0):
                found.append(dict(entries))
        return found

    for root in states(0):
        choices = [states(folder) for folder in root.values()]
        total = 1
        for options in choices:
            total *= sum(_product(len(data[f]) for f in entries.values()) for entries in options)
        picks: Any = itertools.product(*choices)
        if total > SAMPLES:
            picks = ([rng.choice(options) for options in choices] for _ in range(SAMPLES))
        for pick in picks:
            paths = [
                (f"{a}/{b}", f) for a, entries in zip(root, pick, strict=True) for b, f in entries.items()
            ]
            contents: Any = itertools.product(*(data[f] for _, f in paths))
            if total > SAMPLES:
                contents = [[rng.choice(data[f]) for _, f in paths]]
            for content in contents:
                yield dict.fromkeys(root) | {path: c for (path, _), c in zip(paths, content, strict=True)}


def _product(sizes: Iterator[int]) -> int:
    n = 1
    for size in sizes:
        n *= size
    return n


def values(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    names = ("w", "exp_avg/w", "exp_avg_sq/w")
    return {name: torch.randn(SHAPE, generator=generator) + 1 for name in names}


def record(
    root: Path, monkeypatch: pytest.MonkeyPatch, skip_fsync: Callable[[str], bool], keep: int
) -> list[tuple]:
    root.mkdir()
    with monkeypatch.context() as patch:
        recorder = Recorder(root, patch, skip_fsync)
        for step in range(1, STEPS + 1):
            if step == 3:  # what a killed save left
                (root / ".tmp-step-00000003").mkdir()
                (root / ".tmp-step-00000003" / "junk").write_bytes(b"junk")
            pieces = {n: Piece(SHAPE, ((0, 0), SHAPE), t) for n, t in values(step).items()}
            save_checkpoint(
                root, step, pieces, rank=0, world_size=1, meta=META, extra_files={"tokenizer.json": b"{}"},
                keep=keep, gather=lambda value: [value],
            )  # fmt: skip
            recorder.returned(step)
    return recorder.ops


def judge(ops: list[tuple], folder: Path, until: str = "") -> dict[str, int]:
    """How many of the disks lose a promised checkpoint, hand out wrong values, or show a broken one under its
    name.

    `until`: stop at the first disk that does this.
    """
    rng = random.Random(0)
    seen: dict[frozenset, tuple[int, bool, int]] = {}
    counts = {"disks": 0, "lost": 0, "corrupt": 0, "broken": 0}
    for k in range(len(ops) + 1):
        promised = max((op[2] for op in ops[:k] if op[0] == "returned"), default=0)
        for tree in disks(ops[:k], rng):
            key = frozenset(tree.items())
            if key not in seen:
                seen[key] = read_back(tree, folder)
            step, corrupt, broken = seen[key]
            counts["disks"] += 1
            counts["lost"] += step < promised
            counts["corrupt"] += corrupt
            counts["broken"] += broken
            if until and counts[until]:
                return counts
    assert len(seen) > 20, "hardly any disk differs from another: nothing is recorded"
    return counts


def read_back(tree: Tree, folder: Path) -> tuple[int, bool, int]:
    """(step that a resume finds or 0, whether its values are wrong, number of folders that do not verify)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path, data in tree.items():
        if data is None:
            (folder / path).mkdir(exist_ok=True)
        else:
            (folder / path).write_bytes(data)
    broken = 0
    for path in checkpoints(folder):
        try:
            verify_checkpoint(path)
        except UserError:
            broken += 1
    try:
        found = newest_whole(folder, lambda message: None)
        if found is None:
            return 0, False, broken
        reader = Reader(found)
        step = reader.manifest["step"]
        assert found.name == f"step-{step:08d}"
        same = all(torch.equal(reader.read_box(n, ((0, 0), SHAPE)), t) for n, t in values(step).items())
        return step, not same, broken
    except CheckpointError:
        return 0, False, broken


@pytest.mark.fault(5)
def test_no_power_cut_costs_a_reported_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for keep in (1, 2):
        ops = record(tmp_path / f"run-{keep}", monkeypatch, lambda path: False, keep)
        # 4 files, the folder and its parent; the parent again where one is deleted.
        fsyncs = STEPS * 6 + STEPS - keep
        assert sum(op[0] == "fsync" for op in ops) == fsyncs
        counts = judge(ops, tmp_path / "disk")
        assert counts["disks"] > 300
        assert counts == {"disks": counts["disks"], "lost": 0, "corrupt": 0, "broken": 0}


@pytest.mark.fault(5)
def test_new_folders_on_the_way_are_as_durable_as_what_is_saved_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def fsync(file: int | Path) -> None:
        if isinstance(file, Path) and file.is_dir():
            synced.append(str(file.relative_to(tmp_path)))

    monkeypatch.setattr(durable, "fsync", fsync)
    durable.probe(tmp_path / "runs/a")
    assert set(synced) == {".", "runs", "runs/a"}  # where runs, a and the probed file were entered
    synced.clear()
    with durable.new_folder(tmp_path / "out/merged") as folder:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text("{}")
    assert synced == [".", f"out/{folder.name}/1_Pooling", f"out/{folder.name}", "out"]


def prune_first(tmp: Path, final: Path) -> None:
    for old in final.parent.glob("step-*"):
        shutil.rmtree(old)
    durable.publish(tmp, final)


def write_in_place(tmp: Path, final: Path) -> None:
    """The name first, durability later."""
    os.rename(tmp, final)
    durable.fsync(final)
    durable.fsync(final.parent)


def delete_at_once(
    root: Path, newest: Path, keep: int, keep_every: int, damaged: set[str], log: Callable[[str], None],
    best: str = "",
) -> None:  # fmt: skip
    for old in checkpoints(root)[keep:]:
        shutil.rmtree(old)


class Anything:
    """Equal to every size and digest: a reader that does not check."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


MUTANTS: dict[str, tuple[Callable[[str], bool], int, str]] = {
    "no fsync of weights": (lambda path: path.endswith(".safetensors"), 2, "lost"),
    "no fsync of the manifest": (lambda path: path.endswith("manifest.json"), 2, "lost"),
    "no fsync of the folder": (lambda path: path.startswith(".tmp-step-") and "/" not in path, 2, "lost"),
    "no fsync of the parent": (lambda path: path == ".", 2, "lost"),
    "prune first": (lambda path: False, 1, "lost"),
    "name first": (lambda path: False, 1, "broken"),
    "files before the name": (lambda path: False, 1, "broken"),
    "no checksum": (lambda path: path.endswith(".safetensors"), 2, "corrupt"),
}


@pytest.mark.fault(6)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bugs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    skip, keep, harm = MUTANTS[mutant]
    with monkeypatch.context() as patch:
        if mutant in ("prune first", "name first"):
            patch.setattr(write_module, "publish", prune_first if mutant == "prune first" else write_in_place)
        if mutant == "files before the name":
            patch.setattr(write_module, "prune", delete_at_once)
        ops = record(tmp_path / "run", monkeypatch, skip, keep)
    if mutant == "no checksum":
        monkeypatch.setattr(manifest_module, "sha256_file", lambda path: Anything())
    assert judge(ops, tmp_path / "disk", until=harm)[harm] > 0


def test_the_record_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed whole and durable, the operations give the folder that is really there."""
    ops = record(tmp_path / "run", monkeypatch, lambda path: False, 2)
    trees = list(disks([*ops, ("fsync", 0)], random.Random(0)))
    there = {
        str(p.relative_to(tmp_path / "run")): p.read_bytes() if p.is_file() else None
        for p in (tmp_path / "run").rglob("*")
    }
    assert trees == [there]
    assert json.loads(there["step-00000004/manifest.json"] or b"")["step"] == STEPS
