"""Boxes of a checkpoint's tensors, under any layout, and the places of its tensors for streaming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_embed_core.checkpoint.hf_reader import Stored
from nemo_embed_core.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    model_from_dict,
    overlap,
    read_manifest,
)
from nemo_embed_core.files.safetensors import DTYPES, dtype_name
from nemo_embed_core.model.spec import hf_rows, parameter_shapes
from nemo_embed_core.parallel.boxes import Box


class Reader:
    """Boxes of a verified checkpoint's tensors, reading only the bytes they need."""

    def __init__(self, folder: Path, manifest: dict[str, Any] | None = None):
        self.folder = folder
        self.manifest = manifest or read_manifest(folder)
        self._open: dict[str, Any] = {}

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Every expected tensor is there with its shape, and nothing else."""
        found = {n: tuple(t["shape"]) for n, t in self.manifest["tensors"].items()}
        problems = [f"{n} is missing" for n in expected if n not in found]
        problems += [f"{n} is not part of this model" for n in found if n not in expected]
        others = [(n, shape) for n, shape in expected.items() if found.get(n, shape) != shape]
        problems += [f"{n} has shape {found[n]}, expected {shape}" for n, shape in others]
        if problems:
            more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
            raise CheckpointError(f"{self.folder} does not fit this model: {'; '.join(problems[:10])}{more}")

    def stored(self) -> Iterator[tuple[str, Stored]]:
        """(Hugging Face name, where rows of it stand), in the order of our parameters."""
        model = model_from_dict(self.manifest["model"], self.folder / MANIFEST)
        for parameter in parameter_shapes(model):
            row = 0  # of the parameter
            for name, start, count in hf_rows(parameter, model):
                for piece in self.manifest["pieces"][parameter]:
                    (offset, *columns), size = piece["offset"], tuple(piece["size"])
                    low, high = max(row, offset), min(row + count, offset + size[0])
                    if low < high:
                        at = (start + low - row, low - offset, columns[0] if columns else 0)
                        file, digest = piece["file"], self.manifest["files"][piece["file"]]["sha256"]
                        yield name, Stored(self.folder / file, parameter, size, high - low, *at, digest)
                row += count

    def read_box(self, name: str, box: Box) -> Tensor:
        """The block of the global tensor `name`, joined from the pieces that hold it."""
        dtype = getattr(torch, self.manifest["tensors"][name]["dtype"])
        out = torch.empty(box[1], dtype=dtype)
        filled = 0
        for piece in self.manifest["pieces"][name]:
            common = overlap(box, (piece["offset"], piece["size"]))
            if common is None:
                continue
            file = piece["file"]
            source = [slice(o - p, o - p + s) for o, s, p in zip(*common, piece["offset"], strict=True)]
            target = [slice(o - b, o - b + s) for o, s, b in zip(*common, box[0], strict=True)]
            path = self.folder / file
            try:
                if file not in self._open:
                    self._open[file] = safe_open(path, framework="pt")
                stored = self._open[file].get_slice(name)
                have, kind = (stored.get_dtype(), stored.get_shape()), DTYPES[dtype_name(dtype)]
                if have != (kind, piece["size"]):  # a smaller one would be broadcast
                    said = f"the manifest says {kind} {piece['size']}"
                    raise CheckpointError(f"{path}: {name} is {have[0]} {have[1]}, {said}")
                out[tuple(target)] = stored[tuple(source)]
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: {name}: {error}") from None
            filled += torch.Size(common[1]).numel()
        if filled != out.numel():
            raise CheckpointError(
                f"{self.folder}: {name} has {filled} of the {out.numel()} elements asked for"
            )
        return out
