"""What a rank holds of a parameter: a box, (offset, size) per dim of its global tensor."""

from __future__ import annotations

from torch import Tensor

from nemo_embed_core.parallel.layout import tp_chunk

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, size


def local_box(
    shape: tuple[int, ...],
    dim: int | None,
    tp_rank: int,
    tp_size: int,
    dp_rank: int,
    dp_size: int,
    unit: int = 1,
) -> Box:
    """What (tp_rank, dp_rank) holds: the tp chunk, then FSDP2's torch.chunk of its dim 0. Always one
    contiguous box.

    What the rank holds beyond `shape` (tp_chunk) is no part of it: `unpadded` takes the box out of the rank's
    tensor.
    """
    offset, size = [0] * len(shape), list(shape)
    if dim is not None:
        size[dim] = tp_chunk(shape[dim], tp_size, unit)
        offset[dim] = size[dim] * tp_rank
    chunk = -(-size[0] // dp_size)
    start, stop = min(chunk * dp_rank, size[0]), min(chunk * (dp_rank + 1), size[0])
    offset[0] += start
    size[0] = stop - start
    starts = [min(o, full) for o, full in zip(offset, shape, strict=True)]
    ends = [min(o + s, full) for o, s, full in zip(offset, size, shape, strict=True)]
    return tuple(starts), tuple(end - start for start, end in zip(starts, ends, strict=True))


def unpadded(tensor: Tensor, box: Box) -> Tensor:
    """The part of a rank's tensor that is its box: all but the padding, which stands behind it."""
    assert all(have >= s for have, s in zip(tensor.shape, box[1], strict=True)), f"{tensor.shape=} {box=}"
    return tensor[tuple(slice(0, s) for s in box[1])]
