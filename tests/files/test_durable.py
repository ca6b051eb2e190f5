"""What has its name is whole: the order of fsync and rename, what a failed or a second writer leaves, what
JSON is refused."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_embed_core.errors import UserError
from nemo_embed_core.files import durable, strict_json
from nemo_embed_core.files.safetensors import SafetensorsWriter, find_tensors, read_header


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every fsync and rename in order, by the name of what it touches."""
    seen: list[str] = []
    fsync = os.fsync

    def named(fd: int) -> None:
        seen.append(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))}")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", named)

    def named_move(move: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def moved(old: Path, new: Path) -> None:
            seen.append(f"{Path(old).name} -> {Path(new).name}")
            move(old, new)

        return moved

    monkeypatch.setattr(os, "rename", named_move(os.rename))
    monkeypatch.setattr(os, "replace", named_move(os.replace))
    return seen


def test_a_file_is_synced_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, calls: list[str]
) -> None:
    (tmp_path / "x").write_text("old")
    durable.write_atomically(tmp_path / "x", (b"a" * n for n in (1, 2)))
    assert (tmp_path / "x").read_bytes() == b"aaa"
    assert calls == ["fsync .x.tmp", ".x.tmp -> x", f"fsync {tmp_path.name}"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, shared: bool) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), durable.replacing(tmp_path / "x", shared) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


def test_several_writers_of_one_file_write_beside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with durable.replacing(path, shared=True) as a, durable.replacing(path, shared=True) as b:
        a.write_text("a")
        b.write_text("b")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "a")]  # the outer one ends last


def test_every_file_of_a_new_folder_is_synced_before_the_folder_has_its_name(
    tmp_path: Path, calls: list[str]
) -> None:
    with durable.new_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner/y").write_text("y")
    named = calls.index(f"{folder.name} -> out")
    assert calls[:named] == ["fsync y", "fsync inner", f"fsync {folder.name}"]
    assert calls[named + 1 :] == [f"fsync {tmp_path.name}"]


def test_of_two_that_make_one_new_folder_the_first_stays_and_the_other_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    told = f"^{out} has been written by another process meanwhile: its result stays"
    with pytest.raises(UserError, match=told), durable.new_folder(out) as late:
        (late / "x").write_text("late")
        (tmp_path / "first").mkdir()
        (tmp_path / "first/x").write_text("first")
        os.rename(tmp_path / "first", out)
    assert (out / "x").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_of_two_folders_of_one_name_the_first_wins_or_is_set_aside(tmp_path: Path) -> None:
    def publish(text: str, **how: bool) -> Path | None:
        (tmp_path / "tmp").mkdir()
        (tmp_path / "tmp/x").write_text(text)
        return durable.publish(tmp_path / "tmp", tmp_path / "final", **how)

    assert publish("first") is None and publish("second", first_wins=True) is None
    assert (tmp_path / "final/x").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["final"]
    aside = publish("third")
    assert aside is not None and (aside / "x").read_text() == "first"
    assert (tmp_path / "final/x").read_text() == "third"


@pytest.mark.parametrize(
    "content, says",
    [
        (b'{"a": {"b": 1, "b": 1}}', "x.json is not valid JSON: duplicate key 'b': keep one"),
        (b'{"a": [NaN]}', "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b'{"a": "\xe9"}', "not valid JSON: 'utf-8' codec"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "holds a JSON list, not an object"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer.*git lfs pull in"),
    ],
)
def test_a_file_that_is_no_strict_json_object_is_refused_by_name(
    tmp_path: Path, content: bytes, says: str
) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.json.*{says.removeprefix('x.json ')}"):
        strict_json.read_object(tmp_path / "x.json")
    assert strict_json.parse('{"a": [1e3, null]}') == {"a": [1000.0, None]}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.json does not exist$"):
        strict_json.read(tmp_path / "x.json")


def test_the_writer_and_the_library_read_each_other(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6).reshape(2, 3),
        "a": torch.ones(5, dtype=torch.bfloat16),
        "s": torch.tensor(2.5),
    }
    entries = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    with SafetensorsWriter(tmp_path / "ours", entries) as writer:
        for x in tensors.values():
            writer.write(x)
        told = writer.close()
    assert told == {
        "size": (tmp_path / "ours").stat().st_size,
        "sha256": durable.sha256_file(tmp_path / "ours"),
    }
    read = load_file(tmp_path / "ours")
    assert read.keys() == tensors.keys() and all(torch.equal(read[n], x) for n, x in tensors.items())
    save_file(tensors, tmp_path / "theirs")
    data = (tmp_path / "theirs").read_bytes()
    for name, (dtype, shape, start) in find_tensors(tmp_path / "theirs").items():
        size = dtype.itemsize * tensors[name].numel()
        found = torch.frombuffer(bytearray(data[start : start + size]), dtype=dtype).reshape(shape)
        assert torch.equal(found, tensors[name]), name
    (tmp_path / "theirs").write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"theirs .*cut short or changed"):
        read_header(tmp_path / "theirs")


def test_a_link_follows_its_target_and_nothing_else_is_replaced(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        durable.link_atomically(tmp_path / "model", tmp_path / name)
    assert (tmp_path / "model").resolve() == tmp_path / "second"
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine is not the link to first that it should be"):
        durable.link_atomically(tmp_path / "mine", tmp_path / "first")
