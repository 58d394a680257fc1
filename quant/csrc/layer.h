// The kernels of one set of instructions, around three functions that the file which includes this one has defined:
//
//     expand    tiles of codes into tiles of 8 bits
//     single    sums of one line of inputs with tiles of codes; told which tiles come next
//     several   sums of lines of inputs with tiles of 8 bits
//
// All floating-point operations are float32, in the order of `PackedLinear.reference`, and must not be contracted.

enum {
    LINES = 96,    // of inputs that meet the same expanded weights; a multiple of 1, 2, 3 and 4 digits
    DEPTH = 1024,  // inputs for which weights are expanded at a time: 16 kB, half of a first-level cache
    PIECE = 256,   // inputs that are quantised at a time
};

// 1.5 * 2^23: adding it rounds to a whole number, ties to even.
static const float MAGIC = 12582912.0f;

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// x: count inputs of a row, PIECE at most. Writes their raised integers; returns whether one is NaN.
TARGET static int integers(const Layer *layer, int32_t lift, float step, const float *x, int64_t count, uint32_t *whole) {
    const float zero = (float)layer->zero;
    const float high = (float)layer->limit, low = layer->is_signed ? -high : 0.0f;
    const uint32_t smallest = bits_of((float)(1 << layer->mantissa));
    const uint32_t shift = (uint32_t)layer->mantissa << 23;
    int broken = 0;
    for (int64_t k = 0; k < count; k++) {
        float ratio = (x[k] - zero) / step;
        broken |= ratio != ratio;
        ratio = ratio > low ? ratio : low;  // NaN too
        ratio = ratio < high ? ratio : high;
        uint32_t power = bits_of(ratio) & 0x7F800000;
        power = (power > smallest ? power : smallest) - shift;
        const float unit = float_of(power), inverse = float_of(0x7F000000 - power);
        const float count_of_units = (ratio * inverse + MAGIC) - MAGIC;
        whole[k] = (uint32_t)((int32_t)(count_of_units * unit) + lift);
    }
    return broken;
}

// A power of two in which no input of a row is more than 2^22; NaN if one is NaN or infinite.
TARGET static float own_step(const float *x, int64_t count) {
    uint32_t largest = 25u << 23;
    for (int64_t k = 0; k < count; k++) {
        const uint32_t size = bits_of(x[k]) & 0x7FFFFFFF;
        largest = size > largest ? size : largest;
    }
    const uint32_t power = largest & 0x7F800000;
    return power == 0x7F800000 ? NAN : float_of(power - (21u << 23));
}

TARGET static void quantise(const Layer *layer, const Grid *grid, int64_t first, int64_t last) {
    uint32_t whole[PIECE];
    const uint32_t mask = (1u << grid->base) - 1;
    for (int64_t row = first; row < last; row++) {
        const float *x = layer->x + row * layer->inputs;
        uint8_t *line = grid->lines + row * grid->digits * grid->width;
        const float step = layer->step ? (float)layer->step : own_step(x, layer->inputs);
        int broken = 0;
        for (int64_t k = 0; k < layer->inputs; k += PIECE) {
            const int64_t count = layer->inputs - k < PIECE ? layer->inputs - k : PIECE;
            broken |= integers(layer, grid->lift, step, x + k, count, whole);
            for (int digit = 0; digit < grid->digits; digit++) {
                const int shift = digit * grid->base;
                uint8_t *out = line + digit * grid->width + k;
                for (int64_t j = 0; j < count; j++) out[j] = (uint8_t)(whole[j] >> shift & mask);
            }
        }
        for (int digit = 0; digit < grid->digits; digit++)
            memset(line + digit * grid->width + layer->inputs, 0, grid->width - layer->inputs);
        grid->steps[row] = broken ? NAN : step;
    }
}

