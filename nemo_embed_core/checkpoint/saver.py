"""A save that training does not wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.checkpoint.write import Piece


class Saver:
    """save_checkpoint() behind training's back: the caller copies to host memory, a thread writes.

        saver = Saver(partial(save_checkpoint, root, rank=..., ...), log)
        saver.save(step, pieces, meta=..., extra_files=...)   # returns when the values are copied
        saver.failed                                          # looked at every step: the thread met an error
        saver.wait()                                          # until it is published; raises that error

    One save is in flight: the next one waits for it. The host buffers (pinned beside a GPU) are made once, as
    large as what this rank writes. `background=False` writes straight from the tensors and returns when they
    are durable. `stall_s` is how long the last save kept its caller; take_stall() reads it once.
    """

    def __init__(
        self, write: Callable[..., Path], log: Callable[[str], None] = print, background: bool = True
    ):
        self._write, self._log, self._background = write, log, background
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.stall_s = 0.0

    @property
    def failed(self) -> bool:
        return self._error is not None

    def take_stall(self) -> float:
        seconds, self.stall_s = self.stall_s, 0.0
        return seconds

    def save(self, step: int, pieces: Mapping[str, Piece], **rest: Any) -> None:
        start = time.perf_counter()
        self.wait()
        if not self._background:
            path = self._write(step, pieces, **rest)
            self.stall_s = time.perf_counter() - start
            self._log(f"saved {path} in {self.stall_s:.2f} s")
            return
        snapshot = self.snapshot(pieces)
        self.stall_s = time.perf_counter() - start
        work = (step, snapshot, rest, start, self.stall_s)
        self._thread = threading.Thread(target=self._publish, args=work, name="checkpoint", daemon=True)
        self._thread.start()

    def snapshot(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        """Pieces of the same values in host memory, complete on return."""
        copies = {}
        for name, piece in pieces.items():
            tensor = piece.values().detach()
            if name not in self._buffers:
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name].copy_(tensor, non_blocking=tensor.is_cuda)
            copies[name] = Piece(piece.shape, piece.box, self._buffers[name])
        if any(piece.tensor.is_cuda for piece in pieces.values()):
            torch.cuda.current_stream().synchronize()
        return copies

    def _publish(
        self, step: int, pieces: Mapping[str, Piece], rest: dict[str, Any], start: float, copied: float
    ) -> None:
        try:
            path = self._write(step, pieces, **rest)
            took = time.perf_counter() - start
            self._log(f"saved {path}: copied in {copied:.2f} s, published after {took:.2f} s")
        except BaseException as error:  # raised by wait() on the caller's thread
            self._error = error

    def join(self) -> None:
        """Until nothing is in flight; an error is kept for wait()."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """join() on the way out; an error that nobody has seen is printed."""
        self.join()
        if self._error is not None:
            self._log(f"WARNING: the last save failed: {self._error}")

    def wait(self) -> None:
        """join(), and the error of what was in flight, once."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
