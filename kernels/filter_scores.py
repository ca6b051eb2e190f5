"""The few scores of a product of two matrices that lie between a floor and a limit of their row, without the
matrix.

Contract: key[q, n] = (queries[q] . documents[n]) * document_scale[n] * query_scale[q] + slope[q] * spread[n]
+ add[q] in fp32, where a product may be fused with the sum after it (int8: the sum of products is exact in
int32); of every row those with floor[q] <= key < limit[q] are appended to its list, in any order, with their
columns. NaN is in no list. counts says how many there were: more than the list's length L are counted, not
stored.

The GEMM of a search for the best documents: once a row has its C best of the documents so far, few of the
next can enter, and storing [Q, N] scores to read them back costs as much memory traffic as the GEMM allows in
its whole time.
"""

# Q queries · N documents · D columns · L places of a list

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nemo_embed_core.kernels.tiles import grouped, halves


def filter_scores_ref(
    queries_QD, documents_ND, floor_Q, limit_Q, length,
    query_scale_Q=None, document_scale_N=None, add_Q=None, slope_Q=None, spread_N=None,
):  # fmt: skip
    wide = torch.float64 if queries_QD.dtype == torch.int8 else torch.float32  # int8: exact
    keys_QN = (queries_QD.to(wide) @ documents_ND.to(wide).T).float()
    if document_scale_N is not None:
        keys_QN = keys_QN * document_scale_N
    if query_scale_Q is not None:
        keys_QN = keys_QN * query_scale_Q[:, None]
    if slope_Q is not None and spread_N is not None:
        keys_QN = keys_QN + slope_Q[:, None] * spread_N
    if add_Q is not None:
        keys_QN = keys_QN + add_Q[:, None]
    keep_QN = (keys_QN >= floor_Q[:, None]) & (keys_QN < limit_Q[:, None])
    rows, columns = keep_QN.nonzero(as_tuple=True)
    counts_Q = keep_QN.sum(1, dtype=torch.int32)
    places = torch.arange(len(rows), device=rows.device) - (counts_Q.cumsum(0) - counts_Q)[rows]
    stored = places < length
    rows, columns, places = rows[stored], columns[stored], places[stored]
    list_keys_QL = keys_QN.new_empty(len(keys_QN), length)
    list_columns_QL = torch.empty_like(list_keys_QL, dtype=torch.int32)
    list_keys_QL[rows, places] = keys_QN[rows, columns]
    list_columns_QL[rows, places] = columns.to(torch.int32)
    return list_keys_QL, list_columns_QL, counts_Q


# element size -> BLOCK_Q, BLOCK_N, BLOCK_D, num_warps, num_stages, and how many blocks of queries run side by
# side, as in info_nce_columns.py: the fastest on an H200 (docs/log.md). int8: two programs per SM, so that
# one multiplies while the other appends.
_TILE = {1: (128, 128, 128, 8, 3, 32), 2: (128, 256, 64, 8, 3, 8)}
_PART = 32  # columns of a tile that are compared and appended at a time
_PACK = 8  # numbers of a thread that one branch is for