// sums: (rows * digits, 16), of the lines of the rows from `row` on with the block's channels.
TARGET static void finish(const Layer *layer, const Grid *grid, int64_t block, int64_t row, int64_t rows, const uint32_t *sums) {
    const int64_t channel = block * CHANNELS;
    const int64_t left = layer->channels - channel, count = left < CHANNELS ? left : CHANNELS;
    const float zero = (float)layer->zero;
    float offset[CHANNELS], y[CHANNELS];
    uint32_t lifted[CHANNELS], total[CHANNELS];
    const float *scale = layer->scale + channel;
    int32_t weights[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) {
        const int64_t place = channel + c;
        weights[c] = layer->wide_sums ? ((const int32_t *)layer->sums)[place] : ((const int16_t *)layer->sums)[place];
        offset[c] = scale[c] * zero * (float)weights[c] + (layer->bias ? layer->bias[place] : 0.0f);
        lifted[c] = (uint32_t)grid->lift * (uint32_t)weights[c];
    }
    for (int64_t r = row; r < row + rows; r++, sums += grid->digits * CHANNELS) {
        const float step = grid->steps[r];
        if (layer->step) {
            // Modulo 2^32, in which the sum itself fits.
            for (int c = 0; c < CHANNELS; c++) total[c] = sums[c] - lifted[c];
            for (int digit = 1; digit < grid->digits; digit++)
                for (int c = 0; c < CHANNELS; c++) total[c] += sums[digit * CHANNELS + c] << digit * grid->base;
            for (int c = 0; c < CHANNELS; c++) y[c] = (float)(int32_t)total[c] * (scale[c] * step) + offset[c];
        } else {
            // Each digit's sum fits in 32 bits, and all together in a double.
            for (int c = 0; c < CHANNELS; c++) {
                double whole = -(double)grid->lift * weights[c];
                for (int digit = 0; digit < grid->digits; digit++)
                    whole += (double)(1 << digit * grid->base) * (int32_t)sums[digit * CHANNELS + c];
                y[c] = (float)whole * (scale[c] * step) + offset[c];
            }
        }
        memcpy(layer->y + r * layer->channels + channel, y, count * sizeof *y);
    }
}

// The tables of a block's channels, in the order of the lanes.
static void tables_of(const Layer *layer, int64_t block, int8_t *tables) {
    for (int lane = 0; lane < 4; lane++)
        for (int vector = 0; vector < 4; vector++)
            memcpy(tables + (vector * 4 + lane) * LANE,
                   layer->tables + layer->choice[block * CHANNELS + lane * 4 + vector] * LANE, LANE);
}

TARGET static void multiply(const Layer *layer, const Grid *grid, int64_t first, int64_t last) {
    _Alignas(64) int8_t tables[STEP], expanded[DEPTH * CHANNELS];
    _Alignas(64) uint32_t sums[LINES * CHANNELS];
    const int64_t blocks = blocks_of(layer), bytes = block_bytes(layer), lines = layer->rows * grid->digits;
    for (int64_t block = first; block < last; block++) {
        if (layer->tables) tables_of(layer, block, tables);
        for (int64_t line = 0; line < lines; line += LINES) {
            const int count = lines - line < LINES ? (int)(lines - line) : LINES;
            const uint8_t *inputs = grid->lines + line * grid->width;
            memset(sums, 0, count * CHANNELS * sizeof *sums);
            for (int64_t plane = 0; plane < layer->planes; plane++) {
                const uint8_t *tiles = layer->tiles + (plane * blocks + block) * bytes;
                if (layer->tables && lines == 1 && grid->run > 1) {
                    single(tiles, block + 1 < last ? tiles + bytes : tiles, tables, inputs, grid->width, grid->run, sums);
                    continue;
                }
                for (int64_t k = 0; k < grid->width; k += DEPTH) {
                    const int64_t depth = grid->width - k < DEPTH ? grid->width - k : DEPTH;
                    const int8_t *weights = (const int8_t *)tiles + k * CHANNELS;
                    if (layer->tables) {
                        expand(tiles + k * CHANNELS / 2, tables, depth, expanded);
                        weights = expanded;
                    }
                    several(weights, inputs + k, grid->width, count, depth, 8 * (int)plane, grid->run, sums);
                }
            }
            finish(layer, grid, block, line / grid->digits, count / grid->digits, sums);
        }
    }
}

const Kernels KERNELS = {SATURATES, quantise, multiply};
