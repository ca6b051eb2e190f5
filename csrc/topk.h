// Streaming top-k below a ceiling: what the kernels of topk.cu promise.
//
// topk_update: a tile of scores.
//   key[r, j] = scores[r, j] * col_scale[j] * row_scale[r] + row_add[r]       each factor optional (null: left out)
//   state[r]  = the best `kept` of state[r] and of { (key[r, j], first_id + j) : -inf < key[r, j] < ceilings[r],
//                                                    first_id + j not in row r of the exclusion lists }
// merge_lists: what a GEMM kept of its tile, in any order.
//   state[r]  = the best `kept` of state[r] and of { (list_keys[r, i], first_id + list_columns[r, i]) :
//                                                    i < min(counts[r], length), -inf < list_keys[r, i] < +inf,
//                                                    the id not in row r of the exclusion lists }
//
// Order: key descending, then id ascending, so that the answer does not depend on how the columns were cut into tiles
// or in which order the tiles came. NaN and infinities are never kept; -0 ties with +0 and is stored as +0. Arithmetic:
// fp32, round to nearest, in the order written, never contracted to FMA: the same bits as the CPU implementation in
// nemo_embed_core/mine/search/streaming.py.
//
//   scores          [num_rows, num_columns], rows `stride` elements apart; fp32, bf16 (as 16 bits) or int32
//   row_scale       [num_rows] fp32 or null      row_add  [num_rows] fp32 or null
//   col_scale       [num_columns] fp32 or null   ceilings [num_rows] fp32, +inf: none
//   list_keys       [num_rows, length] fp32      list_columns [num_rows, length] int32
//   counts          [num_rows] int32: entries that were to be stored; beyond `length` of them the list is not whole,
//                   which is for the caller to notice
//   exclude_indptr  [num_rows + 1] int64 into exclude_ids, or null; ids of a row ascending, int64
//   state_keys      [num_rows, kept] fp32, best first, -inf in free places
//   state_ids       [num_rows, kept] int64, -1 in free places; 0 <= id < TOPK_MAX_ID
//
// Launch: one thread block per row, TOPK_THREADS threads, no dynamic shared memory. 1 <= kept <= TOPK_MAX_KEPT.
// A row whose state does not change is read once and nothing is written: n scores of traffic, no host synchronisation.
// Of a row whose count is 0 only the count is read.
// Deterministic: survivors land in the buffer in any order, but a total order sorts them.

#pragma once

#define TOPK_THREADS 128
#define TOPK_ITEMS 8        // columns, or entries of a list, per thread and step
#ifndef TOPK_CAPACITY
#define TOPK_CAPACITY 2048  // places of the buffer; a step of 128 * 8 columns must fit behind the kept ones
#endif                      // compiled again with 4096 for kept > 1024
#define TOPK_MAX_KEPT (TOPK_CAPACITY - TOPK_THREADS * TOPK_ITEMS)
#define TOPK_MAX_ID 0xFFFFFFFFLL  // ids share a 64-bit word with their key
