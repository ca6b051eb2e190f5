"""The checks have teeth: each kernel bug planted here is caught by the very check that the healthy kernel passes."""

import pytest

MUTANTS = {
    # name: (check, its arguments, text of the kernel file, what the bug makes of it)
    "hard: mask dropped from the softmax": (
        "info_nce_hard",
        {"B": 5, "M": 3, "D": 64},
        "p = tl.where(mask_m, tl.exp(scores - shift), 0.0)",
        "p = tl.exp(scores - shift)",
    ),
    "hard: running maximum is not carried over blocks": (
        "info_nce_hard",
        {"B": 4, "M": 17, "D": 64, "temperature": 0.005},
        "        running_max = new_max\n    lse = tl.where(total > 0, running_max + tl.log(total)",
        "        running_max = block_max\n    lse = tl.where(total > 0, running_max + tl.log(total)",
    ),
    "hard: temperature missing in the backward": (
        "info_nce_hard",
        {"B": 5, "M": 3, "D": 64},
        "tl.load(dlse_ptr + b) * p * inverse_temperature",
        "tl.load(dlse_ptr + b) * p",
    ),
    "hard: radial part of the normalised gradient lost": (
        "info_nce_hard",
        {"B": 5, "M": 3, "D": 64, "normalize": True},
        "dq = -radial_q * q",
        "dq = 0.0 * q",
    ),
    "in batch: temperature missing in the backward": (
        "info_nce_in_batch",
        {"B": 5, "P": 37, "D": 64},
        "(dlse * inverse_temperature)[:, None]",
        "dlse[:, None]",
    ),
    "in batch: minimum for maximum over tiles": (
        "info_nce_in_batch",
        {"B": 3, "P": 11 * 2 * 64 + 1, "D": 32, "temperature": 0.005},
        "new_max = tl.maximum(running_max, tl.max(scores, 1))",
        "new_max = tl.minimum(running_max, tl.max(scores, 1))",
    ),
    "in batch: columns past the end count": (
        "info_nce_in_batch",
        {"B": 5, "P": 37, "D": 64},
        "keep = (b < B)[:, None] & (p < P)[None, :]",
        "keep = (b < B)[:, None] & (p < P + 64)[None, :]",
    ),
    "in batch: the label is masked out by its own id": (
        "info_nce_in_batch",
        {"B": 5, "P": 37, "D": 64, "ids": True},
        " | (label[:, None] == p[None, :])",
        "",
    ),
    "in batch: fp16 accumulation of the scores": (
        "info_nce_in_batch",
        {"B": 5, "P": 37, "D": 100},
        "            acc = tl.dot(rows, docs.load([first_column, d_start]).T, acc, input_precision=PRECISION)\n",
        "            acc = tl.dot(rows, docs.load([first_column, d_start]).T, acc).to(tl.float16).to(tl.float32)\n",
    ),
    "in batch: fp16 accumulation where rows are not multiples of 16 bytes": (
        "info_nce_in_batch",
        {"B": 5, "P": 37, "D": 101},
        "acc = tl.dot(rows, columns, acc, input_precision=PRECISION)",
        "acc = tl.dot(rows, columns, acc, input_precision=PRECISION).to(tl.float16).to(tl.float32)",
    ),
    "in batch: gradient of a positive is lost from the second chunk on": (
        "info_nce_in_batch",
        {"B": 5, "P": 300, "D": 64, "constants": {"_WORKSPACE": 5 * 4 * 128}},
        "        first_column + column, column, B, P, width,",
        "        column, column, B, P, width,",
    ),
    "pool: max for maximum (the bug that Liger shipped)": (
        "mean_pool",
        {"lengths": [3, 0, 5], "D": 64, "normalize": False, "norm": False},
        "tl.maximum(length, 1)",
        "tl.max(length, 0)",
    ),
    "pool: sequences end one token late": (
        "mean_pool",
        {
            "lengths": [3, 5, 20],
            "D": 64,
            "normalize": False,
            "norm": False,
            "constants": {"_CHUNK": 16, "_SCATTER_CHUNK": 16},
        },
        "tl.where((offs_t < segment_end)[:, None], x, 0.0), 0)",
        "tl.where((offs_t <= segment_end)[:, None], x, 0.0), 0)",
    ),
    "pool: last chunk of a sequence forgotten": (
        "segment_sum",
        {"lengths": [3, 5, 20], "D": 64, "constants": {"_CHUNK": 16, "_SCATTER_CHUNK": 16}},
        "(end_row - 1) // CHUNK + 1, 0)",
        "(end_row - 1) // CHUNK, 0)",
    ),
    "pool: offset of the shard ignored in the backward": (
        "segment_sum",
        {"lengths": [3, 5, 20], "D": 64, "shards": [2]},
        "mask=inside, other=0).to(tl.int64) - token_offset",
        "mask=inside, other=0).to(tl.int64)",
    ),
    "pool: fp16 accumulation": (
        "mean_pool",
        {"lengths": [3, 40], "D": 64, "normalize": False, "norm": False},
        "        if segment_end <= end:",
        "        acc = acc.to(tl.float16).to(tl.float32)\n        if segment_end <= end:",
    ),
    "rms_norm: eps dropped": (
        "rms_norm",
        {"T": 5, "D": 64, "residual": False},
        "tl.sum(hidden * hidden, 0) / D + eps",
        "tl.sum(hidden * hidden, 0) / D",
    ),
    "rms_norm: padding lanes count in the mean": (
        "rms_norm",
        {"T": 5, "D": 100, "residual": True},
        "tl.sum(hidden * hidden, 0) / D + eps",
        "tl.sum(hidden * hidden, 0) / BLOCK_D + eps",
    ),
    "rms_norm: a program keeps only its last row's dweight": (
        "rms_norm",
        {"T": 23, "D": 64, "residual": True, "constants": {"_BACKWARD_PROGRAMS": 7}},
        "dweight += dy * normed",
        "dweight = dy * normed",
    ),
    "rope: the backward turns the wrong way": (
        "split_rope",
        {"T": 5, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
        "sin = -sin",
        "sin = sin",
    ),
    "rope: v is left unwritten": (
        "split_rope",
        {"T": 5, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
        "        _move_head(qkv_ptrs + 2 * R, v_ptr + k_offs, cos, sin, mask, R, False)\n",
        "",
    ),
    "swiglu: derivative of the sigmoid instead of silu": (
        "swiglu",
        {"T": 5, "num_blocks": 2, "width": 40},
        "sigmoid * (1 + gate * (1 - sigmoid))",
        "sigmoid * (1 - sigmoid)",
    ),
    "swiglu: gate and up are not in blocks": (
        "swiglu",
        {"T": 5, "num_blocks": 2, "width": 40},
        "(2 * block * WIDTH + offs_f)",
        "(block * WIDTH + offs_f)",
    ),
    "quantize_rows: the error of the values before rounding": (
        "quantize_rows",
        {"N": 5, "D": 40},
        "stored = rounded * scale[:, None]",
        "stored = (x / scale[:, None]) * scale[:, None]",
    ),
    "quantize_rows: an infinity is taken for a number": (
        "quantize_rows",
        {"N": 5, "D": 40},
        'tl.abs(loaded) < float("inf"), 0, 1',
        "loaded == loaded, 0, 1",
    ),
    "quantize_rows: the last column is left out": (  # one more would be written past the end, and kill the interpreter
        "quantize_rows",
        {"N": 5, "D": 40},
        "(offs_n < N)[:, None] & (offs_d < D)[None, :]",
        "(offs_n < N)[:, None] & (offs_d < D - 1)[None, :]",
    ),
    "filter: columns past the end are appended": (
        "filter_scores",
        {"Q": 5, "N": 70, "D": 32, "scaled": False},
        'tl.where((n < N)[None, :], keys, float("nan"))',
        "keys",
    ),
    "filter: the limit is let in": (
        "filter_scores",
        {"Q": 20, "N": 200, "D": 32},
        "(keys < limit[:, None])",
        "(keys <= limit[:, None])",
    ),
    "filter: the right halves have the columns of the left ones": (
        "filter_scores",
        {"Q": 20, "N": 200, "D": 32},
        "first_column + WIDTH // 2",
        "first_column",
    ),
    "filter: a full list is written over": (
        "filter_scores",
        {"Q": 20, "N": 200, "D": 32},
        "stored = keep & (place < L)",
        "stored = keep",
    ),
    "filter: scaled columns past the end are appended": (
        "filter_scores",
        {"Q": 5, "N": 70, "D": 32},
        'mask=n < N, other=float("nan"))',
        "mask=n < N, other=0.0)",
    ),
    "filter: every document is given the spread of the first": (
        "filter_scores",
        {"Q": 20, "N": 200, "D": 32},
        "tl.load(spread_ptr + n,",
        "tl.load(spread_ptr + 0 * n,",
    ),
    "filter: the documents' scales are left out": (
        "filter_scores",
        {"Q": 20, "N": 200, "D": 32},
        'keys = keys * tl.load(document_scale_ptr + n, mask=n < N, other=float("nan"))[None, :]',
        "keys = keys",
    ),
    "rotate_quantize: a level adds where it should subtract": (
        "rotate_quantize",
        {"N": 5, "D": 256},
        "tl.where(is_second, -x, x)",
        "x",
    ),
    "rotate_quantize: a difference across lanes is doubled": (
        "rotate_quantize",
        {"N": 5, "D": 256, "dtype": "fp16"},
        "tl.where(is_second, -2.0, 0.0)",
        "tl.where(is_second, -3.0, 0.0)",
    ),
    "rotate_quantize: one bit of the matrix does not count": (
        "rotate_quantize",
        {"N": 5, "D": 256, "dtype": "fp16"},
        "common ^= common >> 1",
        "common ^= 0",
    ),
    "rotate_quantize: signs are forgotten": (
        "rotate_quantize",
        {"N": 5, "D": 256, "dtype": "fp16"},
        "tl.trans(loaded * signs)",
        "tl.trans(loaded)",
    ),
    "rotate_quantize: the error of the values before rounding": (
        "rotate_quantize",
        {"N": 5, "D": 256},
        "(shifted - 12582912.0) * scale",
        "x / scale * scale",
    ),
    "rotate_quantize: the row ahead is not kept": (
        "rotate_quantize",
        {"N": 5, "D": 256, "dtype": "fp16"},
        "tl.minimum(n + 1, last_n)",
        "tl.minimum(n, last_n)",
    ),
    "rotate_quantize: an infinity is taken for a number": (
        "rotate_quantize",
        {"N": 5, "D": 256, "dtype": "fp16"},
        'tl.where(broken, float("nan"), scale)',
        "scale",
    ),
    "pair_scores: fp32 products": (
        "pair_scores",
        {"M": 20, "D": 100},
        "x0, x1 = q0 * d0, q1 * d1",
        "x0, x1 = (q0.to(tl.float32) * d0.to(tl.float32)).to(tl.float64), q1 * d1",
    ),
    "pair_scores: a missing document scores": (
        "pair_scores",
        {"M": 20, "D": 100},
        'tl.where(id >= 0, score, float("nan"))',
        "tl.sum(x, 0).to(tl.float32)",
    ),
    "pair_scores: two neighbours always share a query": (
        "pair_scores",
        {"M": 20, "D": 100},
        "if row0 == row1:",
        "if row0 <= row1:",
    ),
    "pair_scores: neighbouring chunks are added first": (
        "pair_scores",
        {"M": 20, "D": 100, "constants": {"_CONFIG": [4, 32]}},
        "offs_d, HALF, 2 * STEP, D, SHARED, UNROLL)\n        y0, y1 = _sums_of_chunks(q0_ptr, q1_ptr, d0_ptr, d1_ptr, "
        "offs_d + STEP, HALF, 2 * STEP,",
        "offs_d, HALF, STEP, D, SHARED, UNROLL)\n        y0, y1 = _sums_of_chunks(q0_ptr, q1_ptr, d0_ptr, d1_ptr, "
        "offs_d + HALF * STEP, HALF, STEP,",
    ),
    "pair_scores: a loop over chunks forgets the second half": (
        "pair_scores",
        {"M": 20, "D": 64, "constants": {"_CONFIG": [4, 4]}},
        "offs = offs_d + i * STEP",
        "offs = offs_d",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(interpreted, name):
    check, arguments, old, new = MUTANTS[name]
    assert interpreted(check, **arguments) is None, "the healthy kernel must pass"
    error = interpreted(check, mutation=(old, new), **arguments)
    assert error is not None, "the planted bug went unnoticed"
    assert "nothing to mutate" not in error, error
    # Noticed by the comparison and not by falling over, except where the bug is one that Triton itself refuses.
    assert error.startswith("AssertionError") or "tl.max(" in new, error
