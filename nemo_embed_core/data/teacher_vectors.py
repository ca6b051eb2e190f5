"""A teacher's vectors of the texts of a training run, from what its mining has kept (data/vectors.py).

    teacher = TeacherVectors(store, datasets)
    teacher.check()                      every query, positive and negative has one
    teacher.of(rows_B, doc_ids_BM)       [B, 1 + M, D], read from memory maps

A text is found by its key in the folder of its row's dataset: instructions belong to datasets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.config import DatasetConfig, TrainConfig
from nemo_embed_core.data.store import Store
from nemo_embed_core.data.vectors import SIDES, Vectors
from nemo_embed_core.errors import UserError


def vectors_of(datasets: Sequence[DatasetConfig]) -> list[Vectors]:
    """Of each dataset its own, of one model and width; UserError else."""
    if lacking := [dataset for dataset in datasets if not dataset.teacher_vectors]:
        raise UserError(
            f"loss.teacher_vectors_weight needs a vector of every text, and data.datasets: {lacking[0].path} "
            "names none: set its teacher_vectors to the <output>.work of its mining, or the weight to 0"
        )
    opened = {folder: Vectors(folder) for folder in dict.fromkeys(d.teacher_vectors for d in datasets)}
    found = [opened[dataset.teacher_vectors] for dataset in datasets]
    for other in found:
        for what, own, first in (
            ("columns", other.width, found[0].width), ("models", other.models, found[0].models),
        ):  # fmt: skip
            if own != first:
                raise UserError(
                    f"data.datasets: teacher_vectors of {found[0].folder} and {other.folder} are of other "
                    f"{what}, {first} and {own}: one projection has one teacher"
                )
    return found


def teacher_width(config: TrainConfig) -> int:
    """Columns of the vectors that the loss asks for; 0: it asks for none."""
    return vectors_of(config.data.datasets)[0].width if config.loss.needs_vectors else 0


def refuse_other_teacher(config: TrainConfig, folder: Path, held: Mapping[str, Any]) -> None:
    """UserError where a checkpoint, which holds this of its teacher, is not continued with the same one."""
    if not config.loss.needs_vectors:
        raise UserError(
            f"{folder} has learned a projection to a teacher's vectors, and this run has "
            "loss.teacher_vectors_weight=0, which would drop it; continue with the weight, or start a new "
            "run with --init_from and this checkpoint"
        )
    teacher = vectors_of(config.data.datasets)[0]
    if (teacher.models, teacher.width) != (held["models"], held["columns"]):
        raise UserError(
            f"{folder} has learned a projection to {held['columns']} columns of {held['models']}, and "
            f"{teacher.folder} has {teacher.width} of {teacher.models}: continue with the vectors that it "
            "was trained on, or start a new run with --init_from and this checkpoint"
        )


class TeacherVectors:
    """Of the texts of a store's rows; datasets: those of the store, in its order."""

    def __init__(self, store: Store, datasets: Sequence[DatasetConfig]):
        if store.query_text_keys is None or store.document_text_keys is None:
            raise UserError(
                f"{store.folder} was built before stores kept keys of texts, which teacher_vectors are found "
                "by: delete that folder and it is built again"
            )
        if len(datasets) != len(store.dataset_ends):
            raise UserError(
                f"data.datasets has {len(datasets)} and the store {store.folder} was made of "
                f"{len(store.dataset_ends)}: name all of them, in their order, each with its teacher_vectors"
            )
        self.store, self.vectors = store, vectors_of(datasets)
        self.keys = {"queries": store.query_text_keys, "documents": store.document_text_keys}
        self.width, self.models = self.vectors[0].width, self.vectors[0].models
        self.dtype = np.result_type(*(getattr(v, side).rows.dtype for v in self.vectors for side in SIDES))

    def of(self, rows_B: np.ndarray, doc_ids_BM: np.ndarray) -> np.ndarray:
        """[B, 1 + M, D]: of each row's query and of its documents; zeros where it has none (-1)."""
        out = np.zeros((len(rows_B), 1 + doc_ids_BM.shape[1], self.width), self.dtype)
        dataset_B = np.searchsorted(self.store.dataset_ends, rows_B, side="right")
        for i in np.unique(dataset_B):
            here = np.flatnonzero(dataset_B == i)
            row, column = np.nonzero(doc_ids_BM[here] >= 0)
            out[here, 0] = self._read(i, "queries", rows_B[here])
            out[here[row], 1 + column] = self._read(i, "documents", doc_ids_BM[here][row, column])
        return out

    def _read(self, dataset: int, side: str, numbers: np.ndarray) -> np.ndarray:
        places = self._find(dataset, side, numbers)
        assert (places >= 0).all(), "check() was not asked"
        rows: np.ndarray = getattr(self.vectors[dataset], side).rows[places]
        return rows

    def _find(self, dataset: int, side: str, numbers: np.ndarray) -> np.ndarray:
        found: np.ndarray = getattr(self.vectors[dataset], side).find(self.keys[side][numbers])
        return found

    def check(self) -> None:
        """UserError with the first row of a dataset that has a text without a vector, and how many texts."""
        store, first = self.store, 0
        for i, end in enumerate(store.dataset_ends.tolist()):
            ids = [ids[offsets[first] : offsets[end]] for ids, offsets in self._documents()]
            numbers = {"queries": np.arange(first, end), "documents": np.unique(np.concatenate(ids))}
            for side in SIDES:
                lacking = numbers[side][self._find(i, side, numbers[side]) < 0]
                if len(lacking):
                    row = int(lacking[0]) if side == "queries" else self._row_of(int(lacking[0]), first)
                    raise UserError(
                        f"{self.vectors[i].folder} has no vector of {len(lacking):,} of "
                        f"{len(numbers[side]):,} {side}; the first is of {store.where(row)}: train on what "
                        "was mined with it, or mine these rows with the teacher (launch/mine.py)"
                    )
            first = end

    def _row_of(self, doc_id: int, first: int) -> int:
        """The first row from this one on that brings the document."""
        found = []
        for ids, offsets in self._documents():
            at = np.flatnonzero(ids[offsets[first] :] == doc_id)[:1] + offsets[first]
            found += (np.searchsorted(offsets, at, side="right") - 1).tolist()
        return min(found)

    def _documents(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, offsets of rows) of positives and of negatives."""
        store = self.store
        return [
            (store.positive_ids, store.positive_offsets), (store.negative_ids, store.negative_offsets),
        ]  # fmt: skip
