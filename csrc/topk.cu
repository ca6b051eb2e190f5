// Entry points of topk.h; topk_update has one per type of score. Compiled at first use by NVRTC
// (nemo_embed_core/mine/search/streaming.py), and by nvcc in a test.

#include "topk_kernels.cuh"

#define TOPK_ENTRY(name, type)                                                                                       \
    extern "C" __global__ void __launch_bounds__(TOPK_THREADS, 7) name(                                                 \
        const type* scores, long long stride, long long num_columns, const float* row_scale, const float* col_scale, \
        const float* row_add, const float* ceilings, const long long* exclude_indptr, const long long* exclude_ids,  \
        long long first_id, float* state_keys, long long* state_ids, int kept) {                                     \
        topk_update<type>(scores, stride, num_columns, row_scale, col_scale, row_add, ceilings, exclude_indptr,      \
                          exclude_ids, first_id, state_keys, state_ids, kept);                                       \
    }

TOPK_ENTRY(topk_update_fp32, float)
TOPK_ENTRY(topk_update_bf16, Bf16)
TOPK_ENTRY(topk_update_int32, int)

extern "C" __global__ void __launch_bounds__(TOPK_THREADS, 7) merge_lists(
    const float* list_keys, const int* list_columns, long long length, const int* counts,
    const long long* exclude_indptr, const long long* exclude_ids, long long first_id, float* state_keys,
    long long* state_ids, int kept) {
    merge_row(list_keys, list_columns, length, counts, exclude_indptr, exclude_ids, first_id, state_keys, state_ids,
              kept);
}
