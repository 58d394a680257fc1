// Runs every set of instructions of this processor over odd shapes, with each array in memory of its own and no longer than
// the kernels may read or write, so that a sanitizer sees every step beyond. Exit status: 0 all gave the same bits, 1 not.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "msfp.h"

int msfp_instructions(void);
int msfp_linear(const Layer *layer, int instructions, int threads);

typedef struct {
    int tables, planes, largest;  // of the weights; without tables they are bytes
    double step, zero;            // of the inputs
    int mantissa, limit, is_signed;
} Case;

static const Case cases[] = {
    {1, 1, 64, 0.3, 0.0, 1, 12, 1},              // W4A4: E2M1, and tables of every 4-bit format
    {1, 1, 64, 0.3, -0.7, 2, 28, 0},             // uE2M2 with a zero point
    {1, 1, 64, 0.1, 0.0, 1, 49152, 1},           // E4M1, inputs of three digits
    {1, 1, 64, 0.0, 0.0, 22, (1 << 22) - 1, 1},  // a step for each row
    {0, 1, 127, 0.02, 0.0, 6, 127, 1},           // W8A8: E1M6
    {0, 2, 127, 0.02, -1.0, 4, 507904, 0},       // two planes
    {0, 3, 127, 0.02, 0.0, 5, 252, 1},           // three planes
};

static uint32_t state = 1;

static uint32_t draw(void) {
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
}

// Freed by `release`; of no bytes too, so that reading one of them is seen.
static void *fresh(size_t bytes) {
    uint8_t *made = malloc(bytes);
    if (bytes && !made) exit(2);
    for (size_t i = 0; i < bytes; i++) made[i] = (uint8_t)draw();
    return made;
}

static float input(void) {
    static const float rare[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-42f, -0.0f};
    const uint32_t number = draw();
    return number % 40 < 7 ? rare[number % 40] : (float)(int32_t)number * 1e-9f;
}

// Returns whether all gave the same bits.
static int check(const Case *each, int64_t rows, int64_t channels, int64_t inputs, int threads) {
    static const int8_t grids[3][16] = {
        {0, 1, 2, 3, 4, 5, 6, 7, 0, -1, -2, -3, -4, -5, -6, -7},
        {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12},
        {0, 1, 2, 4, 8, 16, 32, 64, 0, -1, -2, -4, -8, -16, -32, -64},
    };
    Layer layer = {.channels = channels, .inputs = inputs, .planes = each->planes, .largest = each->largest,
                   .step = each->step, .zero = each->zero, .mantissa = each->mantissa, .limit = each->limit,
                   .is_signed = each->is_signed, .rows = rows};
    int8_t *tables = each->tables ? fresh(sizeof grids) : NULL;
    if (tables) memcpy(tables, grids, sizeof grids);
    layer.tables = tables;
    const int64_t padded = blocks_of(&layer) * CHANNELS;
    const size_t bytes = each->planes * blocks_of(&layer) * block_bytes(&layer);
    uint8_t *tiles = fresh(bytes), *choice = fresh(padded);
    float *scale = fresh(padded * sizeof *scale), *x = fresh(rows * inputs * sizeof *x);
    float *bias = draw() % 2 ? fresh(padded * sizeof *bias) : NULL;
    const int wide = draw() % 2;
    void *sums = fresh(padded * (wide ? sizeof(int32_t) : sizeof(int16_t)));
    float *first = fresh(rows * channels * sizeof *first);
    for (size_t i = 0; i < bytes && !each->tables; i++)
        if (tiles[i] == 0x80) tiles[i] = 0;  // -128 is beyond `largest`
    for (int64_t c = 0; c < padded; c++) {
        choice[c] %= 3;
        scale[c] = (float)(draw() % 1000 + 1) * 1e-4f;
        const int sum = (int)(draw() % 2001) - 1000;
        if (wide) ((int32_t *)sums)[c] = sum;
        else ((int16_t *)sums)[c] = (int16_t)sum;
        if (bias) bias[c] = (float)(draw() % 1000) * 1e-3f;
    }
    for (int64_t i = 0; i < rows * inputs; i++) x[i] = input();
    layer.tiles = tiles, layer.choice = choice, layer.scale = scale, layer.bias = bias, layer.sums = sums, layer.x = x;
    layer.wide_sums = wide;
    int same = 1;
    for (int set = 0; set < msfp_instructions(); set++) {
        layer.y = set ? fresh(rows * channels * sizeof *layer.y) : first;
        if (msfp_linear(&layer, set, threads)) exit(2);
        for (int64_t i = 0; i < rows * channels; i++)
            same &= isnan(first[i]) ? isnan(layer.y[i]) : !memcmp(first + i, layer.y + i, sizeof *first);
        if (set) free(layer.y);
    }
    if (!same) fprintf(stderr, "%d x %d, %d rows, case %d: not the same bits\n", (int)channels, (int)inputs, (int)rows,
                       (int)(each - cases));
    free(tables), free(tiles), free(choice), free(scale), free(x), free(bias), free(sums), free(first);
    return same;
}

int main(void) {
    static const int64_t channels[] = {1, 15, 16, 17, 40}, rows[] = {0, 1, 2, 5, 97}, wide[] = {0, 255, 257, 1023, 1056};
    const int count = sizeof cases / sizeof *cases;
    int same = 1;
    for (int each = 0; each < count; each++) {
        for (int64_t inputs = 0; inputs <= 70; inputs++)
            same &= check(cases + each, rows[(inputs + each) % 5], channels[inputs * 2 % 7 % 5], inputs, 1 + (int)(inputs % 2));
        for (int w = 0; w < 5; w++) same &= check(cases + each, rows[(w + each) % 5], channels[w], wide[w], 2);
        same &= check(cases + each, 3, 0, 20, 1);
    }
    printf("%d sets of instructions\n", msfp_instructions());
    return !same;
}
