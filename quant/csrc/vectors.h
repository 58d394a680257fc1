// `expand`, `single` and `several` of layer.h, in vectors of SIZE bytes; V names an operation of that size.
//
// Products of bytes are first added in `brief` sums: with DOT, which adds four products to each 32 bits, and else in 16
// bits, for as many lanes of inputs as cannot overflow, `run`.

#define INLINE static inline __attribute__((always_inline))

// Where a sum changes in every round of a loop, this tells gcc to keep it in a register, which it does not always see.
#define HOLD(vector) __asm__("" : "+v"(vector))

enum { PARTS = 64 / SIZE };

TARGET INLINE VECTOR load(const void *bytes) { return V(LOAD)((const VECTOR *)bytes); }

TARGET INLINE VECTOR repeat(const void *lane) { return V(REPEAT)(_mm_loadu_si128((const __m128i *)lane)); }

TARGET INLINE VECTOR low(VECTOR codes) { return V(AND)(codes, V(set1_epi8)(15)); }

TARGET INLINE VECTOR high(VECTOR codes) { return low(V(srli_epi16)(codes, 4)); }

#ifdef DOT
TARGET INLINE VECTOR gather(VECTOR brief, VECTOR inputs, VECTOR weights) { return V(DOT)(brief, inputs, weights); }

TARGET INLINE VECTOR fold(VECTOR total, VECTOR brief) { return V(add_epi32)(total, brief); }
#else
TARGET INLINE VECTOR gather(VECTOR brief, VECTOR inputs, VECTOR weights) {
    return V(add_epi16)(brief, V(maddubs_epi16)(inputs, weights));
}

TARGET INLINE VECTOR fold(VECTOR total, VECTOR brief) {
    return V(add_epi32)(total, V(madd_epi16)(brief, V(set1_epi16)(1)));
}
#endif

// Adds four vectors, whose lane l holds parts of channels 4 l, 4 l + 1, 4 l + 2 and 4 l + 3, to the sums of channels.
TARGET INLINE void add(const VECTOR parts[4], int shift, uint32_t *sums) {
    const VECTOR a = V(add_epi32)(V(unpacklo_epi32)(parts[0], parts[1]), V(unpackhi_epi32)(parts[0], parts[1]));
    const VECTOR b = V(add_epi32)(V(unpacklo_epi32)(parts[2], parts[3]), V(unpackhi_epi32)(parts[2], parts[3]));
    const VECTOR sum = V(add_epi32)(V(unpacklo_epi64)(a, b), V(unpackhi_epi64)(a, b));
    V(STORE)((VECTOR *)sums, V(add_epi32)(load(sums), V(sll_epi32)(sum, _mm_cvtsi32_si128(shift))));
}

TARGET static void expand(const uint8_t *tiles, const int8_t *tables, int64_t depth, int8_t *expanded) {
    for (int j = 0; j < STEP; j += SIZE) {
        const VECTOR table = load(tables + j);
        for (int64_t k = 0; k < depth * LANE; k += 2 * STEP) {
            const VECTOR codes = load(tiles + k / 2 + j);
            V(STORE)((VECTOR *)(expanded + k + j), V(shuffle_epi8)(table, low(codes)));
            V(STORE)((VECTOR *)(expanded + k + STEP + j), V(shuffle_epi8)(table, high(codes)));
        }
    }
}

