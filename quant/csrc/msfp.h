// What a packed layer is to its kernels; `quant/packed.py` says what it computes, `quant/tiles.py` how weights lie.
#ifndef MSFP_H
#define MSFP_H

#include <stdint.h>

enum {
    CHANNELS = 16,            // of a tile
    LANE = 16,                // inputs of a lane
    STEP = CHANNELS * LANE,   // bytes of the 8-bit weights that meet one lane of inputs
};

// The same fields, in the same order, are in `quant/native.py`.
typedef struct {
    // Weights: (planes, blocks, ...) tiles; with tables they are codes of 4 bits, and planes is 1. Plane p counts 256^p.
    const uint8_t *tiles;
    const int8_t *tables;   // (formats, 16), or null
    const uint8_t *choice;  // (16 blocks), which table is each channel's
    const float *scale;     // (16 blocks)
    const float *bias;      // (16 blocks), or null
    const void *sums;       // (16 blocks) int16_t, or int32_t if they are wide; of each channel's integers
    int64_t wide_sums, channels, inputs, planes;
    int64_t largest;        // no weight of a plane is larger, either way

    // Inputs: an integer of the grid is at most `limit`, and at least -limit if signed, else 0. If the step is 0 each row
    // has one of its own.
    double step, zero;
    int64_t mantissa, limit, is_signed;

    const float *x;  // (rows, inputs)
    float *y;        // (rows, channels)
    int64_t rows;
} Layer;

// The inputs as bytes: each, raised by `lift` so that it is not negative, is `digits` digits of `base` bits. Row r's digit
// d is line r * digits + d, `width` bytes long, of which the last are 0.
typedef struct {
    uint8_t *lines;
    float *steps;     // (rows); NaN for a row that has a NaN, or an infinity on a grid of its own
    int64_t width;
    int64_t run;      // so many lanes' products, two by two, can be added in 16 bits
    int digits, base, lift;
} Grid;

static inline int64_t blocks_of(const Layer *layer) { return (layer->channels + CHANNELS - 1) / CHANNELS; }

// Inputs of a tile's rows, with what pads them.
static inline int64_t width_of(const Layer *layer) { return (layer->inputs + 2 * LANE - 1) / (2 * LANE) * (2 * LANE); }

// Bytes of a block of 16 channels.
static inline int64_t block_bytes(const Layer *layer) {
    return width_of(layer) * CHANNELS / (layer->tables ? 2 : 1);
}

// One set of instructions: quantises rows of inputs; computes blocks of 16 channels for all rows.
typedef struct {
    int saturates;  // whether products are added in 16 bits
    void (*quantise)(const Layer *, const Grid *, int64_t first, int64_t last);
    void (*multiply)(const Layer *, const Grid *, int64_t first, int64_t last);
} Kernels;

extern const Kernels msfp_portable;
#ifdef __x86_64__
extern const Kernels msfp_avx2, msfp_avx512, msfp_vnni;
#endif

#endif