def _append_asm(pack: int) -> tuple[str, str]:
    """(PTX, constraints) of a predicated append, for `pack` keys of a thread at a time:

        if key >= floor and key < limit:                 # false for NaN
            place = atomicAdd(counts + q, 1)
            if place < L:
                list_keys[q * L + place] = key
                list_columns[q * L + place] = n

    In PTX, because a branch in Triton is taken by the whole program: its warps would meet to agree on it, and
    nearly every tile has a key to append somewhere. Here each warp branches alone, and most skip all of it.
    The two loops keep the atomics of a pack in flight together: no store waits for its own place before the
    next key's atomic is issued.
    """
    # inline_asm_elementwise numbers the registers operand by operand, `pack` of each. The first is the result
    # that it insists on; scalars (L, pointers) and the row's vectors are repeated for every key.
    result, key, floor, limit, row, column, length, counts, list_keys, list_columns = (
        [f"${operand * pack + i}" for i in range(pack)] for operand in range(10)
    )
    code = [".reg .pred any, keep<PACK>;", ".reg .b32 place<PACK>;", ".reg .b64 at<PACK>, address;"]
    # any = a key of this thread reaches its floor; limits are rarely what excludes a key
    code += [f"setp.ge.f32 any, {key[0]}, {floor[0]};"]
    code += [f"setp.ge.or.f32 any, {key[i]}, {floor[i]}, any;" for i in range(1, pack)]
    code += ["@!any bra DONE;"]
    for i in range(pack):
        code += [
            f"setp.ge.f32 keep{i}, {key[i]}, {floor[i]};",
            f"setp.lt.and.f32 keep{i}, {key[i]}, {limit[i]}, keep{i};",
            # place = counts[row]++
            f"mad.wide.s32 address, {row[i]}, 4, {counts[0]};",
            f"@keep{i} atom.global.gpu.relaxed.add.u32 place{i}, [address], 1;",
        ]
    for i in range(pack):
        code += [
            # a full list only counts
            f"setp.lt.and.s32 keep{i}, place{i}, {length[0]}, keep{i};",
            # at = 4 (row L + place), in 64 bits
            f"cvt.s64.s32 at{i}, place{i};",
            f"mad.wide.s32 at{i}, {row[i]}, {length[0]}, at{i};",
            f"shl.b64 at{i}, at{i}, 2;",
            f"add.s64 address, at{i}, {list_keys[0]};",
            f"@keep{i} st.global.f32 [address], {key[i]};",
            f"add.s64 address, at{i}, {list_columns[0]};",
            f"@keep{i} st.global.u32 [address], {column[i]};",
        ]
    code += ["DONE:", *(f"mov.b32 {register}, 0;" for register in result)]
    text = "\n".join(["{", *code, "}"]).replace("<PACK>", f"<{pack}>")
    # "=r": the int32 result; f: key, floor, limit; r: row, column, L; l: the three pointers
    kinds = ["=r"] + ["f"] * 3 + ["r"] * 3 + ["l"] * 3
    return text, ",".join(kind for kind in kinds for _ in range(pack))


