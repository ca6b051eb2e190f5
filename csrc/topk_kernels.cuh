// The computation of topk.h. No torch, no CUDA headers: NVRTC compiles it as it is, and so does a host compiler with
// the few CUDA names defined (tests/mine/host_cuda.h runs it without a GPU).

#pragma once

#include "topk.h"

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ float negative_infinity() { return __uint_as_float(0xFF800000u); }

// A candidate is one word: larger is better. High half: the key, as an unsigned integer of the same order. Low half:
// the complement of the id, so that of equal keys the lower id is the larger word. 0: a free place, below everything.
__device__ __forceinline__ u32 ordered(float key) {
    u32 bits = __float_as_uint(key == 0.0f ? 0.0f : key);  // -0 is a tie of +0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float key_of(u64 word) {
    u32 bits = (u32)(word >> 32);
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits);
}

__device__ __forceinline__ u64 pack(float key, long long id) {
    return (u64)ordered(key) << 32 | (u64)(0xFFFFFFFFu - (u32)id);
}

__device__ __forceinline__ long long id_of(u64 word) { return (long long)(0xFFFFFFFFu - (u32)word); }

struct Bf16 {
    unsigned short bits;
};
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(int x) { return __int2float_rn(x); }
__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// Is id among the ascending ids[0, count)?
__device__ __forceinline__ bool contains(const long long* ids, long long count, long long id) {
    long long low = 0, high = count;
    while (low < high) {
        long long middle = (low + high) / 2;
        if (ids[middle] < id) low = middle + 1;
        else high = middle;
    }
    return low < count && ids[low] == id;
}

// words[0, size) in order; bitonic, size a power of two (or 1). All threads of the block, size uniform.
__device__ __forceinline__ void sort(u64* words, int size, bool ascending) {
    for (int run = 2; run <= size; run *= 2) {
        for (int stride = run / 2; stride > 0; stride /= 2) {
            for (int i = (int)threadIdx.x; i < size / 2; i += (int)blockDim.x) {
                int a = 2 * i - (i & (stride - 1)), b = a + stride;
                u64 x = words[a], y = words[b];
                if ((x < y) == (((a & run) == 0) != ascending)) {
                    words[a] = y;
                    words[b] = x;
                }
            }
            __syncthreads();
        }
    }
}

__shared__ u64 buffer[TOPK_CAPACITY];  // [0, kept): the state, sorted; from the end backwards: survivors
__shared__ int count;                  // survivors

// buffer[0, kept), descending, = the best of itself and of num_survivors words at the end of the buffer, in any order. Only
// the survivors are sorted, then merged: they are few. All threads of the block, num_survivors > 0 uniform.
__device__ __forceinline__ void compact(int kept, int num_survivors) {
    int tail = 1, size = 2;
    while (tail < num_survivors) tail *= 2;
    const bool fits = kept + tail <= TOPK_CAPACITY;
    if (!fits) tail = TOPK_CAPACITY - kept;  // so many that all of the buffer is sorted
    while (size < kept + tail) size *= 2;
    // Element i of the merge: the state, nothing (0), and the survivors at the end of the buffer.
    const int survivors = size - tail, shift = TOPK_CAPACITY - size;
    for (int i = kept + (int)threadIdx.x; i < size - num_survivors; i += (int)blockDim.x)
        buffer[i < survivors ? i : i + shift] = 0;
    __syncthreads();
    if (!fits) {
        sort(buffer, TOPK_CAPACITY, false);
        return;
    }
    sort(buffer + TOPK_CAPACITY - tail, tail, true);
    // Descending, then ascending: each step leaves the larger half in front. What cannot be kept is not looked at again.
    for (int stride = size / 2; stride > 0; stride /= 2) {
        for (int i = (int)threadIdx.x; i < size / 2; i += (int)blockDim.x) {
            int a = 2 * i - (i & (stride - 1)), b = a + stride;
            a += a < survivors ? 0 : shift;
            b += b < survivors ? 0 : shift;
            u64 x = buffer[a], y = buffer[b];
            if (x < y) {
                buffer[a] = y;
                buffer[b] = x;
            }
        }
        if (stride >= kept && size == 2 * stride) size = stride;
        __syncthreads();
    }
}

// One row's state while candidates come in, as each thread of the row's block sees it.
struct State {
    float* keys;
    long long* ids;
    int kept;
    const long long* excluded;
    long long num_excluded;
    u64 floor;  // what a candidate has to beat; 0: there is a free place
    bool changed;

    __device__ __forceinline__ State(long long row, const long long* exclude_indptr, const long long* exclude_ids,
                                     float* state_keys, long long* state_ids, int kept)
        : keys(state_keys + row * kept), ids(state_ids + row * kept), kept(kept), changed(false) {
        excluded = exclude_indptr ? exclude_ids + exclude_indptr[row] : nullptr;
        num_excluded = exclude_indptr ? exclude_indptr[row + 1] - exclude_indptr[row] : 0;
        for (int i = (int)threadIdx.x; i < kept; i += (int)blockDim.x)
            buffer[i] = ids[i] < 0 ? 0 : pack(keys[i], ids[i]);
        if (threadIdx.x == 0) count = 0;
        __syncthreads();
        floor = buffer[kept - 1];
    }

