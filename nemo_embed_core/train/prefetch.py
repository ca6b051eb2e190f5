"""The next step's micro-batches, loaded, packed and copied by a thread while the device works on this one's.

prefetch.begin(step)                     # returns at once
prefetch.take(step) == load(step)        # with the tensors of its micro-batches on the device
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.data.packing import Drawn, MicroBatch

# The global batch as lengths, micro-batches of this rank, real tokens of all ranks.
Batch = tuple[Drawn, list[MicroBatch], int]


class Prefetch:
    """load: what makes a step's batch from its number alone, here always on one thread."""

    def __init__(self, load: Callable[[int], Batch], device: torch.device):
        self._load = load
        self._upload = Upload(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def begin(self, step: int) -> None:
        self._ahead = step, self._thread.submit(self._make, step)

    def take(self, step: int) -> Batch:
        """Raises what went wrong in the thread, with the thread's traceback."""
        if self._ahead is None or self._ahead[0] != step:
            self.begin(step)
        assert self._ahead is not None
        (_, batch), self._ahead = self._ahead, None
        return batch.result()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, step: int) -> Batch:
        drawn, batches, num_tokens = self._load(step)
        return drawn, batches if self._upload is None else self._upload(batches), num_tokens


class Upload:
    """Micro-batches with their tensors on a CUDA device: one copy for all of a step, which nobody waits for.

    It starts from one of two pinned buffers in turn, and a buffer is written again only when the copy that
    was made from it two calls ago has ended. The copy runs on the stream that was current when this was
    made, whatever thread calls: work that is launched there afterwards sees it, and 16 bytes a token are not
    worth a stream of their own.
    """

    ALIGNMENT = 256  # bytes; a Triton kernel specialises on pointers that are multiples of 16

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * 2
        self._copied: list[Any] = [None, None]  # events
        self._turn = 0

    def __call__(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        self._turn = turn = 1 - self._turn
        placed, size = [], 0
        for i, batch in enumerate(batches):
            for field in fields(batch):
                if isinstance(x := getattr(batch, field.name), Tensor):
                    placed.append((i, field.name, x, size))
                    size += -(-x.nbytes // self.ALIGNMENT) * self.ALIGNMENT
        with torch.cuda.stream(self._stream):  # and its device: a new thread's is the first one
            if self._copied[turn] is not None:
                self._copied[turn].synchronize()
            if len(self._buffers[turn]) < size:
                self._buffers[turn] = self._pinned(size)
            for _, _, x, start in placed:
                _view(self._buffers[turn], start, x).copy_(x)
            whole, self._copied[turn] = self._copy(self._buffers[turn][:size])
        moved: list[dict[str, Any]] = [{} for _ in batches]
        for i, name, x, start in placed:
            moved[i][name] = _view(whole, start, x)
        return [replace(batch, **tensors) for batch, tensors in zip(batches, moved, strict=True)]

    def _pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def _copy(self, pinned: Tensor) -> tuple[Tensor, Any]:
        return pinned.to(self.device, non_blocking=True), torch.cuda.current_stream().record_event()


def _view(whole: Tensor, start: int, like: Tensor) -> Tensor:
    return whole[start : start + like.nbytes].view(like.dtype).view(like.shape)
