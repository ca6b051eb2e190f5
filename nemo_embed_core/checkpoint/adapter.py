"""A checkpoint of LoRA adapters read as the model that they make of its base (model/lora.py).

    W + s B A      s = alpha / rank      in fp64, to be rounded once to what it is written or run in

Products of A's and B's fp32 values are exact in fp64 and their sum has an error of at most (rank + 2) 2^-53
of the sum of their sizes: the rounded value is the nearest one but where the real one lies so close to the
middle of two neighbours.

The base is not copied: the manifest has its folder and the sha256 of each of its weight files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_embed_core.checkpoint.hf_reader import Stored
from nemo_embed_core.checkpoint.manifest import CheckpointError
from nemo_embed_core.checkpoint.reader import Reader
from nemo_embed_core.config import LoraConfig, ModelConfig
from nemo_embed_core.model.spec import adapter_shapes, hf_rows
from nemo_embed_core.parallel.boxes import Box

if TYPE_CHECKING:
    from nemo_embed_core.checkpoint.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a manifest says of its adapters: LoraConfig's rank, alpha and targets, and what they adapt."""

    rank: int
    alpha: float
    targets: list[str]
    base: str  # folder
    files: Mapping[str, str]  # its weight files -> sha256

    @classmethod
    def of(cls, lora: LoraConfig, base: Weights) -> Adapter:
        return cls(
            rank=lora.rank, alpha=float(lora.alpha), targets=list(lora.targets),
            base=str(base.folder.resolve()), files=dict(base.files),
        )  # fmt: skip

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(rank=self.rank, alpha=self.alpha, targets=self.targets)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def check_base(self, base: Weights, folder: Path) -> None:
        """UserError unless these are the weights that training began with."""
        names = sorted(self.files.keys() | base.files.keys())
        if changed := [name for name in names if self.files.get(name) != base.files.get(name)]:
            raise CheckpointError(
                f"{folder} holds LoRA adapters of other weights than those of {base.folder}: {changed[0]} "
                "is not what it was (sha256) when training began; put the base back as it was then, in "
                f"{self.base}"
            )


def adapter_of(manifest: Mapping[str, Any]) -> Adapter | None:
    """None of a checkpoint that holds a whole model."""
    if "adapter" not in manifest:
        return None
    adapter = Adapter(**{field.name: manifest["adapter"][field.name] for field in fields(Adapter)})
    if adapter.lora.rank < 1:
        raise CheckpointError("manifest.json: adapter has rank 0; the checkpoint is damaged")
    return adapter


class AdaptedReader:
    """FileReader (checkpoint/weights.py) of the folded model. Factors are read when it is made; base: its
    reader."""

    def __init__(self, adapters: Reader, base: Weights, adapter: Adapter, model: ModelConfig):
        self.folder, self.manifest, self.adapter = adapters.folder, adapters.manifest, adapter
        self.base = base
        self._scale = adapter.lora.scale
        self._factors = {
            name: adapters.read_box(name, ((0, 0), shape))
            for name, shape in adapter_shapes(model, adapter.lora).items()
        }
        # Hugging Face name -> (first row there, first row of the layer's, rows, layer)
        self._rows: dict[str, list[tuple[int, int, int, str]]] = {}
        for layer in {name.removesuffix(".lora.A") for name in self._factors if name.endswith(".A")}:
            row = 0
            for name, first, count in hf_rows(f"{layer}.weight", model):
                self._rows.setdefault(name, []).append((first, row, count, layer))
                row += count

    def factors(self, hf_name: str) -> tuple[Tensor, Tensor] | None:
        """(A, B) of a Hugging Face tensor; None where it has none."""
        if hf_name not in self._rows:
            return None
        parts = sorted(self._rows[hf_name])
        layer = parts[0][3]
        rows = [self._factors[f"{layer}.lora.B"][row : row + count] for _, row, count, _ in parts]
        return self._factors[f"{layer}.lora.A"], torch.cat(rows)

    def read_box(self, name: str, box: Box) -> Tensor:
        values, layer = self.base.reader.read_box(name, box), name.removesuffix(".weight")
        if f"{layer}.lora.A" not in self._factors:
            return values
        (row, column), (rows, columns) = box
        A, B = self._factors[f"{layer}.lora.A"], self._factors[f"{layer}.lora.B"]
        return values.double() + self._product(B[row : row + rows], A[:, column : column + columns])

    def is_adapted(self, hf_name: str) -> bool:
        return hf_name in self._rows

    def delta(self, hf_name: str, first: int, count: int) -> Tensor:
        """s B A of these rows of a Hugging Face tensor, fp64."""
        parts, layer = [], ""
        for start, row, rows, layer in sorted(self._rows[hf_name]):
            low, high = max(first, start), min(first + count, start + rows)
            if low < high:
                parts.append(self._factors[f"{layer}.lora.B"][row + low - start : row + high - start])
        return self._product(torch.cat(parts), self._factors[f"{layer}.lora.A"])

    def _product(self, B: Tensor, A: Tensor) -> Tensor:
        return self._scale * (B.double() @ A.double())

    def stored(self) -> Iterator[tuple[str, Stored]]:
        """Of the base: who reads these rows adds delta() to those that are adapted."""
        for name, stored in self.base.reader.stored():
            file = str(stored.file.relative_to(self.base.folder))
            if file not in self.adapter.files:
                raise CheckpointError(f"{self.folder}: {stored.file} is none of the files of its LoRA's base")
            yield name, stored._replace(sha256=self.adapter.files[file])