    // A step of candidates, with limit as their ceiling: candidates[i] of this thread is number base + i * blockDim.x +
    // threadIdx.x of num_candidates. Its id is first_id + that number, or + columns[that number].
    __device__ __forceinline__ void offer(const float (&candidates)[TOPK_ITEMS], long long base,
                                          long long num_candidates, float limit, long long first_id,
                                          const int* columns) {
        const int step = (int)blockDim.x * TOPK_ITEMS;
        const float lowest = floor ? key_of(floor) : -3.402823466e38f;
        bool survives = false;
#pragma unroll
        for (int i = 0; i < TOPK_ITEMS; ++i) {
            long long number = base + i * (int)blockDim.x + (int)threadIdx.x;
            // Both comparisons are false for NaN; a finite floor refuses -inf, and < refuses +inf.
            survives |= number < num_candidates && candidates[i] >= lowest && candidates[i] < limit;
        }
        if (!__syncthreads_or(survives)) return;  // most steps end here, with one barrier
#pragma unroll
        for (int i = 0; i < TOPK_ITEMS; ++i) {
            long long number = base + i * (int)blockDim.x + (int)threadIdx.x;
            if (!(number < num_candidates && candidates[i] >= lowest && candidates[i] < limit)) continue;
            long long id = first_id + (columns ? columns[number] : number);
            u64 word = pack(candidates[i], id);
            if (word > floor && !contains(excluded, num_excluded, id)) buffer[TOPK_CAPACITY - 1 - atomicAdd(&count, 1)] = word;
        }
        __syncthreads();
        const int filled = count;
        changed |= filled > 0;
        __syncthreads();  // nobody appends before everybody has read the count
        if (kept + filled + step > TOPK_CAPACITY) {
            compact(kept, filled);
            floor = buffer[kept - 1];
            if (threadIdx.x == 0) count = 0;
            __syncthreads();
        }
    }

    __device__ __forceinline__ void store() {
        if (!changed) return;
        if (count > 0) compact(kept, count);
        for (int i = (int)threadIdx.x; i < kept; i += (int)blockDim.x) {
            keys[i] = buffer[i] ? key_of(buffer[i]) : negative_infinity();
            ids[i] = buffer[i] ? id_of(buffer[i]) : -1;
        }
    }
};

template <typename T>
__device__ __forceinline__ void topk_update(
    const T* scores, long long stride, long long num_columns, const float* row_scale, const float* col_scale,
    const float* row_add, const float* ceilings, const long long* exclude_indptr, const long long* exclude_ids,
    long long first_id, float* state_keys, long long* state_ids, int kept) {
    const long long row = blockIdx.x;
    const int thread = (int)threadIdx.x, num_threads = (int)blockDim.x;
    scores += row * stride;
    const float limit = ceilings[row];
    const float scale = row_scale ? row_scale[row] : 1.0f, add = row_add ? row_add[row] : 0.0f;
    State state(row, exclude_indptr, exclude_ids, state_keys, state_ids, kept);

    for (long long base = 0; base < num_columns; base += num_threads * TOPK_ITEMS) {
        float keys[TOPK_ITEMS];
#pragma unroll
        for (int i = 0; i < TOPK_ITEMS; ++i) {  // all loads first; neighbouring threads read neighbouring columns
            long long column = base + i * num_threads + thread;
            keys[i] = column < num_columns ? to_float(scores[column]) : negative_infinity();
        }
#pragma unroll
        for (int i = 0; i < TOPK_ITEMS; ++i) {
            long long column = base + i * num_threads + thread;
            if (col_scale && column < num_columns) keys[i] = __fmul_rn(keys[i], col_scale[column]);
            if (row_scale) keys[i] = __fmul_rn(keys[i], scale);
            if (row_add) keys[i] = __fadd_rn(keys[i], add);
        }
        state.offer(keys, base, num_columns, limit, first_id, nullptr);
    }
    state.store();
}

__device__ __forceinline__ void merge_row(
    const float* list_keys, const int* list_columns, long long length, const int* counts,
    const long long* exclude_indptr, const long long* exclude_ids, long long first_id, float* state_keys,
    long long* state_ids, int kept) {
    const long long row = blockIdx.x;
    const long long listed = counts[row] < length ? counts[row] : length;
    if (listed <= 0) return;  // the whole block, before it reads anything else
    list_keys += row * length;
    list_columns += row * length;
    State state(row, exclude_indptr, exclude_ids, state_keys, state_ids, kept);

    for (long long base = 0; base < listed; base += (int)blockDim.x * TOPK_ITEMS) {
        float keys[TOPK_ITEMS];
#pragma unroll
        for (int i = 0; i < TOPK_ITEMS; ++i) {
            long long place = base + i * (int)blockDim.x + (int)threadIdx.x;
            keys[i] = place < listed ? list_keys[place] : negative_infinity();
        }
        state.offer(keys, base, listed, -negative_infinity(), first_id, list_columns);
    }
    state.store();
}
