// Plain C, for processors without a faster set of instructions.
#include <math.h>
#include <string.h>

#include "msfp.h"

#define TARGET
#define KERNELS msfp_portable
#define SATURATES 0

// Channel of a lane: byte 16 (4 v + l) of a step begins lane l of vector v.
static int channel_of(int lane) { return lane % 4 * 4 + lane / 4; }

static void expand(const uint8_t *tiles, const int8_t *tables, int64_t depth, int8_t *expanded) {
    for (int64_t k = 0; k < depth; k += 2 * LANE, tiles += STEP, expanded += 2 * STEP)
        for (int j = 0; j < STEP; j++) {
            const int8_t *table = tables + j / LANE * LANE;
            expanded[j] = table[tiles[j] & 15];
            expanded[STEP + j] = table[tiles[j] >> 4];
        }
}

static void several(const int8_t *weights, const uint8_t *inputs, int64_t width, int count, int64_t depth, int shift,
                    int64_t run, uint32_t *sums) {
    (void)run;
    for (int line = 0; line < count; line++, inputs += width, sums += CHANNELS)
        for (int64_t k = 0; k < depth; k += LANE)
            for (int lane = 0; lane < CHANNELS; lane++) {
                const int8_t *weight = weights + k * CHANNELS + lane * LANE;
                int32_t sum = 0;
                for (int j = 0; j < LANE; j++) sum += inputs[k + j] * weight[j];
                sums[channel_of(lane)] += (uint32_t)sum << shift;
            }
}

static void single(const uint8_t *tiles, const uint8_t *next, const int8_t *tables, const uint8_t *inputs, int64_t depth,
                   int64_t run, uint32_t *sums) {
    (void)next;
    int8_t expanded[2 * STEP];
    for (int64_t k = 0; k < depth; k += 2 * LANE) {
        expand(tiles + k * CHANNELS / 2, tables, 2 * LANE, expanded);
        several(expanded, inputs + k, 0, 1, 2 * LANE, 0, run, sums);
    }
}

#include "layer.h"
