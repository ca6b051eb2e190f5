// csrc/topk_kernels.cuh on the host: the library that tests/mine/test_csrc.py loads with ctypes.

#include <algorithm>

#include "host_cuda.h"

#include "topk_kernels.cuh"

struct Arguments {
    const void* scores;
    int type;
    long long stride, num_columns;
    const float *row_scale, *col_scale, *row_add, *ceilings;
    const long long *exclude_indptr, *exclude_ids;
    long long first_id;
    float* state_keys;
    long long* state_ids;
    int kept;
};

template <typename T>
static void run(const Arguments& a) {
    topk_update<T>((const T*)a.scores, a.stride, a.num_columns, a.row_scale, a.col_scale, a.row_add, a.ceilings,
                   a.exclude_indptr, a.exclude_ids, a.first_id, a.state_keys, a.state_ids, a.kept);
}

static void body(void* argument) {
    const Arguments& a = *(const Arguments*)argument;
    if (a.type == 0) run<float>(a);
    else if (a.type == 1) run<Bf16>(a);
    else run<int>(a);
}

extern "C" bool host_topk(int num_rows, int num_threads, int order, int type, const void* scores, long long stride,
                          long long num_columns, const float* row_scale, const float* col_scale, const float* row_add,
                          const float* ceilings, const long long* exclude_indptr, const long long* exclude_ids,
                          long long first_id, float* state_keys, long long* state_ids, int kept) {
    Arguments a{scores, type, stride, num_columns, row_scale, col_scale, row_add, ceilings, exclude_indptr,
                exclude_ids, first_id, state_keys, state_ids, kept};
    return host_launch(num_rows, num_threads, order, body, &a);
}

struct Lists {
    const float* keys;
    const int* columns;
    long long length;
    const int* counts;
    const long long *exclude_indptr, *exclude_ids;
    long long first_id;
    float* state_keys;
    long long* state_ids;
    int kept;
};

static void merge_body(void* argument) {
    const Lists& a = *(const Lists*)argument;
    merge_row(a.keys, a.columns, a.length, a.counts, a.exclude_indptr, a.exclude_ids, a.first_id, a.state_keys,
              a.state_ids, a.kept);
}

extern "C" bool host_merge(int num_rows, int num_threads, int order, const float* keys, const int* columns,
                           long long length, const int* counts, const long long* exclude_indptr,
                           const long long* exclude_ids, long long first_id, float* state_keys, long long* state_ids,
                           int kept) {
    Lists a{keys, columns, length, counts, exclude_indptr, exclude_ids, first_id, state_keys, state_ids, kept};
    return host_launch(num_rows, num_threads, order, merge_body, &a);
}
