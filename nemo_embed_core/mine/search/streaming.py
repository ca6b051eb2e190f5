"""The streaming top-k of csrc/topk.h as two ops: kernels for CUDA, torch for CPU tensors, the same bits.

q, n rows of a tile of queries and documents · C places of the state · L places of a list
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_embed_core.errors import UserError
from nemo_embed_core.mine.search.exclude import excluded_positions, not_excluded

CSRC = Path(__file__).parents[2] / "csrc"
THREADS, STEP = 128, 1024  # TOPK_THREADS, TOPK_THREADS * TOPK_ITEMS
MAX_KEPT = {2048: 1024, 4096: 3072}  # TOPK_CAPACITY: TOPK_MAX_KEPT
MAX_ID = 0xFFFFFFFF
FOLD = 32  # keys whose maximum is compared first, on a CPU


@functools.cache
def kernel_is_available() -> bool:
    """CuPy compiles csrc at first use; without it torch serves CUDA tensors, and the report says so."""
    return torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None


@torch.library.custom_op("nemo_embed_core::streaming_topk", mutates_args=("state_keys", "state_ids"))
def streaming_topk_(
    scores: Tensor,
    ceilings: Tensor,
    state_keys: Tensor,
    state_ids: Tensor,
    first_id: int = 0,
    exclude_indptr: Tensor | None = None,
    exclude_ids: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    row_add: Tensor | None = None,
) -> None:
    """keys = scores * col_scale * row_scale[:, None] + row_add[:, None]; state = top C of state and keys.

    In place. Kept: finite keys < ceilings[:, None], not excluded, by (key descending, id ascending).
    scores [q, n] fp32, bf16 or int32: column j is document first_id + j.  ceilings [q] fp32.
    state_keys [q, C] fp32, state_ids [q, C] int64: best first; -inf and -1 in free places.
    exclude_indptr [q + 1], exclude_ids: CSR of int64 document ids, ascending within a row.
    """
    num_columns = scores.shape[1]
    if scores.is_cuda and kernel_is_available():
        name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "int32"}[scores.dtype]
        assert scores.stride(1) == 1
        vectors = _pointers(row_scale, col_scale, row_add, ceilings)
        inputs = (scores.data_ptr(), scores.stride(0), num_columns, *vectors)
        excluded, last_id = _pointers(exclude_indptr, exclude_ids), first_id + num_columns
        _run(f"topk_update_{name}", inputs, excluded, first_id, last_id, state_keys, state_ids)
        return
    keys = scores.float()
    if col_scale is not None:
        keys = keys * col_scale
    if row_scale is not None:
        keys = keys * row_scale[:, None]
    if row_add is not None:
        keys = keys + row_add[:, None]
    out = excluded_positions(exclude_indptr, exclude_ids, first_id, num_columns)
    rows, columns = _alive(keys, ceilings, state_keys, out)
    insert_(keys[rows, columns], rows, columns + first_id, state_keys, state_ids)


@torch.library.custom_op("nemo_embed_core::merge_lists", mutates_args=("state_keys", "state_ids"))
def merge_lists_(
    list_keys: Tensor,
    list_columns: Tensor,
    counts: Tensor,
    state_keys: Tensor,
    state_ids: Tensor,
    first_id: int = 0,
    exclude_indptr: Tensor | None = None,
    exclude_ids: Tensor | None = None,
) -> None:
    """state[r] = top C of state[r] and list_keys[r, : counts[r]], in place, whatever the order of the list.

    Kept: finite keys of documents not excluded, by (key descending, id ascending). list_keys [q, L] fp32,
    list_columns [q, L] int32: entry i of row r is document first_id + list_columns[r, i]. counts [q] int32:
    entries of each list; of one that counts more than L, its L are merged. state_keys, state_ids,
    exclude_indptr, exclude_ids: as in streaming_topk_. Columns that would give ids above MAX_ID are for the
    caller to refuse: they are on the device.
    """
    assert list_keys.shape == list_columns.shape, f"{list_keys.shape=} {list_columns.shape=}"
    num_rows = len(list_keys)
    assert num_rows == len(counts) == len(state_keys), f"{num_rows=} {len(counts)=} {len(state_keys)=}"
    assert list_keys.dtype == torch.float32, f"{list_keys.dtype=}"
    assert list_columns.dtype == counts.dtype == torch.int32, f"{list_columns.dtype=} {counts.dtype=}"
    if list_keys.is_cuda and kernel_is_available():
        inputs = (*_pointers(list_keys, list_columns), list_keys.shape[1], *_pointers(counts))
        excluded = _pointers(exclude_indptr, exclude_ids)
        _run("merge_lists", inputs, excluded, first_id, first_id, state_keys, state_ids)
        return
    listed = torch.arange(list_keys.shape[1], device=counts.device) < counts[:, None]
    rows, places = (listed & torch.isfinite(list_keys)).nonzero(as_tuple=True)
    columns = list_columns[rows, places].long()
    width = 2**31  # no int32 column reaches it
    out = excluded_positions(exclude_indptr, exclude_ids, first_id, width)
    if out is not None:
        left = not_excluded(rows, columns, out, width)
        rows, places, columns = rows[left], places[left], columns[left]
    insert_(list_keys[rows, places], rows, columns + first_id, state_keys, state_ids)


@streaming_topk_.register_fake
@merge_lists_.register_fake
def _(*arguments: Any, **options: Any) -> None:
    return None


def best_first(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k columns in the order (score descending, id ascending)."""
    by_id = ids.argsort(dim=1, stable=True)
    by_score = scores.gather(1, by_id).argsort(dim=1, descending=True, stable=True)
    order = by_id.gather(1, by_score)[:, :k]
    return scores.gather(1, order), ids.gather(1, order)


