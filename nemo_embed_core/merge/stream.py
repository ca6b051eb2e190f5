"""The weights of the merged model, by blocks: read from all sources, combined, measured, written in one pass.

A block is some rows of one tensor. Memory is a few blocks per source, whatever the size of the model. Sources
may be checkpoints of any tp x dp layout and Hugging Face folders, mixed. The same pass measures how far each
source is from the result (report.py), and checkpoints are hashed beside it.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_embed_core.checkpoint.manifest import check_digest
from nemo_embed_core.checkpoint.weights import Rows, Weights
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import check_free_space
from nemo_embed_core.files.safetensors import dtype_name
from nemo_embed_core.merge.average import CHUNK_ELEMENTS, Combiner, NonFinite, widest
from nemo_embed_core.merge.output import Output, weight_bytes
from nemo_embed_core.merge.recipes import slerp_weights
from nemo_embed_core.merge.report import make_report, source_pairs, squares
from nemo_embed_core.model.spec import hf_shapes

BLOCK_ELEMENTS = 1 << 20  # read at once per source and thread, at most
READ_BYTES = 24 << 20  # of all sources together, per thread
_THREADS = min(8, os.cpu_count() or 1)  # one more than cores lost: their calls wait for one another


def write_weights(
    folder: Path,
    sources: Sequence[Weights],
    dtype: torch.dtype,
    *,
    weights: Sequence[float] | None = None,
    slerp: float | None = None,
    hashed: bool = True,
    beside: int = 0,
) -> dict[str, Any]:
    """model.safetensors (or shards and an index) with  m = sum_i c_i w_i  per tensor; names lack "model.".

        weights=None     c_i = 1 / N
        weights=[...]    c as given
        slerp=t          c = sin((1 - t) v) / sin v, sin(t v) / sin v;  cos v = <w_1, w_2> / (|w_1| |w_2|)

    correctly rounded to dtype (average.py).  hashed: files of checkpoints are compared with their sha256
    while they are read.  beside: bytes that will be written beside the weights.  Returns the report, for one
    source without distances. UserError names the tensor and the source of a NaN or an infinity.
    """
    shapes = hf_shapes(sources[0].model)
    check_free_space(folder, weight_bytes(shapes, dtype) + beside, "the merged model")
    with ExitStack() as stack:
        # Threads are at most as many blocks apart as there are of them; slerp reads everything twice.
        behind = 2 * _THREADS * READ_BYTES // len(sources) if slerp is None else 0
        rows = [stack.enter_context(Rows(source, behind)) for source in sources]
        digests = stack.enter_context(_Digests(rows if hashed else []))
        stream = _Pass(sources, rows)
        angles = _slerp_weights(stream, slerp) if slerp is not None else {}
        output = stack.enter_context(Output(folder, shapes, dtype))
        pairs = source_pairs(len(sources))

        def average(block: _Block) -> list[float]:
            sums = [0.0] * (1 + 2 * len(sources) + len(pairs))

            def measure(x_NC: Tensor, merged_C: Tensor) -> None:
                sums[:] = [a + b for a, b in zip(sums, squares(x_NC, merged_C, pairs), strict=True)]

            how = angles[block.name][0] if angles else weights
            visit = measure if len(sources) > 1 else None
            try:
                out_V = stream.local.combiner(stream.read(block), how, dtype, visit)
            except NonFinite as error:
                raise UserError(f"{block.name} has NaN or infinite values in {blame(error)}") from None
            output.write(block.name, block.first, out_V)
            return sums

        def blame(error: NonFinite) -> str:
            if error.source is None:
                return f"the average (it overflows {dtype_name(dtype)})"
            return str(sources[error.source].folder)

        try:
            sums = stream.total(average)
        except UserError:
            digests.check()  # a damaged file explains a NaN
            raise
        digests.check()
        output.finish()
    report = make_report(sources, dtype, sums)
    report["method"] = "slerp" if slerp is not None else "mean" if weights is None else "weighted"
    if slerp is not None:
        linear = [name for name, (_, is_linear) in angles.items() if is_linear]
        report |= {"t": slerp, "interpolated_linearly": linear}
    elif weights is not None:
        report["weights"] = list(weights)
    return report


def _slerp_weights(stream: _Pass, t: float) -> dict[str, tuple[tuple[float, float], bool]]:
    """{tensor: slerp_weights(<a, a>, <b, b>, <a, b>, t)}, fp64 sums over the whole tensor, in an own pass."""
    if len(stream.sources) != 2:
        raise UserError(f"slerp goes from one source to another; {len(stream.sources)} were given")
    if not 0 <= t <= 1:
        raise UserError(f"t={t} of slerp lies outside 0 (the first source) to 1 (the second)")

    def products(block: _Block) -> list[float]:
        x_NV, sums = stream.read(block), [0.0, 0.0, 0.0]
        for start in range(0, x_NV.shape[1], CHUNK_ELEMENTS):
            a, b = x_NV[:, start : start + CHUNK_ELEMENTS].double()
            sums = [x + float(y) for x, y in zip(sums, (a.dot(a), b.dot(b), a.dot(b)), strict=True)]
        return sums

    return {name: slerp_weights(aa, bb, ab, t) for name, (aa, bb, ab) in stream.total(products).items()}


# ------------------------------------------------------------------------------------------ the pass


class _Block(NamedTuple):
    """Rows of one tensor."""

    name: str
    first: int
    rows: int


class _Thread(threading.local):
    """What each thread keeps from block to block."""

    def __init__(self) -> None:
        self.combiner = Combiner()


class _Pass:
    """The same work on every block of all sources, by a few threads, in the order of the files."""

    def __init__(self, sources: Sequence[Weights], rows: Sequence[Rows]):
        self.sources, self.rows = sources, rows
        self.shapes = hf_shapes(sources[0].model)
        self.local = _Thread()

    def blocks(self) -> Iterator[_Block]:
        for name, shape in self.shapes.items():
            columns = torch.Size(shape[1:]).numel()
            row_bytes = columns * sum(rows.dtypes[name].itemsize for rows in self.rows)
            step = max(1, min(BLOCK_ELEMENTS // columns, READ_BYTES // row_bytes))
            for first in range(0, shape[0], step):
                yield _Block(name, first, min(step, shape[0] - first))

    def read(self, block: _Block) -> Tensor:
        """This block of all sources as [sources, values]; valid until the thread's next call."""
        columns = torch.Size(self.shapes[block.name][1:]).numel()
        dtypes = [rows.dtypes[block.name] for rows in self.rows]
        buffer, N, R = self.local.combiner.buffer, len(self.rows), block.rows
        x_NRC = buffer("read", (N, R, columns), widest(dtypes))
        for x_RC, rows, dtype in zip(x_NRC, self.rows, dtypes, strict=True):
            if dtype == x_RC.dtype:
                rows.read(block.name, block.first, x_RC)
            else:
                narrow = buffer(("read", dtype), (R, columns), dtype)
                rows.read(block.name, block.first, narrow)
                x_RC.copy_(narrow)
        return x_NRC.view(N, R * columns)

    def total(self, work: Callable[[_Block], list[float]]) -> dict[str, list[float]]:
        """{tensor: sum of work(block) over its blocks, in their order}; the first error ends it."""
        blocks, totals = list(self.blocks()), dict[str, list[float]]()
        with _one_torch_thread(), ThreadPoolExecutor(_THREADS) as pool:
            for block, sums in zip(blocks, pool.map(work, blocks), strict=True):
                before = totals.get(block.name, [0.0] * len(sums))
                totals[block.name] = [a + b for a, b in zip(before, sums, strict=True)]
        return totals


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Our threads are the parallelism; torch's own inside each of them would fight over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Digests:
    """sha256 of the sources' files beside the pass: the disk is read once, the page cache twice."""

    def __init__(self, rows: Sequence[Rows]):
        files = [list(r.sha256.items()) for r in rows]
        # The first file of each source, then the second...: about where the pass is.
        order = [file for together in itertools.zip_longest(*files) for file in together if file]
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        self._running: list[Future[None]] = [self._pool.submit(check_digest, *file) for file in order]

    def check(self) -> None:
        for future in self._running:
            future.result()

    def __enter__(self) -> _Digests:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