@triton.jit
def _append(
    products, q, query_scale, slope, add, floor, limit, first_column, document_scale_ptr, spread_ptr,
    list_keys_ptr, list_columns_ptr, counts_ptr, N, L,
    SCALED: tl.constexpr, SPREAD: tl.constexpr, PART: tl.constexpr,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Scales the products of rows q and some columns and appends what lies between floor and limit.

    Wider blocks than PART columns are halved first, a register apart from its neighbours: a whole tile's
    places and addresses do not fit beside its products.
    """
    WIDTH: tl.constexpr = products.shape[1]
    if WIDTH > PART:
        left, right = halves(products)
        _append(
            left, q, query_scale, slope, add, floor, limit, first_column, document_scale_ptr, spread_ptr,
            list_keys_ptr, list_columns_ptr, counts_ptr, N, L, SCALED, SPREAD, PART, ASM, CONSTRAINTS, PACK,
        )  # fmt: skip
        _append(
            right, q, query_scale, slope, add, floor, limit, first_column + WIDTH // 2, document_scale_ptr,
            spread_ptr, list_keys_ptr, list_columns_ptr, counts_ptr, N, L,
            SCALED, SPREAD, PART, ASM, CONSTRAINTS, PACK,
        )  # fmt: skip
    else:
        n = first_column + tl.arange(0, WIDTH)
        keys = products.to(tl.float32)
        if SCALED:  # NaN is not appended
            keys = keys * tl.load(document_scale_ptr + n, mask=n < N, other=float("nan"))[None, :]
            keys = keys * query_scale[:, None]
        else:
            keys = tl.where((n < N)[None, :], keys, float("nan"))
        if SPREAD:
            keys = keys + slope[:, None] * tl.load(spread_ptr + n, mask=n < N, other=0.0)[None, :]
        keys = keys + add[:, None]
        if PACK > 0:
            tl.inline_asm_elementwise(
                ASM, CONSTRAINTS,
                [
                    keys, floor[:, None], limit[:, None], q[:, None], n[None, :], L,
                    counts_ptr.to(tl.int64), list_keys_ptr.to(tl.int64), list_columns_ptr.to(tl.int64),
                ],
                tl.int32, is_pure=False, pack=PACK,
            )  # fmt: skip
        else:
            keep = (keys >= floor[:, None]) & (keys < limit[:, None])
            place = tl.atomic_add(
                counts_ptr + q[:, None] + tl.zeros_like(n)[None, :], 1, mask=keep, sem="relaxed"
            )
            stored = keep & (place < L)
            offs = q.to(tl.int64)[:, None] * L + place
            tl.store(list_keys_ptr + offs, keys, mask=stored)
            tl.store(list_columns_ptr + offs, n[None, :] + tl.zeros_like(q)[:, None], mask=stored)


@triton.jit
def _filter_scores_kernel(
    queries, documents, query_scale_ptr, document_scale_ptr, add_ptr, slope_ptr, spread_ptr, floor_ptr,
    limit_ptr, list_keys_ptr, list_columns_ptr, counts_ptr, Q, N, L,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    INT8: tl.constexpr, SCALED: tl.constexpr, ADDED: tl.constexpr, SPREAD: tl.constexpr, PART: tl.constexpr,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """One program: one tile of scores."""
    first_row, tile = grouped(Q, tl.cdiv(N, BLOCK_N), BLOCK_Q, GROUP)
    first_column = tile * BLOCK_N
    acc = tl.zeros((BLOCK_Q, BLOCK_N), tl.int32 if INT8 else tl.float32)
    for d_start in range(0, D, BLOCK_D):
        rows = queries.load([first_row, d_start])
        acc = tl.dot(rows, documents.load([first_column, d_start]).T, acc, out_dtype=acc.dtype)
    q = first_row + tl.arange(0, BLOCK_Q)
    floor = tl.load(floor_ptr + q, mask=q < Q, other=float("inf"))
    # Nothing is below it in rows past the end.
    limit = tl.load(limit_ptr + q, mask=q < Q, other=-float("inf"))
    query_scale = tl.load(query_scale_ptr + q, mask=q < Q, other=0.0) if SCALED else floor
    add = tl.load(add_ptr + q, mask=q < Q, other=0.0) if ADDED else tl.zeros_like(floor)
    slope = tl.load(slope_ptr + q, mask=q < Q, other=0.0) if SPREAD else floor
    _append(
        acc, q, query_scale, slope, add, floor, limit, first_column, document_scale_ptr, spread_ptr,
        list_keys_ptr, list_columns_ptr, counts_ptr, N, L, SCALED, SPREAD, PART, ASM, CONSTRAINTS, PACK,
    )  # fmt: skip


@torch.library.custom_op("nemo_embed_core::filter_scores", mutates_args=())
def filter_scores_kernel(
    queries_QD: torch.Tensor,
    documents_ND: torch.Tensor,
    floor_Q: torch.Tensor,
    limit_Q: torch.Tensor,
    length: int,
    query_scale_Q: torch.Tensor | None = None,
    document_scale_N: torch.Tensor | None = None,
    add_Q: torch.Tensor | None = None,
    slope_Q: torch.Tensor | None = None,
    spread_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_queries, num_columns = queries_QD.shape
    num_documents = documents_ND.shape[0]
    queries_QD, documents_ND = queries_QD.contiguous(), documents_ND.contiguous()
    list_keys_QL = floor_Q.new_empty(num_queries, length)
    list_columns_QL = torch.empty_like(list_keys_QL, dtype=torch.int32)
    counts_Q = torch.zeros(num_queries, dtype=torch.int32, device=floor_Q.device)
    block_q, block_n, block_d, num_warps, num_stages, group = _TILE[queries_QD.element_size()]
    # The interpreter has no PTX: the lines that it stands for.
    pack = 0 if triton.knobs.runtime.interpret else _PACK
    code, constraints = _append_asm(pack) if pack else ("", "")
    if num_queries and num_documents:
        _filter_scores_kernel[(triton.cdiv(num_queries, block_q) * triton.cdiv(num_documents, block_n),)](
            TensorDescriptor.from_tensor(queries_QD, [block_q, block_d]),
            TensorDescriptor.from_tensor(documents_ND, [block_n, block_d]),
            *(
                floor_Q if x is None else x.contiguous()
                for x in (query_scale_Q, document_scale_N, add_Q, slope_Q, spread_N)
            ),
            floor_Q.contiguous(), limit_Q.contiguous(), list_keys_QL, list_columns_QL, counts_Q,
            num_queries, num_documents, length,
            D=num_columns, BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_D=block_d, GROUP=group,
            INT8=queries_QD.dtype == torch.int8, SCALED=query_scale_Q is not None, ADDED=add_Q is not None,
            SPREAD=spread_N is not None, PART=_PART,
            ASM=code, CONSTRAINTS=constraints, PACK=pack,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return list_keys_QL, list_columns_QL, counts_Q


@filter_scores_kernel.register_fake
def _(queries_QD, documents_ND, floor_Q, limit_Q, length, *_):
    list_keys_QL = floor_Q.new_empty(queries_QD.shape[0], length)
    counts_Q = floor_Q.new_empty(queries_QD.shape[0], dtype=torch.int32)
    return list_keys_QL, torch.empty_like(list_keys_QL, dtype=torch.int32), counts_Q


def filter_scores(
    queries_QD: torch.Tensor,
    documents_ND: torch.Tensor,
    floor_Q: torch.Tensor,
    limit_Q: torch.Tensor,
    length: int,
    query_scale_Q: torch.Tensor | None = None,
    document_scale_N: torch.Tensor | None = None,
    add_Q: torch.Tensor | None = None,
    slope_Q: torch.Tensor | None = None,
    spread_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """keys = (queries @ documents.T) * document_scale * query_scale[:, None] + slope[:, None] * spread +
    add[:, None]; rows, columns = ((keys >= floor[:, None]) & (keys < limit[:, None])).nonzero(), by row

    queries [Q, D], documents [N, D]: both int8 (with both scales), bf16 or fp16; rows of a multiple of 16
    bytes.
    floor, limit, scales, add [Q], slope [Q] with spread [N]: fp32 vectors; all but floor and limit optional.
    length: places of a row's list.
    Returns keys [Q, length] fp32 and columns [Q, length] int32, of which the first min(counts[q], length) are
    written, in any order, and counts [Q] int32, which may exceed length.  CUDA: Triton, tensors on the
    current device.
    """
    if queries_QD.dtype != documents_ND.dtype or queries_QD.shape[1] != documents_ND.shape[1]:
        raise ValueError(
            f"filter_scores wants queries and documents of one dtype and width, not {list(queries_QD.shape)} "
            f"{queries_QD.dtype} and {list(documents_ND.shape)} {documents_ND.dtype}"
        )
    if queries_QD.shape[1] * queries_QD.element_size() % 16:
        raise ValueError(
            f"filter_scores wants rows of a multiple of 16 bytes, not {queries_QD.shape[1]} columns"
        )
    run = filter_scores_kernel if queries_QD.is_cuda else filter_scores_ref
    scales = query_scale_Q, document_scale_N
    return run(queries_QD, documents_ND, floor_Q, limit_Q, length, *scales, add_Q, slope_Q, spread_N)
