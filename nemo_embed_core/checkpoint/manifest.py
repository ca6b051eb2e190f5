"""manifest.json of a checkpoint: what it must hold, its digest, and whether its files are what it says.

Names of tensors are our parameters', and STATE/PARAMETER for what an optimizer keeps of each
(train/optim.py). A *box* is one contiguous block of a tensor's global shape as (offset, size); a *piece* is a
box in a file of one rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemo_embed_core.config import ModelConfig, RopeScaling
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import sha256_file
from nemo_embed_core.files.safetensors import DTYPES
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.options import short
from nemo_embed_core.parallel.boxes import Box

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROJECTION = (
    "teacher_projection"  # no parameter of the model (train/learned.py): states alone, "value" is one
)


def is_state(name: str) -> bool:
    """Whether a tensor is an optimizer's and no weight."""
    return "/" in name


def state_name(state: str, parameter: str) -> str:
    return f"{state}/{parameter}"


def parameter_of(name: str) -> str:
    """The parameter that a tensor is, or is the state of."""
    return name.rsplit("/", 1)[-1]


class CheckpointError(UserError):
    """A checkpoint that is damaged, incomplete or of another model: names the file and the fault."""


_COUNT = (int, "a whole number >= 0")
_ADAPTER = {"rank": _COUNT, "alpha": float, "targets": [str], "base": str, "files": {str: str}}
_BLOCK = {"file": str, "offset": [_COUNT], "size": [_COUNT]}
# What a reader relies on, so that it may index without looking: a type, {field: ...}, {str: ...} for any
# name, [...].
_MANIFEST: dict[str, Any] = {
    "step": _COUNT,
    "model": dict,
    "config": {
        "seed": int,
        "global_batch_size": int,
        "init_from": str,
        "data": {
            "num_hard_negatives": int,
            "query_max_length": int,
            "document_max_length": int,
            "datasets": [dict],
        },
    },
    "export_dtype": str,
    "ledger": str,
    "data_digest": str,
    "files": {str: {"size": _COUNT, "sha256": str}},
    "tensors": {str: {"dtype": str, "shape": [_COUNT]}},
    "pieces": {str: [_BLOCK]},
}
# The same of fields that older checkpoints, or runs without them, do not have.
_OPTIONAL: dict[str, Any] = {
    "overrides": [dict],
    "eval": {},
    "adapter": _ADAPTER,  # LoRA's (checkpoint/adapter.py)
    "skipped": _COUNT,
    "recent_losses": [float],
    "drawn": {str: [_COUNT]},
    "temperature": {"log": float, "step": float, "exp_avg": float, "exp_avg_sq": float},
    # The teacher of a learned projection, which is among the tensors as STATE/teacher_projection.
    "teacher_vectors": {"models": [str], "columns": _COUNT, "updates": _COUNT},
}


def _digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of everything in the manifest but its own digest."""
    rest = {k: v for k, v in manifest.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(manifest: Mapping[str, Any]) -> bytes:
    """manifest.json with the digest that read_manifest asks for: one field a line."""
    # No indent: that encoder is Python and would hold the interpreter for seconds, while training goes on.
    fields = {**manifest, "digest": _digest(manifest)}.items()
    return ("{" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in fields) + "}\n").encode()


def _conform(value: Any, schema: Any, where: str) -> None:
    """CheckpointError unless the JSON value has the types of the schema; fields beyond it are allowed."""
    if isinstance(schema, tuple):
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{where} is {short(value)}, not {schema[1]}; the checkpoint is damaged")
        return
    kind: type = schema if isinstance(schema, type) else type(schema)
    if type(value) is not kind:
        raise CheckpointError(
            f"{where} is {short(value)}, not of type {kind.__name__}; the checkpoint is damaged"
        )
    fields: Any = value
    if isinstance(schema, list):
        for i, item in enumerate(fields):
            _conform(item, schema[0], f"{where}[{i}]")
    elif isinstance(schema, dict) and str in schema:
        for name, item in fields.items():
            _conform(item, schema[str], f"{where}.{name}")
    elif isinstance(schema, dict):
        for key, item in schema.items():
            if key not in fields:
                raise CheckpointError(f"{where}: field {key!r} is missing; the checkpoint is damaged")
            _conform(fields[key], item, f"{where}: {key}")


def model_from_dict(values: dict[str, Any], path: Path | str = MANIFEST) -> ModelConfig:
    """ModelConfig from the manifest."""
    scaling = values.get("rope_scaling")
    try:
        return ModelConfig(**{**values, "rope_scaling": RopeScaling(**scaling) if scaling else None})
    except (TypeError, UserError) as error:
        raise CheckpointError(f"{path}: its model does not fit this version: {error}") from None


def folder_name(step: int) -> str:
    """Of a checkpoint in its run's folder."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The step that a folder's name says; -1 where it says none."""
    match = re.fullmatch(r"step-(\d{8})", name)
    return int(match[1]) if match else -1


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json, checked: no reader leaves the folder or meets a missing field or another type."""
    path = folder / MANIFEST
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise CheckpointError(f"{path} is not a regular file")
    manifest = read_object(path)
    if manifest.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {short(manifest.get('format'))}, this version reads {FORMAT_VERSION}; "
            "merge it with the version that wrote it"
        )
    if manifest.get("digest") != _digest(manifest):
        raise CheckpointError(
            f"{path}: its digest differs from what it holds; the file was changed or damaged"
        )
    _conform(manifest, _MANIFEST, str(path))
    manifest = {"overrides": [], "eval": {}, **manifest}
    for name, schema in _OPTIONAL.items():
        if name in manifest:
            _conform(manifest[name], schema, f"{path}: {name}")
    if "best" in manifest["eval"]:
        _conform(manifest["eval"]["best"], {"step": _COUNT, "value": float}, f"{path}: eval: best")
    if step_of(folder.name) not in (-1, manifest["step"]):
        name = folder_name(manifest["step"])
        raise CheckpointError(
            f"{folder} holds step {manifest['step']}: name it {name}, or another way than "
            f"{re.sub('[0-9]', 'N', name)}"
        )
    for name in manifest["files"]:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
            raise CheckpointError(f"{path}: {short(name)} is not a plain file name")
    if manifest["export_dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path}: export_dtype {short(manifest['export_dtype'])} is not a floating type"
        )
    if manifest["pieces"].keys() != manifest["tensors"].keys():
        name = next(iter(manifest["pieces"].keys() ^ manifest["tensors"].keys()))
        raise CheckpointError(f"{path}: {short(name)} is among the tensors or the pieces, but not both")
    model = model_from_dict(manifest["model"], path)
    if model.num_hidden_layers > len(manifest["tensors"]):
        raise CheckpointError(
            f"{path}: {model.num_hidden_layers} layers in {len(manifest['tensors'])} tensors"
        )
    _check_pieces(path, manifest)
    return manifest


