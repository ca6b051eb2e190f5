"""A valid folder with ONE thing wrong, a thousand times: a clear error of one paragraph, or exactly the right
tensors.

Random bytes never get past the first check, so every case starts from a folder that loads. Where a digest
would stop a change at the door, half of the cases renew the digests, as an attacker would: the checks behind
it must hold as well. Bugs planted in the readers show that the cases have teeth.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from tiny import manifest_meta, to_hf

from nemo_embed_core.checkpoint import hf_folder, hf_reader
from nemo_embed_core.checkpoint import manifest as manifest_module
from nemo_embed_core.checkpoint import reader as reader_module
from nemo_embed_core.checkpoint import write as write_module
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.files import safetensors as one_file
from nemo_embed_core.files import strict_json
from nemo_embed_core.model import hf_config, spec
from nemo_embed_core.options import to_dict
from nemo_embed_core.parallel.boxes import local_box
from nemo_embed_core.train.optim import STATE

CASES = 1000
MODEL = ModelConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)
SHAPES = spec.parameter_shapes(MODEL)
PREFIXES = tuple(f"{state}/" for state in STATE)
META = manifest_meta(to_dict(MODEL))


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        prefix + name: torch.randn(shape, generator=generator)
        for prefix in ("", *PREFIXES)
        for name, shape in SHAPES.items()
    }


TRUTH = tensors()


def write_checkpoint(root: Path) -> Path:
    """Two ranks, as threads, each with half of every tensor's rows."""
    barrier, slots = Barrier(2), [None, None]

    def rank(r: int) -> None:
        def gather(value: Any) -> list[Any]:
            slots[r] = value
            barrier.wait()
            values = list(slots)
            barrier.wait()
            return values

        pieces = {}
        for name, tensor in TRUTH.items():
            offset, size = local_box(tuple(tensor.shape), None, 0, 1, r, 2)
            part = tensor[offset[0] : offset[0] + size[0]]
            pieces[name] = write_module.Piece(tuple(tensor.shape), (offset, size), part)
        write_module.save_checkpoint(
            root,
            7,
            pieces,
            rank=r,
            world_size=2,
            meta=META,
            extra_files={"tokenizer.json": b"{}"},
            keep=2,
            gather=gather,
        )

    root.mkdir()
    threads = [Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return root / "step-00000007"


def write_hf(folder: Path, num_shards: int) -> Path:
    folder.mkdir()
    weights: dict[str, torch.Tensor] = {}
    for name in SHAPES:
        weights.update(to_hf(name, TRUTH[name], MODEL))
    if num_shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {}
    for i in range(num_shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(list(weights.items())[i::num_shards])
        save_file(part, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1234}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# ------------------------------------------------------------------------------------------ one thing wrong


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every path into a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def spoil_value(value: Any, rng: random.Random, outside: Path) -> Any:
    """The JSON value with one place changed. Places of every depth are equally likely, though the deep ones
    are many."""
    value = json.loads(json.dumps(value))
    found = list(places(value))
    depth = rng.choice(sorted({len(path) for path in found}))
    *parents, last = rng.choice([path for path in found if len(path) == depth])
    holder = value
    for key in parents:
        holder = holder[key]
    old, names = (
        holder[last],
        [str(outside), "../" + outside.name, "/etc/passwd", "..", ".", "", "a/b", "\x00", ".hidden"],
    )
    how = rng.choice(["other", "near", "near", "path", "drop", "rename", "add", "double"])
    likely: dict[Any, list] = {  # what would fit here in the eyes of a careless reader
        "file": [*value.get("files", {}), *names[:2]],
        "dtype": ["I32", "F16", "F64", "float64"],
        "shape": [old[::-1], [*old, 1], [1, *old]] if isinstance(old, list) else [],
    }
    if likely.get(last) and rng.random() < 0.7:
        holder[last] = rng.choice(likely[last])
    elif how == "other":
        holder[last] = rng.choice(
            [None, True, 0, 1, -1, 1.5, 10**30, 2**63, "x", "", [], {}, [[[]]], {"a": 1}, 1e999]
        )
    elif how == "near" and isinstance(old, int):
        holder[last] = rng.choice([old + 1, old - 1, -old, old * 2, float(old), str(old), old + 2**32])
    elif how == "near" and isinstance(old, str) and old:
        i = rng.randrange(len(old))
        holder[last] = old[:i] + chr(ord(old[i]) ^ (1 << rng.randrange(6))) + old[i + 1 :]
    elif how == "near" and isinstance(old, list):
        rng.shuffle(old)
    elif how == "path" and isinstance(holder, dict) and rng.random() < 0.5:
        holder[rng.choice([*names, *names[:2] * 4])] = holder.pop(last)
    elif how == "path":
        holder[last] = rng.choice(names)
    elif how == "drop":
        del holder[last]
    elif how == "rename" and isinstance(holder, dict):
        holder[last + "x"] = holder.pop(last)
    elif how == "add" and isinstance(old, dict):
        old[rng.choice(names)] = rng.choice(list(old.values()) or [0])
    elif how == "double" and isinstance(holder, list):
        holder.append(holder[last])
    elif how == "double" and isinstance(old, str) and isinstance(holder, dict):
        holder[last] = rng.choice([item for item in holder.values() if isinstance(item, str)])
    return value


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """JSON text with one thing wrong that a JSON value cannot say."""
    how, i = (
        rng.choice(["flip", "flip", "cut", "twice", "nan", "deep", "digits", "latin", "bom", "nothing"]),
        0,
    )
    if how == "flip":
        i = rng.randrange(len(data))
        return data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :]
    if how == "cut":
        return data[: rng.randrange(len(data))]
    if how == "nothing":
        return data
    if how == "bom":
        return b"\xef\xbb\xbf" + data
    if how == "latin":
        return data.replace(b'"', b'"\xe9', 1)
    if how == "twice":  # the first entry of some object again, before all others
        i = rng.choice(
            [j for j in range(len(data)) if data[j : j + 1] == b"{" and data[j + 1 :].lstrip()[:1] == b'"']
        )
        entry = data[i + 1 :].lstrip().split(b":")[0]
        return (
            data[: i + 1]
            + entry
            + b": "
            + rng.choice([b"0", b'"../secret.safetensors"', b"{}"])
            + b","
            + data[i + 1 :]
        )
    colon = rng.choice([j for j in range(len(data)) if data[j : j + 1] == b":"])
    literal = {"nan": rng.choice([b"NaN", b"-Infinity"]), "deep": b"[" * 100_000, "digits": b"9" * 5000}[how]
    return data[: colon + 1] + literal + b"," + data[colon + 1 :]


def spoil_entry(path: Path, rng: random.Random, outside: Path) -> None:
    """Something else stands where the file stood."""
    how = rng.choice(["symlink", "gone", "folder", "empty"])
    data = path.read_bytes()
    path.unlink()
    if how == "symlink":
        target = outside.with_name("copy-" + path.name)  # a file that would do, but it lies elsewhere
        target.write_bytes(data)
        path.symlink_to(target)
    elif how == "folder":
        path.mkdir()
    elif how == "empty":
        path.write_bytes(b"")


def spoil_safetensors(data: bytes, rng: random.Random, outside: Path) -> bytes:
    """The header changed in one place, or its length, or the file cut."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    how = rng.choice(["value", "value", "value", "bytes", "length", "cut", "tail"])
    if how == "length":
        wrong = rng.choice([0, 1, size - 1, size + 1, size + 8, 2**31, 2**63, 2**64 - 1])
        return wrong.to_bytes(8, "little") + header + body
    if how == "cut":
        return data[: rng.randrange(len(data))]
    if how == "tail":
        return data + b"\x00" * rng.randrange(1, 9)
    if how == "value":
        header = json.dumps(spoil_value(json.loads(header), rng, outside)).encode()
    else:
        header = spoil_bytes(header, rng)
    return len(header).to_bytes(8, "little") + header + body


# ------------------------------------------------------------------------------------------ what may happen

_opened: list[str] | None = None


def _audit(event: str, args: tuple) -> None:
    if event == "open" and _opened is not None and isinstance(args[0], str | bytes):
        _opened.append(os.fsdecode(args[0]))


sys.addaudithook(_audit)  # open, io.open and os.open; safetensors opens in Rust and is wrapped


def watched_safe_open(path: Any, *args: Any, **kwargs: Any) -> Any:
    if _opened is not None:
        _opened.append(str(path))
    return _safe_open(path, *args, **kwargs)


_safe_open = safetensors.safe_open


@pytest.fixture(autouse=True)
def watch(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reader_module, hf_reader):
        monkeypatch.setattr(module, "safe_open", watched_safe_open)


def load_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    manifest = manifest_module.verify_checkpoint(folder)
    model = manifest_module.model_from_dict(manifest["model"])
    reader = reader_module.Reader(folder, manifest)
    shapes = spec.parameter_shapes(model)
    reader.check({p + n: s for n, s in shapes.items() for p in ("", *PREFIXES)})
    return {
        p + n: reader.read_box(p + n, ((0,) * len(s), s)) for n, s in shapes.items() for p in ("", *PREFIXES)
    }


def load_hf(folder: Path) -> dict[str, torch.Tensor]:
    reader = hf_reader.HFReader(folder, MODEL)
    return {n: reader.read_box(n, ((0,) * len(s), s)) for n, s in SHAPES.items()}


def judge(folder: Path, load: Callable[[Path], dict[str, torch.Tensor]], base: Path) -> tuple[str, str]:
    """("ok" | "error", message), or ("wrong", why)."""
    global _opened
    _opened = []
    try:
        try:
            got = load(folder)
        finally:
            opened, _opened = _opened, None
    except UserError as error:
        text = str(error)
        if "\n" in text or len(text) > 700 + len(str(folder)):
            return "wrong", f"not one paragraph: {text[:2000]}"
        if str(folder) not in text:
            return "wrong", f"names no file: {text}"
        outcome = ("error", text)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    else:
        for name, tensor in got.items():
            if tensor.dtype != torch.float32 or not torch.equal(tensor, TRUTH[name]):
                return "wrong", f"{name} is loaded with other values"
        outcome = ("ok", "")
    for path in opened:
        real = os.path.realpath(path)
        inside = real == str(folder) or real.startswith(f"{folder}/")
        if not inside and (real.startswith(str(base)) or real.startswith("/etc")):
            return "wrong", f"opened {real}"
    return outcome


class Target:
    """A valid folder, and `spoil`: break one thing of it and tell the file that changed."""

    def __init__(self, base: Path, kind: str):
        base.mkdir(exist_ok=True)
        self.base, self.kind = base, kind
        self.sealed = True  # the digest of the manifest is right: nothing tells a change of the step, say
        self.outside = base / "secret.safetensors"
        self.outside.write_bytes(b"{}")  # as long as tokenizer.json
        self.load = load_checkpoint if kind in ("manifest", "shard") else load_hf
        if kind in ("manifest", "shard"):
            self.folder = write_checkpoint(base / "run")
        else:
            self.folder = write_hf(base / "hf", 1 if kind == "hf" else 3)
        self.files = {p.name: p.read_bytes() for p in self.folder.iterdir()}

    def restore(self) -> None:
        for path in self.folder.iterdir():
            if path.name not in self.files or path.is_symlink() or not path.is_file():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name, data in self.files.items():
            if not (self.folder / name).exists() or (self.folder / name).read_bytes() != data:
                (self.folder / name).write_bytes(data)

    def changed(self, name: str) -> bool:
        return json.loads((self.folder / name).read_bytes()) != json.loads(self.files[name])

    def spoil(self, seed: int) -> None:
        rng = random.Random(f"{self.kind} {seed}")
        shards = sorted(n for n in self.files if n.endswith(".safetensors"))
        main = {"manifest": "manifest.json", "index": "model.safetensors.index.json"}.get(
            self.kind, rng.choice(shards)
        )
        path, data = self.folder / main, self.files[main]
        if rng.random() < 0.08:
            spoil_entry(self.folder / rng.choice(sorted(self.files)), rng, self.outside)
        elif self.kind == "manifest":
            if rng.random() < 0.3:
                path.write_bytes(spoil_bytes(data, rng))
            else:
                value = spoil_value(json.loads(data), rng, self.outside)
                self.sealed = rng.random() < 0.8
                path.write_bytes(manifest_module.seal(value) if self.sealed else json.dumps(value).encode())
        elif self.kind == "index":
            text = rng.random() < 0.3
            path.write_bytes(
                spoil_bytes(data, rng)
                if text
                else json.dumps(spoil_value(json.loads(data), rng, self.outside)).encode()
            )
        else:
            path.write_bytes(spoil_safetensors(data, rng, self.outside))
            if self.kind == "shard" and rng.random() < 0.2:  # any bit: only the digest can tell
                i = rng.randrange(len(data))
                path.write_bytes(data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :])
            elif self.kind == "shard":
                manifest = json.loads(self.files["manifest.json"])
                entry = {"size": path.stat().st_size, "sha256": manifest_module.sha256_file(path)}
                manifest["files"][main] = entry
                (self.folder / "manifest.json").write_bytes(manifest_module.seal(manifest))

    def run(self, cases: Iterable[int], stop: bool = False) -> tuple[Counter, list[str]]:
        counts, wrong = Counter(), []
        for seed in cases:
            self.sealed = True
            self.spoil(seed)
            outcome, text = judge(self.folder, self.load, self.base)
            if outcome == "ok" and not self.sealed and self.changed("manifest.json"):
                outcome, text = "wrong", "a changed manifest is accepted"
            self.restore()
            counts[outcome] += 1
            if outcome == "wrong":
                wrong.append(f"case {seed}: {text}")
                if stop:
                    break
        return counts, wrong


KINDS = ["manifest", "shard", "hf", "index"]


@pytest.fixture
def base() -> Iterator[Path]:
    """In memory where that is possible: tens of thousands of small files are written."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as folder:
        yield Path(folder).resolve()


@pytest.mark.parametrize("cases", [200, pytest.param(CASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_broken_folders(base: Path, kind: str, cases: int) -> None:
    target = Target(base, kind)
    assert judge(target.folder, target.load, target.base) == ("ok", ""), "the folder is valid to begin with"
    counts, wrong = target.run(range(cases))
    assert not wrong, f"{len(wrong)} of {cases}:\n" + "\n".join(wrong[:10])
    assert counts["error"] > 0.5 * cases and counts["ok"] > 0.01 * cases, counts


# -------------------------------------------------------------------------------- bugs planted in the readers

# kind, module, what stands there, what a bug would put there
PLANTED = [
    ("manifest", manifest_module, 'if manifest.get("digest") != _digest(manifest)', "if False"),
    ("manifest", manifest_module, "    _conform(manifest, _MANIFEST, str(path))\n", ""),
    ("manifest", manifest_module, 'if not re.fullmatch(r"[A-Za-z0-9_][\\w.-]*", name)', "if False"),
    ("manifest", manifest_module, 'if len({piece["file"] for piece in pieces}) != len(pieces)', "if False"),
    ("manifest", manifest_module, 'if piece["file"] not in manifest["files"]', "if False"),
    ("manifest", manifest_module, 'if manifest["pieces"].keys() != manifest["tensors"].keys()', "if False"),
    ("manifest", manifest_module, 'if tensor["dtype"] not in ("float32", "float64")', "if False"),
    (
        "manifest",
        manifest_module,
        'except (TypeError, UserError) as error:\n        raise CheckpointError(f"{path}: its',
        'except TabError as error:\n        raise CheckpointError(f"{path}: its',
    ),
    ("manifest", manifest_module, "if not path.is_file() or path.is_symlink()", "if False"),
    ("manifest", manifest_module, "if path.is_symlink() or (path.exists()", "if False and (path.exists()"),
    ("manifest", strict_json, "ValueError, RecursionError", "ValueError"),
    ("manifest", strict_json, "UnicodeDecodeError, ValueError, ", ""),
    ("shard", manifest_module, "    if digest != sha256", "    if False"),
    ("shard", reader_module, 'if have != (kind, piece["size"])', "if False"),
    ("shard", reader_module, "except (SafetensorError, OSError) as error", "except OSError as error"),
    ("hf", hf_folder, "if target.parent not in allowed", "if False"),
    ("hf", one_file, "except (ValueError, LookupError, TypeError", "except (LookupError, TypeError"),
    ("hf", hf_reader, "except (SafetensorError, OSError) as error", "except OSError as error"),
    ("hf", hf_reader, 'elif have.get_dtype() not in ("F32", "BF16", "F16", "F64")', "elif False"),
    ("hf", hf_reader, "if tuple(have.get_shape()) != shape", "if False"),
    (
        "index",
        hf_folder,
        'plain = isinstance(file, str) and re.fullmatch(r"[A-Za-z0-9_][\\w.-]*", file)',
        "plain = True",
    ),
    ("index", hf_folder, "if not isinstance(where, dict)", "if not where"),
]

# The case that shows each, tried before all others: it saves minutes and decides nothing.
FIRST = [114, 0, 949, 67, 10, 63, 18, 251, 55, 483, 5, 3, 14, 36, 0, 0, 0, 11, 2, 32, 115, 3]


def plant(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType, old: str, new: str) -> None:
    """Run the module's source with `old` replaced, and let everybody who imported from it have what comes
    out."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1, f"{source.count(old)} x {old!r} in {module.__file__}"
    broken = types.ModuleType(module.__name__)
    broken.__file__ = module.__file__
    monkeypatch.setitem(sys.modules, module.__name__, broken)
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), broken.__dict__)
    for user in (manifest_module, reader_module, hf_reader, hf_config, hf_folder, one_file):
        for name, value in list(vars(user).items()):
            if getattr(value, "__module__", None) == module.__name__ and hasattr(broken, name):
                monkeypatch.setattr(user, name, getattr(broken, name))
    if hasattr(broken, "safe_open"):
        monkeypatch.setattr(broken, "safe_open", watched_safe_open)


@pytest.mark.parametrize(
    "i, kind, module, old, new",
    [(i, *planted) for i, planted in enumerate(PLANTED)],
    ids=[f"{k}: {old.strip()[:50]}" for k, _, old, _ in PLANTED],
)
def test_planted_bugs_are_found(
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    i: int,
    kind: str,
    module: types.ModuleType,
    old: str,
    new: str,
) -> None:
    target = Target(base, kind)
    plant(monkeypatch, module, old, new)
    assert judge(target.folder, target.load, target.base) == ("ok", ""), "the bug breaks the valid folder too"
    assert target.run([FIRST[i], *range(CASES)], stop=True)[1]


def test_what_the_cases_cannot_show(base: Path) -> None:
    """A key that stands twice with one meaning; a pipe in place of a file, on which a careless reader waits
    for ever."""
    for kind, main in (("manifest", "manifest.json"), ("index", "model.safetensors.index.json")):
        target = Target(base / kind, kind)
        path = target.folder / main
        path.write_bytes(target.files[main].replace(b"{", b'{"step": 7,"step": 7,', 1))
        with pytest.raises(UserError, match=f"{main} is not valid JSON: duplicate key 'step'"):
            target.load(target.folder)
        target.restore()
        for name in target.files:
            (target.folder / name).unlink()
            os.mkfifo(target.folder / name)
            with pytest.raises(UserError, match=name.removesuffix(".index.json")):
                target.load(target.folder)
            target.restore()


def test_weights_alone_are_enough_for_inference(base: Path) -> None:
    """Moments may be damaged or missing: they are not opened. Weights may not."""
    global _opened
    folder = write_checkpoint(base / "run")
    for i, name in enumerate(sorted(p.name for p in folder.glob("optim-*"))):
        (folder / name).unlink() if i else (folder / name).write_bytes(b"")
    _opened = []
    try:
        manifest_module.verify_checkpoint(folder, weights_only=True)
        reader = reader_module.Reader(folder)
        for name, shape in SHAPES.items():
            assert torch.equal(reader.read_box(name, ((0,) * len(shape), shape)), TRUTH[name])
    finally:
        opened, _opened = _opened, None
    assert any("model-" in path for path in opened) and not any("optim-" in path for path in opened)
    with pytest.raises(UserError, match=r"optim-00000-of-00002\.safetensors has 0 bytes"):
        manifest_module.verify_checkpoint(folder)
    data = bytearray((folder / "model-00001-of-00002.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model-00001-of-00002.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors: sha256 differs"):
        manifest_module.verify_checkpoint(folder, weights_only=True)


@pytest.mark.parametrize("kind", ["hf", "index"])
def test_the_cache_of_hugging_face_is_read_through_its_links(base: Path, kind: str) -> None:
    """snapshots/REVISION/NAME links to blobs/; a link to anywhere else is refused."""
    target = Target(base, kind)
    snapshot, blobs = base / "models--a--b" / "snapshots" / "abc", base / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in target.files:
        shutil.copy(target.folder / name, blobs / name.upper())
        (snapshot / name).symlink_to(Path("../../blobs") / name.upper())
    got = load_hf(snapshot)
    assert all(torch.equal(got[name], TRUTH[name]) for name in SHAPES)
    name = sorted(target.files)[0]
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(target.folder / name)
    with pytest.raises(UserError, match=r"is a link to .* outside of"):
        load_hf(snapshot)
