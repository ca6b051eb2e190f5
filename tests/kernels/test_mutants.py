"""The checks have teeth: each kernel bug planted here is caught by the very check that the healthy kernel
passes."""

import pytest

# As in test_info_nce.py and test_mean_pool.py.
SMALL_GROUPS = {
    "_COLUMNS": {size: [[2**40, 16, 32, 32, 4, 3]] for size in (2, 4)},
    "_GROUP": 2,
    "_PROGRAMS": 4,
}
CHUNKS = {"_CHUNK": 16, "_SCATTER_CHUNK": 16}

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
        "            acc = tl.dot(rows, docs.load([first_column, d_start]).T, acc, "
        "input_precision=PRECISION)\n",
        "            acc = tl.dot(rows, docs.load([first_column, d_start]).T, "
        "acc).to(tl.float16).to(tl.float32)\n",
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
        {"lengths": [3, 0, 5], "D": 64, "normalize": False},
        "tl.maximum(length, 1)",
        "tl.max(length, 0)",
    ),
    "pool: sequences end one token late": (
        "mean_pool",
        {
            "lengths": [3, 5, 20],
            "D": 64,
            "normalize": False,
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
        {"lengths": [3, 40], "D": 64, "normalize": False},
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
    "dropout_linear: columns are this rank's": (
        "dropout_linear",
        {"T": 5, "I": 40, "layer": 2, "first_column": 40, "rate": 0.3},
        "(first_column + offs_i)",
        "(offs_i)",
    ),
    "dropout_linear: all layers have one mask": (
        "dropout_linear",
        {"T": 5, "I": 40, "layer": 2, "first_column": 0, "rate": 0.3},
        "mix(row_keys ^ mix(layer.to(tl.uint32) + golden))",
        "mix(row_keys ^ mix(golden))",
    ),
    "dropout_linear: the gradient of x is of all columns": (
        "dropout_linear",
        {"T": 5, "I": 40, "layer": 2, "first_column": 0, "rate": 0.3},
        "dx_TI = ctx.dropout(dh_TR @ A_RI, token_keys_T, *ctx.place) if",
        "dx_TI = dh_TR @ A_RI if",
    ),
    "dropout_linear: every tile is the first of its rows": (
        "dropout_linear",
        {"T": 5, "I": 300, "layer": 2, "first_column": 0, "rate": 0.3},
        "tl.program_id(0) % tiles * BLOCK_I + tl.arange(0, BLOCK_I)",
        "tl.arange(0, BLOCK_I)",
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
    # One more would be written past the end, and kill the interpreter.
    "quantize_rows: the last column is left out": (
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
        "d1_ptr, offs_d, HALF, 2 * STEP, D, SHARED, UNROLL)\n        y0, y1 = _sums_of_chunks(\n"
        "            q0_ptr, q1_ptr, d0_ptr, d1_ptr, offs_d + STEP, HALF, 2 * STEP,",
        "d1_ptr, offs_d, HALF, STEP, D, SHARED, UNROLL)\n        y0, y1 = _sums_of_chunks(\n"
        "            q0_ptr, q1_ptr, d0_ptr, d1_ptr, offs_d + HALF * STEP, HALF, STEP,",
    ),
    "pair_scores: a loop over chunks forgets the second half": (
        "pair_scores",
        {"M": 20, "D": 64, "constants": {"_CONFIG": [4, 4]}},
        "offs = offs_d + i * STEP",
        "offs = offs_d",
    ),
    # ---- past the first tile, group, block or chunk of a loop
    "in batch: rows of every group of row blocks are those of the first": (
        "info_nce_in_batch",
        {"B": 70, "P": 37, "D": 32, "constants": SMALL_GROUPS},
        "return (group * GROUP + within % group_size) * BLOCK",
        "return (within % group_size) * BLOCK",
    ),
    "in batch: the last group of row blocks is taken for a whole one": (
        "info_nce_in_batch",
        {"B": 70, "P": 67, "D": 32, "constants": SMALL_GROUPS},
        "tl.minimum(tl.cdiv(num_rows, BLOCK) - group * GROUP, GROUP)",
        "GROUP",
    ),
    "in batch: only the first split counts": (
        "info_nce_in_batch",
        {"B": 20, "P": 100, "D": 32, "constants": SMALL_GROUPS},
        "for split in range(0, num_splits):",
        "for split in range(0, 1):",
    ),
    "in batch: the gradient of q is that of the last chunk": (
        "info_nce_in_batch",
        {"B": 5, "P": 300, "D": 64, "constants": {"_WORKSPACE": 5 * 4 * 128}},
        "dq_BD.add_(part_BD)",
        "part_BD",
    ),
    "in batch: every block of D is the first one": (
        "info_nce_in_batch",
        {"B": 5, "P": 37, "D": 64},
        "rows = q.load([first_row, d_start])",
        "rows = q.load([first_row, 0])",
    ),
    "hard: columns past the first block are left out": (
        "info_nce_hard",
        {"B": 6, "M": 3, "D": 70, "constants": {"_OWN_FORWARD": [2, 16, 1]}},
        "            products += docs * q[None, :]",
        "            products += tl.where(d_start < BLOCK_D, docs * q[None, :], 0.0)",
    ),
    "hard: backward, the radial part of documents past the first block": (
        "info_nce_hard",
        {"B": 6, "M": 7, "D": 32, "normalize": True, "constants": {"_OWN_BACKWARD": [4, 32, 1]}},
        "for m_start in range(BLOCK_M, M, BLOCK_M):",
        "for m_start in range(BLOCK_M, BLOCK_M, BLOCK_M):",
    ),
    "rms_norm: partial sums past the first block": (
        "rms_norm",
        {
            "T": 53,
            "D": 40,
            "residual": True,
            "constants": {"_BACKWARD_PROGRAMS": 37, "_SUM_ROWS": [16, 16, 1]},
        },
        "for start in range(0, P, BLOCK_P):",
        "for start in range(0, BLOCK_P, BLOCK_P):",
    ),
    "pool: ends of sequences past the first block": (
        "mean_pool",
        {"lengths": [1, 3, 0, 5] * 5, "D": 32, "normalize": False, "constants": {**CHUNKS, "_ENDS": 8}},
        "for start in range(0, N, ENDS):",
        "for start in range(0, ENDS, ENDS):",
    ),
    "pool: partial sums of a sequence past the first block": (
        "mean_pool",
        {"lengths": [3, 120], "D": 32, "normalize": False, "constants": CHUNKS},
        "for chunk in range(first_row // CHUNK, end_chunk, BLOCK_C):",
        "for chunk in range(first_row // CHUNK, first_row // CHUNK + BLOCK_C, BLOCK_C):",
    ),
    "rope: only the first head is turned": (
        "split_rope",
        {"T": 5, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
        "_move_head(qkv_ptrs + at, q_ptrs + at, cos, sin, mask, R, True)",
        "_move_head(qkv_ptrs + at, q_ptrs + at, cos, sin, mask, R, head == 0)",
    ),
    "swiglu: every tile of a block is its first": (
        "swiglu",
        {"T": 5, "num_blocks": 2, "width": 300},
        "(tile % tiles_per_block) * BLOCK_F + tl.arange(0, BLOCK_F)",
        "tl.arange(0, BLOCK_F)",
    ),
    "quantize_rows: every program takes the first rows": (
        "quantize_rows",
        {"N": 23, "D": 33, "constants": {"_CONFIG": [256, 1]}},
        "offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))",
        "offs_n = tl.arange(0, BLOCK_N)",
    ),
    "fp8: the largest value of a program's first block": (
        "fp8",
        {"R": 37, "C": 80, "amax": 0.875, "constants": {"_AMAX": [3, 64, 1]}},
        "most = tl.maximum(most, size_bits(",
        "most = tl.maximum(most, tl.where(start < 192, 1, 0) * size_bits(",
    ),
    "fp8: a NaN is no largest value": (
        "fp8",
        {"R": 37, "C": 80, "amax": 0.875},
        "x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF",
        "tl.where(x == x, x.to(tl.float32).to(tl.int32, bitcast=True), 0) & 0x7FFFFFFF",
    ),
    "fp8: a largest value begins with what was there": (
        "rms_norm",
        {"T": 5, "D": 64, "residual": True},
        "x.new_zeros((), dtype=torch.int32) if wanted",
        "x.new_empty((), dtype=torch.int32) if wanted",
    ),
    "fp8: every program writes its own largest value": (
        "rms_norm",
        {"T": 5, "D": 64, "residual": True},
        "mask=most > tl.load(amax_ptr), sem",
        "mask=tl.load(amax_ptr) == 0, sem",
    ),
    "rms_norm: the largest value before rounding": (
        "rms_norm",
        {"T": 5, "D": 64, "residual": True, "dtype": "fp16"},
        "note_amax(amax_ptr, size_bits(y))",
        "note_amax(amax_ptr, size_bits(weight * normed))",
    ),
    "rms_norm: the largest value of the first row": (
        "rms_norm",
        {"T": 5, "D": 64, "residual": True},
        "note_amax(amax_ptr, size_bits(y))",
        "note_amax(amax_ptr, tl.where(row == 0, size_bits(y), 0))",
    ),
    "swiglu: the largest value before rounding": (
        "swiglu",
        {"T": 5, "num_blocks": 2, "width": 40, "dtype": "fp16"},
        "note_amax(amax_ptr, size_bits(out))",
        "note_amax(amax_ptr, size_bits(gate * tl.sigmoid(gate) * up))",
    ),
    "swiglu: the largest gradient is that of a gate": (
        "swiglu",
        {"T": 5, "num_blocks": 2, "width": 40},
        "tl.maximum(size_bits(dgate.to(dtype)), size_bits(dup.to(dtype)))",
        "size_bits(dgate.to(dtype))",
    ),
    "fp8: the scale is not divided out": (
        "fp8",
        {"R": 37, "C": 80, "amax": 0.875},
        "tl.store(scale_ptr, tl.div_rn(amax, MAX))",
        "tl.store(scale_ptr, tl.div_rn(MAX, amax))",
    ),
    "fp8: padding of the transpose is left as it was": (
        "fp8",
        {"R": 37, "C": 80, "amax": 0.875},
        "(offs_r < R_PADDED)[None, :]",
        "(offs_r < R)[None, :]",
    ),
    "fp8: tiles past the first column of tiles": (
        "fp8",
        {"R": 37, "C": 80, "amax": 0.875, "constants": {"_TILE": [16, 32, 1]}},
        "(tl.program_id(0) % tiles).to(tl.int64) * BLOCK_C",
        "(tl.program_id(0) % tiles).to(tl.int64) * 0",
    ),
    "rotate_quantize: every program takes the first rows": (
        "rotate_quantize",
        {"N": 9, "D": 256, "constants": {"_ROWS": 4}},
        "first_n = tl.program_id(0).to(tl.int64) * ROWS",
        "first_n = tl.program_id(0).to(tl.int64) * 0",
    ),
    "filter: rows of every group are those of the first": (
        "filter_scores",
        {"Q": 70, "N": 70, "D": 32},
        "return (group * GROUP + within % group_size) * BLOCK",
        "return (within % group_size) * BLOCK",
    ),
    "filter: columns of D past the first block": (
        "filter_scores",
        {"Q": 5, "N": 70, "D": 96},
        "for d_start in range(0, D, BLOCK_D):",
        "for d_start in range(0, BLOCK_D, BLOCK_D):",
    ),
    "pair_scores: the reference stops after its first part": (
        "pair_scores",
        {"M": 53, "D": 30, "constants": {"_CHUNK": 30 * 8}},
        "in there.split(max(1, most))",
        "in there.split(max(1, most))[:1]",
    ),
    "adamw: the remainder is forgotten": (
        "adamw",
        {"sizes": [123, 7]},
        "((high << 16) + low).to(tl.float32",
        "(high << 16).to(tl.float32",
    ),
    "adamw: the weight is cut off and not rounded": (
        "adamw",
        {"sizes": [123, 7]},
        "        high = (bits + 0x8000) >> 16\n        tl.store",
        "        high = bits >> 16\n        tl.store",
    ),
    "adamw: gradients are not clipped": (
        "adamw",
        {"sizes": [123, 7]},
        "other=0.0).to(tl.float32) * factor",
        "other=0.0).to(tl.float32)",
    ),
    "adamw: no bias correction of the first moment": (
        "adamw",
        {"sizes": [123, 7]},
        "lr / (1 - beta1**step)",
        "lr",
    ),
    "adamw: weights do not decay": ("adamw", {"sizes": [123, 7]}, "        master *= keep\n", ""),
    "adamw: a refused step is taken": (
        "adamw",
        {"sizes": [123, 7], "factor": 0.0},
        "if factor != 0.0:",
        "if factor == factor:",
    ),
    "adamw: random bits of a moment are half of what is dropped": (
        "adamw_moments",
        {"moments": "bf16", "steps": 2},
        "bits = values.to(tl.int32, bitcast=True) + (random >> 16).to(tl.int32)",
        "bits = values.to(tl.int32, bitcast=True) + (random >> 17).to(tl.int32)",
    ),
    "adamw: the key is left out of the random bits": (
        "adamw_moments",
        {"moments": "bf16", "steps": 2},
        "(index + first).to(tl.uint32) ^ key.to(tl.uint32)",
        "(index + first).to(tl.uint32)",
    ),
    "adamw: random bits of a part go by its own columns": (
        "adamw_moments",
        {"moments": "bf16", "steps": 2},
        "index += index // columns * gap",
        "index += 0",
    ),
    "adamw: random bits of a part go by its own first element": (
        "adamw_moments",
        {"moments": "bf16", "steps": 2},
        "(index + first).to(tl.uint32) ^",
        "index.to(tl.uint32) ^",
    ),
    "adamw: codes are read with the base of another block": (
        "adamw_moments",
        {"moments": "8bit", "steps": 2},
        "tl.load(base_ptr + block, mask",
        "tl.load(base_ptr + block // 2, mask",
    ),
    "adamw: small codes of exp_avg_sq become 0": (
        "adamw_moments",
        {"moments": "8bit", "steps": 2},
        "tl.where(sizes > 0, tl.maximum(codes, 1), 0)",
        "tl.maximum(codes, 0)",
    ),
    "adamw: small codes of exp_avg are cut off": (
        "adamw_moments",
        {"moments": "8bit", "steps": 2},
        "tl.where(sizes < least, is_up.to(tl.int32), codes)",
        "tl.where(sizes < least, 0, codes)",
    ),
    # ---- few rows, which a budget for the whole tensor forgave
    "in batch: a small row is lost beside large ones": (
        "info_nce_in_batch",
        {"B": 40, "P": 37, "D": 64},
        "dpositive = tl.load(dpositive_ptr + b, mask=b < B, other=0.0) if HAS_LABELS else dlse",
        "dpositive = tl.load(dpositive_ptr + b, mask=b < B, other=0.0) if HAS_LABELS else dlse\n"
        "    dlse = tl.where(tl.abs(dlse) < 0.05, 0.0, dlse)",
    ),
}


@pytest.mark.slow  # make mutants runs them
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(interpreted, name):
    check, arguments, old, new = MUTANTS[name]
    assert interpreted(check, **arguments) is None, "the healthy kernel must pass"
    error = interpreted(check, mutation=(old, new), **arguments)
    assert error is not None, "the planted bug went unnoticed"
    assert "nothing to mutate" not in error, error
    # Noticed by the comparison and not by falling over, except where the bug is one that Triton itself
    # refuses.
    assert error.startswith("AssertionError") or "tl.max(" in new, error