// With FETCH it fetches `next`, the tiles of the next block, into the second cache while it multiplies, in four streams. On
// a processor with AVX2 alone a layer whose weights come from memory is done a fifth sooner so, and one whose weights a
// cache holds a twentieth later; Zen 4 reads ahead by itself, and loses a tenth when told to.
TARGET static void single(const uint8_t *tiles, const uint8_t *next, const int8_t *tables, const uint8_t *inputs,
                          int64_t depth, int64_t run, uint32_t *sums) {
    (void)next;
    VECTOR total[PARTS][4];
    for (int j = 0; j < 4 * PARTS; j++) total[j % PARTS][j / PARTS] = V(ZERO)();
    const int64_t stretch = run / 2 * 2 * LANE;
    for (int64_t start = 0; start < depth; start += stretch) {
        const int64_t end = depth - start < stretch ? depth : start + stretch;
        VECTOR brief[PARTS][4];
#pragma GCC unroll 8
        for (int j = 0; j < 4 * PARTS; j++) brief[j % PARTS][j / PARTS] = V(ZERO)();
        for (int64_t k = start; k < end; k += 2 * LANE) {
            const VECTOR first = repeat(inputs + k), second = repeat(inputs + k + LANE);
#ifdef FETCH
#pragma GCC unroll 4
            for (int stream = 0; stream < 4; stream++)
                __builtin_prefetch(next + stream * depth * 2 + k * 2, 0, 2);
#endif
#pragma GCC unroll 8
            for (int j = 0; j < 4 * PARTS; j++) {
                const VECTOR codes = load(tiles + k * 8 + j * SIZE), table = load(tables + j * SIZE);
                VECTOR *sum = &brief[j % PARTS][j / PARTS];
                *sum = gather(*sum, first, V(shuffle_epi8)(table, low(codes)));
                *sum = gather(*sum, second, V(shuffle_epi8)(table, high(codes)));
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < 4 * PARTS; j++)
            total[j % PARTS][j / PARTS] = fold(total[j % PARTS][j / PARTS], brief[j % PARTS][j / PARTS]);
    }
    for (int part = 0; part < PARTS; part++) add(total[part], 0, sums + part * SIZE / 4);
}

// `several`, for a number of lines that is known when this is compiled: 1 to GROUP.
TARGET INLINE void group(const int8_t *weights, const uint8_t *inputs, int64_t width, const int count, int64_t depth,
                         int shift, int64_t run, uint32_t *sums) {
    for (int part = 0; part < PARTS; part++) {
        VECTOR total[GROUP][4], brief[GROUP][4], weight[4];
#pragma GCC unroll 24
        for (int j = 0; j < 4 * count; j++) total[j / 4][j % 4] = V(ZERO)();
        for (int64_t start = 0; start < depth; start += run * LANE) {
            const int64_t end = depth - start < run * LANE ? depth : start + run * LANE;
#pragma GCC unroll 24
            for (int j = 0; j < 4 * count; j++) brief[j / 4][j % 4] = V(ZERO)();
            for (int64_t k = start; k < end; k += LANE) {
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) weight[v] = load(weights + k * CHANNELS + v * 64 + part * SIZE);
#pragma GCC unroll 6
                for (int line = 0; line < count; line++) {
                    const VECTOR lane = repeat(inputs + line * width + k);
#pragma GCC unroll 4
                    for (int v = 0; v < 4; v++) brief[line][v] = gather(brief[line][v], lane, weight[v]);
                }
#pragma GCC unroll 24
                for (int j = 0; j < 4 * count; j++) HOLD(brief[j / 4][j % 4]);
            }
#pragma GCC unroll 24
            for (int j = 0; j < 4 * count; j++) total[j / 4][j % 4] = fold(total[j / 4][j % 4], brief[j / 4][j % 4]);
        }
        for (int line = 0; line < count; line++) add(total[line], shift, sums + line * CHANNELS + part * SIZE / 4);
    }
}

TARGET static void several(const int8_t *weights, const uint8_t *inputs, int64_t width, int count, int64_t depth, int shift,
                           int64_t run, uint32_t *sums) {
    for (; count > 0; count -= GROUP, inputs += GROUP * width, sums += GROUP * CHANNELS)
        switch (count) {
            case 1: group(weights, inputs, width, 1, depth, shift, run, sums); break;
#if GROUP > 2
            case 2: group(weights, inputs, width, 2, depth, shift, run, sums); break;

            case 3: group(weights, inputs, width, 3, depth, shift, run, sums); break;
            case 4: group(weights, inputs, width, 4, depth, shift, run, sums); break;
            case 5: group(weights, inputs, width, 5, depth, shift, run, sums); break;
#endif
            default: group(weights, inputs, width, GROUP, depth, shift, run, sums);
        }
}
