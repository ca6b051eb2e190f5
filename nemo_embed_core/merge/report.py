"""merge-report.json: how far each source a is from the result m, and from each other one b.

    distance    |a - m| / |a|
    cosine      <a, m> / (|a| |m|)

of every tensor and of all as one vector, from sums of squares that the streaming pass adds up block by block.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.checkpoint.weights import Weights
from nemo_embed_core.files.durable import write_bytes
from nemo_embed_core.files.safetensors import dtype_name
from nemo_embed_core.model.spec import hf_shapes

REPORT = "merge-report.json"
_MEANING = "distance: |a - b| / |a|; cosine: <a, b> / (|a| |b|); a: the source, b: the merged or other one"


def source_pairs(num_sources: int) -> list[tuple[int, int]]:
    """The pairs of sources that are compared: of more than three there would be too many to read."""
    return list(itertools.combinations(range(num_sources), 2)) if num_sources <= 3 else []


def squares(a_NC: Tensor, m_C: Tensor, pairs: Sequence[tuple[int, int]]) -> list[float]:
    """|m|^2, |a|^2 and |a - m|^2 of every source, then |a - b|^2 of every pair; leaves a - m in `a_NC`."""
    norms = [torch.linalg.vector_norm(x, dim=1).tolist() for x in (m_C[None], a_NC)]
    between = [float(torch.linalg.vector_norm(a_NC[i] - a_NC[j])) for i, j in pairs]
    norms += [torch.linalg.vector_norm(a_NC.sub_(m_C), dim=1).tolist(), between]
    squared = [[norm**2 for norm in group] for group in norms]
    return squared[0] + [x for both in zip(*squared[1:3], strict=True) for x in both] + squared[3]


def _compare(aa: float, bb: float, dd: float) -> dict[str, float | None]:
    """|a - b| / |a| and the cosine from |a|^2, |b|^2, |a - b|^2; None where they mean nothing."""
    a, b = math.sqrt(aa), math.sqrt(bb)
    return {
        "distance": math.sqrt(dd) / a if a else None,
        # Not <a, b> / (|a| |b|): for close tensors everything that matters would cancel.
        "cosine": 1 - (dd - (a - b) ** 2) / (2 * a * b) if a and b else None,
    }


def make_report(
    sources: Sequence[Weights], dtype: torch.dtype, sums: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """The report, of one source without distances.  sums: {tensor: sum over its blocks of squares()}."""
    n, pairs = len(sources), source_pairs(len(sources))
    shapes = hf_shapes(sources[0].model)
    report: dict[str, Any] = {
        "dtype": dtype_name(dtype),
        "num_tensors": len(shapes),
        "num_parameters": sum(torch.Size(shape).numel() for shape in shapes.values()),
        "sources": [{"name": s.name, "dtype": dtype_name(s.dtype)} for s in sources],
    }
    if n == 1:
        return report

    def row(values: Sequence[float]) -> dict[str, Any]:
        mm, own, between = values[0], values[1 : 1 + 2 * n], values[1 + 2 * n :]
        result: dict[str, Any] = {"to_merged": [_compare(own[2 * i], mm, own[2 * i + 1]) for i in range(n)]}
        if pairs:
            result["between"] = [
                {"sources": [i, j], **_compare(own[2 * i], own[2 * j], dd)}
                for (i, j), dd in zip(pairs, between, strict=True)
            ]
        return result

    report["meaning"] = _MEANING
    report["whole"] = row([sum(column) for column in zip(*sums.values(), strict=True)])
    report["tensors"] = {name: row(values) for name, values in sums.items()}
    tensors = report["tensors"].items()
    for i, source in enumerate(report["sources"]):
        distance = {name: tensor["to_merged"][i]["distance"] or 0.0 for name, tensor in tensors}
        source["farthest"] = sorted(distance, key=lambda name: -distance[name])[:5]
    # Sources of equal values have equal sums, to the last bit.
    columns = [tuple(values[k] for values in sums.values() for k in (1 + 2 * i, 2 + 2 * i)) for i in range(n)]
    every_pair = itertools.combinations(range(n), 2)
    report["equal_sources"] = [[i, j] for i, j in every_pair if columns[i] == columns[j]]
    return report


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """A short table for the terminal; warnings last."""
    if "whole" not in report:
        return []
    width = max(len(source["name"]) for source in report["sources"])
    lines = [f"  {'source':{width}}  distance    1 - cosine  farthest tensor"]
    for i, source in enumerate(report["sources"]):
        whole, worst = report["whole"]["to_merged"][i], source["farthest"][0]
        far = report["tensors"][worst]["to_merged"][i]["distance"]
        angle = None if whole["cosine"] is None else 1 - whole["cosine"]
        figures = [_short(whole["distance"]), _short(angle)]
        lines.append(f"  {source['name']:{width}}  {figures[0]:10}  {figures[1]:10}  {worst} ({_short(far)})")
    for i, j in report["equal_sources"]:
        a, b = (report["sources"][k]["name"] for k in (i, j))
        lines.append(f"WARNING: {a} and {b} hold the same weights: they count twice")
    return lines


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    write_bytes(folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())
