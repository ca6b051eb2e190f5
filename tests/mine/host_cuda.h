// Just enough of CUDA to run one thread block on the host, one fiber per thread, switched at barriers only.
//
// Between two barriers the threads run one after the other, in an order that `host_order` shuffles: code that lacks a
// barrier, or depends on the order of its atomics, gives different answers for different orders, reproducibly.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct Dim3 {
    unsigned x = 0, y = 0, z = 0;
};
static Dim3 threadIdx, blockIdx, blockDim;

static unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
static float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
static float __int2float_rn(int x) { return (float)x; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static int atomicAdd(int* p, int v) { int old = *p; *p += v; return old; }

struct HostBlock {
    std::vector<ucontext_t> fibers;
    std::vector<std::vector<char>> stacks;
    std::vector<bool> done;
    ucontext_t scheduler;
    unsigned current = 0;
    int arrived = 0, generation = 0, any = 0, any_result = 0;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
};
static HostBlock* host_block;

static void host_yield() {
    HostBlock& b = *host_block;
    swapcontext(&b.fibers[b.current], &b.scheduler);
}

static int __syncthreads_or(int predicate) {
    HostBlock& b = *host_block;
    const int generation = b.generation;
    b.any |= predicate;
    if (++b.arrived == (int)b.fibers.size()) {
        b.any_result = b.any;
        b.arrived = b.any = 0;
        ++b.generation;
    }
    while (b.generation == generation) host_yield();
    return b.any_result != 0;
}
static void __syncthreads() { __syncthreads_or(0); }

static void host_entry() {
    HostBlock& b = *host_block;
    b.body(b.argument);
    b.done[b.current] = true;
    host_yield();
}

// body(argument) by every thread of blocks 0 .. num_blocks - 1. order: 0 ascending, 1 descending, else a seed.
// False: some threads ended, or wait at a barrier, that the others never reach.
static bool host_launch(int num_blocks, int num_threads, int order, void (*body)(void*), void* argument) {
    std::mt19937 random(order);
    for (int block = 0; block < num_blocks; ++block) {
        HostBlock b;
        b.fibers.resize(num_threads);
        b.done.assign(num_threads, false);
        b.stacks.assign(num_threads, std::vector<char>(64 * 1024));
        b.body = body;
        b.argument = argument;
        host_block = &b;
        blockIdx.x = block;
        blockDim.x = num_threads;
        for (int t = 0; t < num_threads; ++t) {
            getcontext(&b.fibers[t]);
            b.fibers[t].uc_stack.ss_sp = b.stacks[t].data();
            b.fibers[t].uc_stack.ss_size = b.stacks[t].size();
            b.fibers[t].uc_link = &b.scheduler;
            makecontext(&b.fibers[t], host_entry, 0);
        }
        std::vector<int> turns(num_threads);
        for (int t = 0; t < num_threads; ++t) turns[t] = order == 1 ? num_threads - 1 - t : t;
        for (int left = num_threads; left > 0;) {
            if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
            const int generation = b.generation, arrived = b.arrived, left_before = left;
            for (int t : turns) {
                if (b.done[t]) continue;
                b.current = t;
                threadIdx.x = t;
                swapcontext(&b.scheduler, &b.fibers[t]);
                left -= b.done[t];
            }
            if (b.generation == generation && b.arrived == arrived && left == left_before) return false;
        }
    }
    return true;
}
