// Chooses the kernels, and divides a layer among threads.
#include <stdlib.h>

#include "msfp.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

// In the order of `quant.native.INSTRUCTIONS`.
static const Kernels *const kernels[] = {
    &msfp_portable,
#ifdef __x86_64__
    &msfp_avx2, &msfp_avx512, &msfp_vnni,
#endif
};

// How many of the sets of instructions this processor has; each has those before it.
EXPORT int msfp_instructions(void) {
    int count = 1;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2")) count = 2;
    if (count == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) count = 3;
    if (count == 3 && __builtin_cpu_supports("avx512vnni")) count = 4;
#endif
    return count;
}

// The narrowest digits among the fewest: narrow ones can be added in 16 bits for longer.
static Grid grid_of(const Layer *layer, int saturates) {
    Grid grid = {.width = width_of(layer)};
    grid.lift = layer->is_signed ? (int)layer->limit : 0;
    const int64_t highest = layer->limit + grid.lift;
    int bits = 1;
    while (highest >> bits) bits++;
    do {
        grid.digits++;
        grid.base = (bits + grid.digits - 1) / grid.digits;
        const int64_t digit = grid.digits > 1 ? (1 << grid.base) - 1 : highest;
        grid.run = saturates && layer->largest ? INT16_MAX / (2 * layer->largest * digit) : grid.width + 1;
    } while (grid.base > 8 || !grid.run);
    return grid;
}

// Computes a layer with one of the sets of instructions, on so many threads. Returns 0, or 1 if there is no memory.
EXPORT int msfp_linear(const Layer *layer, int instructions, int threads) {
    const Kernels *const chosen = kernels[instructions];
    const int64_t blocks = blocks_of(layer), rows = layer->rows;
    Grid grid = grid_of(layer, chosen->saturates);
    grid.steps = malloc(rows * (sizeof(float) + grid.digits * grid.width) + 1);
    if (!grid.steps) return 1;
    grid.lines = (uint8_t *)(grid.steps + rows);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int thread = 0; thread < threads; thread++)
            chosen->quantise(layer, &grid, rows * thread / threads, rows * (thread + 1) / threads);
#pragma omp for schedule(static)
        for (int thread = 0; thread < threads; thread++)
            chosen->multiply(layer, &grid, blocks * thread / threads, blocks * (thread + 1) / threads);
    }
    free(grid.steps);
    return 0;
}
