"""Hugging Face's tensors as boxes of our parameters, by the table of model/spec.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_embed_core.checkpoint.hf_folder import inside, tensors
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import sha256_file
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.model.spec import hf_rows, hf_shapes
from nemo_embed_core.parallel.boxes import Box


class Stored(NamedTuple):
    """Where rows of a Hugging Face tensor x stand: file[name] has `shape` = [R, C] or [R], and

    x[first : first + rows, column : column + C] = file[name][skip : skip + rows]
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    rows: int
    first: int = 0
    skip: int = 0
    column: int = 0
    sha256: str = ""  # of the file, where the source says it


class HFReader:
    """The weights of a Hugging Face Llama folder: checked by name and shape, then read box by box.

    Which files and names count is hf_folder.py's to say. `bytes_read` counts what was read: a tp rank reads
    only its own slices.
    """

    manifest = None  # a checkpoint of ours has one

    def __init__(self, folder: Path, config: ModelConfig, where: Mapping[str, tuple[str, str]] | None = None):
        self.folder, self.config = folder, config
        self.bytes_read = 0
        self._open: dict[str, Any] = {}
        if where is None:
            where, _ = tensors(
                folder, read_object(file) if (file := folder / "config.json").is_file() else {}
            )
        self._where = where  # name without prefix -> (name in the file, file)
        if config.num_hidden_layers > len(where):
            raise UserError(
                f"{folder}: config.json says {config.num_hidden_layers} layers, there are {len(where)} "
                "tensors"
            )
        self._check()

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the weights."""
        kinds = {str(self._slice(name).get_dtype()) for name in hf_shapes(self.config)}
        order = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        return next(dtype for kind, dtype in order.items() if kind in kinds)

    def sha256(self) -> dict[str, str]:
        """Of each weight file, read wholly."""
        return {f: sha256_file(self.folder / f) for f in sorted({file for _, file in self._where.values()})}

    def stored(self) -> Iterator[tuple[str, Stored]]:
        """(Hugging Face name, where it stands) of every tensor."""
        shapes = hf_shapes(self.config)
        for name, (stored, file) in self._where.items():
            yield name, Stored(self.folder / file, stored, shapes[name], shapes[name][0])

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(inside(self.folder, self.folder / name), framework="pt")
        return self._open[name]

    def _check(self) -> None:
        expected, found = hf_shapes(self.config), set(self._where)
        problems = [f"{n} is missing" for n in expected if n not in found]
        problems += [f"{n} is not part of this model" for n in sorted(found - set(expected))]
        for name, shape in expected.items():
            if name in found:
                have = self._slice(name)
                if tuple(have.get_shape()) != shape:
                    problems.append(f"{name} has shape {tuple(have.get_shape())}, config.json says {shape}")
                elif have.get_dtype() not in ("F32", "BF16", "F16", "F64"):
                    problems.append(f"{name} has dtype {have.get_dtype()}, which is not a floating type")
        if problems:
            more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
            raise UserError(
                f"{self.folder} does not match its config.json: " + "; ".join(problems[:10]) + more
            )

    def _slice(self, hf_name: str) -> Any:
        name, file = self._where[hf_name]
        try:
            return self._file(file).get_slice(name)
        except (SafetensorError, OSError) as error:
            what = f"{self.folder / file} is not a readable safetensors file"
            raise UserError(f"{what}: {name}: {error}") from None

    def read_box(self, name: str, box: Box) -> Tensor:
        """The box of our parameter, reading only its bytes; keeps the file's dtype."""
        (first, *rest_offset), (count, *rest_size) = box
        parts, row = [], 0
        for hf_name, start, rows in hf_rows(name, self.config):
            lo, hi = max(first, row), min(first + count, row + rows)
            if lo < hi:
                source = self._slice(hf_name)
                a, b = start + lo - row, start + hi - row
                columns = [slice(at, at + size) for at, size in zip(rest_offset, rest_size, strict=True)]
                part = source[(slice(a, b), *columns)]
                self.bytes_read += part.numel() * part.element_size()
                parts.append(part)
            row += rows
        return torch.cat(parts) if parts else torch.empty(box[1])
