"""Checkpoints to Hugging Face weights, and averages of several: streamed in blocks, no GPU, no process group.

    mean       sum(w) / N
    weighted   sum(c * w), the weights c as given
    slerp      sin((1 - t) v) / sin v * a + sin(t v) / sin v * b per tensor, v the angle between a and b as vectors

all correctly rounded to the output dtype (average.py). Sources may be checkpoints of any tp x dp layout, runs (their newest
checkpoint) and Hugging Face folders, mixed. Memory is a few blocks per source, whatever the size of the model. The same
pass measures how far each source is from the result (`merge-report.json`) and hashes the checkpoints that it reads.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nemo_embed_core.checkpoint import sharded
from nemo_embed_core.checkpoint.average import CHUNK_ELEMENTS, Combiner, NonFinite, widest
from nemo_embed_core.checkpoint.files import (
    check_free_space,
    safetensors_header,
    start_writing_back,
    write_bytes,
    writing,
)
from nemo_embed_core.checkpoint.source import Prompts, Usage
from nemo_embed_core.checkpoint.weights import Rows, Weights, open_weights
from nemo_embed_core.config import UserError, to_dict
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.model.hf import hf_shapes
from nemo_embed_core.model.hf_config import read_json

BLOCK_ELEMENTS = 1 << 20  # read at once per source and thread, at most
READ_BYTES = 24 << 20  # of all sources together, per thread
SHARD_BYTES = 5_000_000_000
_THREADS = min(8, os.cpu_count() or 1)  # one more than cores lost: their calls wait for one another
REPORT = "merge-report.json"
T = TypeVar("T")


# ------------------------------------------------------------------------------------------ before anything is written


def open_sources(paths: Sequence[str], log: Callable[[str], None] = print) -> list[Weights]:
    """Sources of one shape and configuration, headers checked; write_weights hashes what it reads."""
    sources = [open_weights(path, hashed=False) for path in paths]
    first = sources[0]
    for path, other in zip(paths, sources, strict=True):
        if other.model != first.model:
            ours, theirs = to_dict(first.model), to_dict(other.model)
            fields = [f"{k}: {ours[k]} and {theirs[k]}" for k in ours if ours[k] != theirs[k]]
            raise UserError(f"{paths[0]} and {path} are models of different shapes: {'; '.join(fields)}")
    for (i, a), (j, b) in itertools.combinations(enumerate(sources), 2):
        if a.folder.resolve() == b.folder.resolve():
            log(f"WARNING: {paths[i]} and {paths[j]} are the same weights ({a.folder}): they count twice")
        elif differences := _other_settings(a.folder, b.folder):
            log(f"WARNING: config.json of {paths[i]} and {paths[j]} differ in what is not weights: {differences}")
    return sources


# What a config.json says about its writer, and the spellings that read_config already compares.
_NOT_SETTINGS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "rope_")


def _other_settings(a: Path, b: Path) -> str:
    """Differences of two folders' config.json that ModelConfig does not hold, such as is_causal."""
    if not all((folder / "config.json").is_file() for folder in (a, b)):
        return ""
    ours, theirs = read_json(a / "config.json"), read_json(b / "config.json")
    keys = [k for k in sorted(ours.keys() | theirs.keys()) if not k.startswith(_NOT_SETTINGS)]
    return "; ".join(f"{k}: {ours.get(k)!r} and {theirs.get(k)!r}" for k in keys if ours.get(k) != theirs.get(k))


def check_weights(weights: Sequence[float], num_sources: int) -> None:
    if len(weights) != num_sources:
        raise UserError(f"{len(weights)} weights for {num_sources} sources; give one for each, in their order")
    total = sum(weights)
    if not abs(total - 1) <= 1e-6:  # infinity and NaN too
        raise UserError(f"the weights {list(weights)} sum to {total!r}; they must sum to 1 (within 1e-6)")