def _check_pieces(path: Path, manifest: Mapping[str, Any]) -> None:
    for name, tensor in manifest["tensors"].items():
        if tensor["dtype"] not in ("float32", "float64"):
            raise CheckpointError(
                f"{path}: {name} has dtype {tensor['dtype']!r}; weights and moments are float32"
            )
        pieces = manifest["pieces"][name]
        if len({piece["file"] for piece in pieces}) != len(pieces):
            raise CheckpointError(f"{path}: two pieces of {name} are in the same file")
        for piece in pieces:
            if piece["file"] not in manifest["files"]:  # the verified ones, so never a path out of the folder
                raise CheckpointError(f"{path}: {name} is in {piece['file']!r}, which is not among its files")
            if not len(piece["offset"]) == len(piece["size"]) == len(tensor["shape"]):
                raise CheckpointError(
                    f"{path}: a piece of {name} has {len(piece['offset'])} offsets and {len(piece['size'])} "
                    f"sizes, the tensor has {len(tensor['shape'])} dims"
                )


def verify_checkpoint(folder: Path, weights_only: bool = False, hashed: bool = True) -> dict[str, Any]:
    """The manifest, when every file has its size and sha256 and every tensor is covered exactly once.

    weights_only: files that hold nothing but moments are not looked at; they may be missing.
    hashed=False: the caller compares the sha256 of files with weights itself (`check_digest`).
    """
    manifest = read_manifest(folder)
    tensors = {n: t for n, t in manifest["tensors"].items() if not (weights_only and is_state(n))}
    wanted, named = (
        {piece["file"] for name in names for piece in manifest["pieces"][name]}
        for names in (tensors, manifest["tensors"])
    )
    unwanted = named - wanted

    def check(name: str) -> None:
        path, expected = folder / name, manifest["files"][name]
        if not path.is_file() or path.is_symlink():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["size"]:
            have = path.stat().st_size
            raise CheckpointError(f"{path} has {have} bytes, the manifest says {expected['size']}")
        if hashed or not name.startswith(("model-", "optim-")):  # a tokenizer is small
            check_digest(path, expected["sha256"])

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        list(pool.map(check, [name for name in manifest["files"] if name not in unwanted]))
    for name, tensor in tensors.items():
        check_coverage(folder, name, tensor["shape"], manifest["pieces"][name])
    return manifest


def check_digest(path: Path, sha256: str) -> None:
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if digest != sha256:
        raise CheckpointError(f"{path}: sha256 differs from the manifest; the file was changed or damaged")


def check_coverage(folder: Path, name: str, shape: list[int], pieces: list[dict[str, Any]]) -> None:
    covered = 0
    before: list[dict[str, Any]] = []  # of the pieces so far, those that reach into the rows of the next one
    for piece in sorted(pieces, key=lambda p: p["offset"]):
        box = (piece["offset"], piece["size"])
        covered += math.prod(piece["size"])
        if any(o < 0 or o + s > full for o, s, full in zip(*box, shape, strict=True)):
            raise CheckpointError(
                f"{folder}: a piece of {name} in {piece['file']} lies outside its shape {shape}"
            )
        before = [b for b in before if not shape or b["offset"][0] + b["size"][0] > piece["offset"][0]]
        for other in before:
            if overlap(box, (other["offset"], other["size"])) is not None:
                raise CheckpointError(
                    f"{folder}: {name} is stored twice, in {piece['file']} and {other['file']}"
                )
        before.append(piece)
    if covered != math.prod(shape):
        raise CheckpointError(f"{folder}: {name} has {covered} of {math.prod(shape)} elements")


def overlap(a: tuple[Iterable[int], Iterable[int]], b: tuple[Iterable[int], Iterable[int]]) -> Box | None:
    """The common block of two boxes, or None."""
    starts, sizes = [], []
    for (ao, asize), (bo, bsize) in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True):
        start, stop = max(ao, bo), min(ao + asize, bo + bsize)
        if start >= stop:
            return None
        starts.append(start)
        sizes.append(stop - start)
    return tuple(starts), tuple(sizes)