def _alive(
    keys: Tensor, ceilings: Tensor, state_keys: Tensor, excluded: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the keys that may enter the state, rows ascending; ties with the last enter."""
    num_kept = state_keys.shape[1]
    # The lowest finite number where a place is free: any finite key takes it, and no infinity.
    floor = state_keys[:, -1].clamp(min=torch.finfo(torch.float32).min)
    few = _few_not_below(keys, floor)
    if few is not None:
        rows, columns = few
        enter = keys[rows, columns] < ceilings[rows]
        if excluded is not None:
            enter &= not_excluded(rows, columns, excluded, keys.shape[1])
        return rows[enter], columns[enter]
    alive = (keys >= floor[:, None]) & (keys < ceilings[:, None])
    if excluded is not None:
        alive[excluded] = False
    has_room = bool(torch.isneginf(state_keys[:, -1]).any())
    if has_room and int(alive.sum(1, dtype=torch.int32).max()) > 2 * num_kept:
        # An early tile: cut at its own C-th best first (ties at the cut stay; the insertion orders them).
        cut = torch.where(alive, keys, -torch.inf).topk(num_kept, dim=1).values[:, -1]
        alive &= keys >= cut[:, None]
    rows, columns = alive.nonzero(as_tuple=True)
    return rows, columns


def _few_not_below(keys: Tensor, floor: Tensor) -> tuple[Tensor, Tensor] | None:
    """(rows, columns) of keys >= floor[:, None] when few are, rows ascending: one pass over the tile for the
    maxima of FOLD keys, then those only. None when they are many."""
    num_rows, num_columns = keys.shape
    if num_columns % FOLD or not keys.is_contiguous():
        return None
    folded = keys.view(num_rows, FOLD, num_columns // FOLD)
    # "not below" and not ">=": the maximum is NaN where one of its keys is.
    rows, places = (~(folded.amax(1) < floor[:, None])).nonzero(as_tuple=True)
    if 8 * FOLD * len(rows) > keys.numel():
        return None
    at, inner = (folded[rows, :, places] >= floor[rows, None]).nonzero(as_tuple=True)
    return rows[at], inner * (num_columns // FOLD) + places[at]


def insert_(keys: Tensor, rows: Tensor, ids: Tensor, state_keys: Tensor, state_ids: Tensor) -> None:
    """state row r = the first C of itself and the (keys[i], ids[i]) with rows[i] == r; rows ascend."""
    if len(rows) == 0:
        return
    num_kept = state_keys.shape[1]
    counts = torch.bincount(rows, minlength=len(state_keys))
    most = int(counts.max())
    touched = counts.nonzero()[:, 0]
    place = torch.arange(len(rows), device=keys.device) - (counts.cumsum(0) - counts)[rows]
    position = ((counts > 0).cumsum(0) - 1)[rows]
    new_keys = keys.new_full((len(touched), num_kept + most), -torch.inf)
    new_ids = state_ids.new_full((len(touched), num_kept + most), -1)
    new_keys[:, :num_kept], new_ids[:, :num_kept] = state_keys[touched], state_ids[touched]
    new_keys[position, num_kept + place] = keys + 0.0  # -0 becomes the +0 that it ties with, as in the kernel
    new_ids[position, num_kept + place] = ids
    state_keys[touched], state_ids[touched] = best_first(new_keys, new_ids, num_kept)


def _pointers(*vectors: Tensor | None) -> list[int]:
    assert all(x is None or x.is_contiguous() for x in vectors)
    return [0 if x is None else x.data_ptr() for x in vectors]


def _run(
    name: str,
    inputs: tuple[int, ...],
    excluded: list[int],
    first_id: int,
    last_id: int,
    state_keys: Tensor,
    state_ids: Tensor,
) -> None:
    """The kernel `name`, one block per row of the state: its own inputs, then the common arguments."""
    import cupy

    num_rows, kept = state_keys.shape
    if last_id > MAX_ID:
        raise UserError(f"document ids up to {last_id} do not fit the kernel's 32 bits: use more ranks")
    capacity = next((c for c, most in MAX_KEPT.items() if kept <= most), None)
    if capacity is None:
        most = max(MAX_KEPT.values())
        raise UserError(f"{kept} kept candidates per query are more than the kernel's {most}")
    device, state = state_keys.device, _pointers(state_keys, state_ids)
    kernel = _module(capacity, device.index).get_function(name)
    with cupy.cuda.Device(device.index), _stream(torch.cuda.current_stream(device).cuda_stream):
        kernel((num_rows,), (THREADS,), (*inputs, *excluded, first_id, *state, np.int32(kept)))


@functools.cache
def _stream(handle: int) -> Any:
    import cupy

    with warnings.catch_warnings():  # CuPy 14 would rather have an object than the handle that torch gives
        warnings.filterwarnings("ignore", message="ExternalStream is deprecated", category=DeprecationWarning)
        return cupy.cuda.ExternalStream(handle)


@functools.cache
def _module(capacity: int, device_index: int) -> Any:
    """csrc/topk.cu through NVRTC; CuPy caches the binary on disk."""
    import cupy

    options = ("--std=c++17", f"-I{CSRC}", f"-DTOPK_CAPACITY={capacity}")
    return cupy.RawModule(code=(CSRC / "topk.cu").read_text(), options=options)