def dtype_of(name: str, sources: Sequence[Weights]) -> torch.dtype:
    """ "auto" is the sources' own, which must then be one."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[name]
    kinds = {source.dtype for source in sources}
    if len(kinds) > 1 or torch.float64 in kinds:
        named = ", ".join(f"{source.folder}: {str(source.dtype).removeprefix('torch.')}" for source in sources)
        raise UserError(f"the sources' dtypes do not say which one to write ({named}); choose one with --dtype")
    return sources[0].dtype


# ------------------------------------------------------------------------------------------ the streaming pass


@dataclass(frozen=True)
class _Unit:
    """Rows of one tensor that a thread works on."""

    name: str
    first: int
    rows: int


class _Thread(threading.local):
    """What each thread keeps from unit to unit."""

    def __init__(self) -> None:
        self.combiner = Combiner()


class _Pass:
    """The same work on every block of all sources, by a few threads, in the order of the files."""

    def __init__(self, sources: Sequence[Weights], rows: Sequence[Rows]):
        self.sources, self.rows = sources, rows
        self.shapes = hf_shapes(sources[0].model)
        self.local = _Thread()

    def units(self) -> Iterator[_Unit]:
        for name, shape in self.shapes.items():
            columns = torch.Size(shape[1:]).numel()
            row_bytes = columns * sum(rows.dtypes[name].itemsize for rows in self.rows)
            step = max(1, min(BLOCK_ELEMENTS // columns, READ_BYTES // row_bytes))
            for first in range(0, shape[0], step):
                yield _Unit(name, first, min(step, shape[0] - first))

    def read(self, unit: _Unit) -> Tensor:
        """This unit of all sources as [sources, values]; valid until the thread's next call."""
        columns = torch.Size(self.shapes[unit.name][1:]).numel()
        dtypes = [rows.dtypes[unit.name] for rows in self.rows]
        buffer, N, R = self.local.combiner.buffer, len(self.rows), unit.rows
        x_NRC = buffer("read", (N, R, columns), widest(dtypes))
        for x_RC, rows, dtype in zip(x_NRC, self.rows, dtypes, strict=True):
            if dtype == x_RC.dtype:
                rows.read(unit.name, unit.first, x_RC)
            else:
                narrow = buffer(("read", dtype), (R, columns), dtype)
                rows.read(unit.name, unit.first, narrow)
                x_RC.copy_(narrow)
        return x_NRC.view(N, R * columns)

    def run(self, work: Callable[[_Unit], T]) -> Iterator[tuple[_Unit, T]]:
        """(unit, its result), in order; the first error ends it."""
        units = list(self.units())
        with _one_torch_thread(), ThreadPoolExecutor(_THREADS) as pool:
            yield from zip(units, pool.map(work, units), strict=True)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Our threads are the parallelism; torch's own inside each of them would fight over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    """model.safetensors (or shards of at most 5 GB and their index) under Hugging Face names without "model.".

    weights: of the sources; None is the mean.  slerp: t between the two sources, instead.  hashed: files of checkpoints are
    compared with their sha256 while they are read.  beside: bytes that will be written beside the weights.  Returns the report (for one source without distances). UserError names
    the tensor and the source of a NaN or an infinity.
    """
    shapes = hf_shapes(sources[0].model)
    if weights is not None:
        check_weights(weights, len(sources))
    check_free_space(folder, weight_bytes(sources[0], dtype) + beside, "the merged model")
    with ExitStack() as stack:
        # Threads are at most as many blocks apart as there are of them; slerp reads everything twice.
        behind = 2 * _THREADS * READ_BYTES // len(sources) if slerp is None else 0
        rows = [stack.enter_context(Rows(source, behind)) for source in sources]
        digests = stack.enter_context(_Digests(rows if hashed else []))
        stream = _Pass(sources, rows)
        angles = _slerp_weights(stream, slerp) if slerp is not None else {}
        output = stack.enter_context(_Output(folder, shapes, dtype))
        pairs = list(itertools.combinations(range(len(sources)), 2)) if len(sources) <= 3 else []

        def average(unit: _Unit) -> list[float]:
            sums = [0.0] * (1 + 2 * len(sources) + len(pairs))

            def measure(x_NC: Tensor, merged_C: Tensor) -> None:
                sums[:] = [a + b for a, b in zip(sums, _squares(x_NC, merged_C, pairs), strict=True)]

            how = angles[unit.name][0] if angles else weights
            try:
                out_V = stream.local.combiner(stream.read(unit), how, dtype, measure if len(sources) > 1 else None)
            except NonFinite as error:
                raise UserError(f"{unit.name} has NaN or infinite values in {blame(error)}") from None
            output.write(unit.name, unit.first, out_V)
            return sums

        def blame(error: NonFinite) -> str:
            if error.source is None:
                return f"the average (it overflows {str(dtype).removeprefix('torch.')})"
            return str(sources[error.source].folder)

        sums: dict[str, list[float]] = {}
        try:
            for unit, block in stream.run(average):
                sums[unit.name] = [a + b for a, b in zip(sums.get(unit.name, [0.0] * len(block)), block, strict=True)]
        except UserError:
            digests.check()  # a damaged file explains a NaN
            raise
        digests.check()
        output.finish()
    report = _report(sources, dtype, sums, pairs)
    report["method"] = "slerp" if slerp is not None else "mean" if weights is None else "weighted"
    if slerp is not None:
        report |= {"t": slerp, "interpolated_linearly": [name for name, (_, linear) in angles.items() if linear]}
    elif weights is not None:
        report["weights"] = list(weights)
    return report


def weight_bytes(source: Weights, dtype: torch.dtype) -> int:
    """Of the merged weights, headers included."""
    shapes = hf_shapes(source.model)
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize + 200 * len(shapes)


class _Digests:
    """sha256 of the sources' files beside the streaming pass: the disk is read once, the page cache serves the other."""

    def __init__(self, rows: Sequence[Rows]):
        files = [list(r.sha256.items()) for r in rows]
        # The first file of each source, then the second...: about where the pass is.
        order = [file for together in itertools.zip_longest(*files) for file in together if file]
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        self._running: list[Future[None]] = [self._pool.submit(sharded.check_digest, *file) for file in order]

    def check(self) -> None:
        for future in self._running:
            future.result()

    def __enter__(self) -> _Digests:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Output:
    """The files of the merged model, written at any place by any thread; fsynced by finish()."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype):
        self.folder, self.shapes, self.dtype = folder, shapes, dtype
        self._place: dict[str, tuple[int, int]] = {}  # name -> file descriptor, first byte
        self._files: dict[str, int] = {}
        self.total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        self._left = self.total  # bytes; also read by finish() alone, so += under a lock
        self._lock = threading.Lock()
        shards = _assign(shapes, dtype)
        self._weight_map: dict[str, str] = {}
        for i, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            header, _ = safetensors_header({n: (dtype, shapes[n]) for n in names}, {"format": "pt"})
            fd = self._files[file] = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            self._put(fd, memoryview(header), 0)
            end = len(header)
            for name in names:
                self._place[name], self._weight_map[name] = (fd, end), file
                end += torch.Size(shapes[name]).numel() * dtype.itemsize

    def write(self, name: str, first_row: int, values: Tensor) -> None:
        fd, start = self._place[name]
        data = values.view(torch.uint8).numpy().data
        at = start + first_row * torch.Size(self.shapes[name][1:]).numel() * self.dtype.itemsize
        with self._lock:
            self._left -= len(data)
        self._put(fd, data, at)
        start_writing_back(fd, at, len(data))

    def _put(self, fd: int, data: memoryview, at: int) -> None:
        with writing(self.folder, self.total, "the merged model"):
            while len(data):
                n = os.pwrite(fd, data, at)
                data, at = data[n:], at + n

    def finish(self) -> None:
        assert self._left == 0, f"{self.folder}: {self._left} bytes were not written"
        for fd in self._files.values():
            os.fsync(fd)
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": self._weight_map}
            write_bytes(self.folder / "model.safetensors.index.json", json.dumps(index, indent=1).encode())

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in self._files.values():
            os.close(fd)


def _assign(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        n = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + n > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n
    return shards


def _slerp_weights(stream: _Pass, t: float) -> dict[str, tuple[tuple[float, float], bool]]:
    """name -> the weights of the two sources for this t, and whether they are those of a straight line.

    cos v = <a, b> / (|a| |b|), sums in fp64 over the whole tensor, in a pass of its own.
    """
    if len(stream.sources) != 2:
        raise UserError(f"slerp goes from one source to another; {len(stream.sources)} were given")
    if not 0 <= t <= 1:
        raise UserError(f"t={t} of slerp lies outside 0 (the first source) to 1 (the second)")

    def products(unit: _Unit) -> list[float]:
        x_NV, sums = stream.read(unit), [0.0, 0.0, 0.0]
        for start in range(0, x_NV.shape[1], CHUNK_ELEMENTS):
            a, b = x_NV[:, start : start + CHUNK_ELEMENTS].double()
            sums = [x + float(y) for x, y in zip(sums, (a.dot(a), b.dot(b), a.dot(b)), strict=True)]
        return sums

    totals: dict[str, list[float]] = {}
    for unit, sums in stream.run(products):
        totals[unit.name] = [a + b for a, b in zip(totals.get(unit.name, [0.0] * 3), sums, strict=True)]
    return {name: slerp_weights(aa, bb, ab, t) for name, (aa, bb, ab) in totals.items()}


def slerp_weights(aa: float, bb: float, ab: float, t: float) -> tuple[tuple[float, float], bool]:
    """sin((1 - t) v) / sin v and sin(t v) / sin v for cos v = ab / sqrt(aa * bb); (1 - t, t) where that has no direction.

    That is where a or b is zero, and where sin v < 1e-6: parallel tensors, whose slerp weights differ from (1 - t, t) by less
    than v^2 < 1e-12, and opposite ones, between which every way round is as short.
    """
    norm = math.sqrt(aa) * math.sqrt(bb)
    if norm > 0 and math.isfinite(norm) and math.isfinite(ab):
        angle = math.acos(max(-1.0, min(1.0, ab / norm)))
        if math.sin(angle) >= 1e-6:
            return (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)), False
    return (1 - t, t), True


# ------------------------------------------------------------------------------------------ the report


def _squares(a_NC: Tensor, m_C: Tensor, pairs: Sequence[tuple[int, int]]) -> list[float]:
    """|m|^2, then |a|^2 and |a - m|^2 of every source, then |a - b|^2 of every pair; leaves a - m in `a_NC`."""
    norms = [torch.linalg.vector_norm(x, dim=1).tolist() for x in (m_C[None], a_NC)]
    between = [float(torch.linalg.vector_norm(a_NC[i] - a_NC[j])) for i, j in pairs]
    norms += [torch.linalg.vector_norm(a_NC.sub_(m_C), dim=1).tolist(), between]
    squares = [[norm**2 for norm in group] for group in norms]
    return squares[0] + [x for both in zip(*squares[1:3], strict=True) for x in both] + squares[3]


def _compare(aa: float, bb: float, dd: float) -> dict[str, float | None]:
    """|a - b| / |a| and the cosine from |a|^2, |b|^2, |a - b|^2; None where they mean nothing."""
    a, b = math.sqrt(aa), math.sqrt(bb)
    return {
        "distance": math.sqrt(dd) / a if a else None,
        # Not <a, b> / (|a| |b|): for close tensors everything that matters would cancel.
        "cosine": 1 - (dd - (a - b) ** 2) / (2 * a * b) if a and b else None,
    }


def _report(
    sources: Sequence[Weights], dtype: torch.dtype, sums: dict[str, list[float]], pairs: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    n = len(sources)
    shapes = hf_shapes(sources[0].model)
    report: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "num_tensors": len(shapes),
        "num_parameters": sum(torch.Size(shape).numel() for shape in shapes.values()),
        "sources": [{"name": source.name, "dtype": str(source.dtype).removeprefix("torch.")} for source in sources],
    }
    if n == 1:
        return report

    def row(values: Sequence[float]) -> dict[str, Any]:
        mm, squares, between = values[0], values[1 : 1 + 2 * n], values[1 + 2 * n :]
        result: dict[str, Any] = {
            "to_merged": [_compare(squares[2 * i], mm, squares[2 * i + 1]) for i in range(n)],
        }
        if pairs:
            result["between"] = [
                {"sources": [i, j], **_compare(squares[2 * i], squares[2 * j], dd)}
                for (i, j), dd in zip(pairs, between, strict=True)
            ]
        return result

    report["meaning"] = "distance: |a - b| / |a|; cosine: <a, b> / (|a| |b|); a: the source, b: the merged or other one"
    report["whole"] = row([sum(column) for column in zip(*sums.values(), strict=True)])
    report["tensors"] = {name: row(values) for name, values in sums.items()}
    for i, source in enumerate(report["sources"]):
        distance = {name: tensor["to_merged"][i]["distance"] or 0.0 for name, tensor in report["tensors"].items()}
        source["farthest"] = sorted(distance, key=lambda name: -distance[name])[:5]
    # Sources of equal values have equal sums, to the last bit.
    columns = [tuple(values[k] for values in sums.values() for k in (1 + 2 * i, 2 + 2 * i)) for i in range(n)]
    report["equal_sources"] = [[i, j] for i, j in itertools.combinations(range(n), 2) if columns[i] == columns[j]]
    return report


def report_lines(report: dict[str, Any]) -> list[str]:
    """A short table for the terminal; warnings last."""
    if "whole" not in report:
        return []
    width = max(len(source["name"]) for source in report["sources"])
    lines = [f"  {'source':{width}}  distance    1 - cosine  farthest tensor"]
    for i, source in enumerate(report["sources"]):
        whole, worst = report["whole"]["to_merged"][i], source["farthest"][0]
        far = report["tensors"][worst]["to_merged"][i]["distance"]
        figures = [_short(whole["distance"]), _short(None if whole["cosine"] is None else 1 - whole["cosine"])]
        lines.append(f"  {source['name']:{width}}  {figures[0]:10}  {figures[1]:10}  {worst} ({_short(far)})")
    for i, j in report["equal_sources"]:
        a, b = (report["sources"][k]["name"] for k in (i, j))
        lines.append(f"WARNING: {a} and {b} hold the same weights: they count twice")
    return lines


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def write_report(folder: Path, report: dict[str, Any]) -> None:
    write_bytes(folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())


# ------------------------------------------------------------------------------------------ greedy soup


def greedy_soup(
    names: Sequence[str], score: Callable[[Sequence[int]], float]
) -> tuple[list[int], list[dict[str, Any]]]:
    """The sources to average, and every decision: from the best source down, each stays if the average with it scores at
    least as well as without it (Wortsman et al. 2022, greedy soup). score([i, ...]) is the average's, higher is better.
    """
    decisions: list[dict[str, Any]] = []

    def scored(members: list[int]) -> float:
        value = score(members)
        decisions.append({"sources": [names[i] for i in members], "members": members, "score": value})
        return value

    own = [scored([i]) for i in range(len(names))]
    first, *others = sorted(range(len(names)), key=lambda i: -own[i])  # stable: of equal ones the first given
    kept, best = [first], own[first]
    for i in others:
        value = scored([*kept, i])
        decisions[-1]["kept"] = value >= best
        if value >= best:
            kept, best = [*kept, i], value
    return kept, decisions


# ------------------------------------------------------------------------------------------ how texts are encoded

UNKNOWN_LENGTH = 512  # tokens, of a folder that says nothing


def united_usage(
    named: Sequence[tuple[str, Usage]], task: str | None = None, document_task: str | None = None
) -> tuple[Usage, list[str]]:
    """(how texts of the merged model are encoded, what was chosen and is to be said).

    Equal usages are one. Of different ones all prompts are kept under their names, and the first source's default stays the
    default unless `task` or `document_task` (instructions; None: the sources' own) choose; of lengths the largest is taken.
    """
    first, said = named[0][1], list[str]()
    for attribute in ("pooling", "similarity"):
        values = {getattr(usage, attribute): name for name, usage in reversed(named)}
        if len(values) > 1:
            says = ", ".join(f"{name}: {value}" for value, name in values.items())
            raise UserError(f"the sources differ in {attribute} ({says}); only models that are used alike are averaged")
    prompts: dict[str, Prompts] = {}
    for source, usage in named:
        for name, entry in usage.prompts.items():
            if entry not in prompts.values():  # "query" is no task's name: of a folder that has but one prompt
                prompts[_free_name(source if name == "query" else name, prompts)] = entry
    defaults = {usage.default: name for name, usage in reversed(named)}
    default = first.default
    if task is not None or document_task is not None:
        if task is not None:
            query = query_prompt(task)
            default = next((p for p in prompts.values() if p.query == query), Prompts(query, default.document))
        if document_task is not None:
            default = default._replace(document=query_prompt(document_task))
        given = [f"--{k} {v!r}" for k, v in (("task", task), ("document-task", document_task)) if v is not None]
        said.append(f"default prompts: as {' and '.join(given)} say{'s' if len(given) == 1 else ''}")
    elif len(defaults) > 1:
        said.append(
            f"WARNING: the sources have {len(defaults)} default prompts; {named[0][0]}'s is the default of the merged model, "
            f"because it was given first: choose with --task and --document-task"
        )
    elif len(prompts) > 1:
        name = next(n for n, p in prompts.items() if p == default) if default in prompts.values() else "the folder"
        said.append(f"default prompts: those of {name}, the sources' own default; choose another task's with --task")
    if default in prompts.values():
        at = next(name for name, entry in prompts.items() if entry == default)
        prompts = {at: default} | prompts
    elif prompts or any(default):
        prompts = {_free_name("default", prompts): default, **prompts}
    lengths: dict[str, Any] = {}
    for attribute in ("query_max_length", "document_max_length"):
        known = [getattr(usage, attribute) for _, usage in named if getattr(usage, attribute)]
        lengths[attribute] = max(known, default=UNKNOWN_LENGTH)
        if not known:
            said.append(f"{attribute} is not known to the sources: {UNKNOWN_LENGTH} tokens are written")
        elif len(set(known)) > 1:
            said.append(f"{attribute}: the sources have {sorted(set(known))} tokens, the largest is written")
    return replace(first, prompts=prompts, **lengths), said


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    """`name` or name-2, name-3...: neither a task's already nor one of the keys that sentence-transformers gets for it."""
    keys = {"query", "document", *taken, *(f"{other}-document" for other in taken)}
    for count in itertools.count(1):
        free = name if count == 1 else f"{name}-{count}"
        if free not in keys and f"{free}-document" not in taken:
            return free
    raise AssertionError
