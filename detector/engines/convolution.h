/* The register-blocked inner loop of the convolution, for one instruction set.
 *
 * Included once for each set, with these defined:
 *   NAME(x)   a name of its own for each set
 *   TARGET    attributes of its functions
 *   LANES     floats in a vector
 *   BLOCK     vectors of pixels held at once, 1 to 4
 *
 * A block is `filters` x `vectors` accumulators that stay in registers while all open input channels and all taps pass
 * by: each vector of pixels is loaded once for all filters of the block, each weight once for all its vectors. Weights
 * are read one by one where they lie, so that leaving out filters or input channels costs no slicing.
 */

typedef float NAME(vector) __attribute__((vector_size(4 * LANES)));
typedef float NAME(unaligned) __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t NAME(mask) __attribute__((vector_size(4 * LANES)));

static inline __attribute__((always_inline)) TARGET void NAME(block)(
    const struct window *w, const float *const *weights, const float *biases, float *const *outputs,
    const float *const *added, const int filters, const int vectors, int64_t pixel, int last)
{
    NAME(vector) sums[FILTERS][4];
#pragma GCC unroll 8
    for (int f = 0; f < filters; f++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[f][v] = (NAME(vector)){0} + biases[f];
    for (int i = 0; i < w->inputs; i++) {
        const float *input = w->input[i] + pixel;
        const int64_t from = (int64_t)w->channel[i] * w->taps;
        for (int t = 0; t < w->taps; t++) {
            const float *tap = input + w->offset[t];
            NAME(vector) pixels[4];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) pixels[v] = *(const NAME(unaligned) *)(tap + v * LANES);
#pragma GCC unroll 8
            for (int f = 0; f < filters; f++) {
                const float weight = weights[f][from + t];
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) sums[f][v] += pixels[v] * weight;
            }
        }
    }
#pragma GCC unroll 8
    for (int f = 0; f < filters; f++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            NAME(vector) sum = sums[f][v];
            const int64_t at = pixel + v * LANES;
            const int whole = v < vectors - 1 || last == LANES;
            if (w->relu_before) sum = (NAME(vector))((NAME(mask))sum & ~(sum < 0));
            if (added && added[f]) {
                NAME(vector) other = {0};
                if (whole) other = *(const NAME(unaligned) *)(added[f] + at);
                else memcpy(&other, added[f] + at, 4 * last);
                sum += other;
            }
            if (w->relu_after) sum = (NAME(vector))((NAME(mask))sum & ~(sum < 0));
            if (whole) *(NAME(unaligned) *)(outputs[f] + at) = sum;
            else memcpy(outputs[f] + at, &sum, 4 * last);
        }
}

/* Each size of block is a function of its own, so that its accumulators have all registers to themselves. */
#define BLOCK_OF(FS, VS)                                                                                       \
    static TARGET __attribute__((noinline)) void NAME(block_##FS##_##VS)(                                      \
        const struct window *w, const float *const *weights, const float *biases, float *const *outputs,       \
        const float *const *added, int64_t pixel, int last)                                                    \
    {                                                                                                          \
        NAME(block)(w, weights, biases, outputs, added, FS, VS, pixel, last);                                  \
    }
#define BLOCKS_OF(FS) BLOCK_OF(FS, 1) BLOCK_OF(FS, 2) BLOCK_OF(FS, 3) BLOCK_OF(FS, 4)
BLOCKS_OF(1) BLOCKS_OF(2) BLOCKS_OF(3) BLOCKS_OF(4) BLOCKS_OF(5) BLOCKS_OF(6)
#undef BLOCK_OF
#undef BLOCKS_OF

/* `filters` filters at all pixels of the window. */
static void NAME(convolve)(
    const struct window *w, const float *const *weights, const float *biases, float *const *outputs,
    const float *const *added, int filters)
{
#define SIZES(FS) {NAME(block_##FS##_1), NAME(block_##FS##_2), NAME(block_##FS##_3), NAME(block_##FS##_4)}
    static void (*const sizes[FILTERS][4])(const struct window *, const float *const *, const float *, float *const *,
                                           const float *const *, int64_t, int) = {
        SIZES(1), SIZES(2), SIZES(3), SIZES(4), SIZES(5), SIZES(6)};
#undef SIZES
    for (int64_t pixel = 0; pixel < w->pixels; pixel += BLOCK * LANES) {
        const int64_t left = w->pixels - pixel;
        const int vectors = left >= BLOCK * LANES ? BLOCK : (int)((left + LANES - 1) / LANES);
        const int last = left >= BLOCK * LANES ? LANES : (int)(left - (vectors - 1) * LANES);
        sizes[filters - 1][vectors - 1](w, weights, biases, outputs, added, pixel, last);
    }
}

/* sum of a * b over `count` floats. */
static TARGET __attribute__((noinline)) float NAME(dot)(const float *a, const float *b, int64_t count)
{
    NAME(vector) sums[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            sums[v] += *(const NAME(unaligned) *)(a + i + v * LANES) * *(const NAME(unaligned) *)(b + i + v * LANES);
    for (; i + LANES <= count; i += LANES)
        sums[0] += *(const NAME(unaligned) *)(a + i) * *(const NAME(unaligned) *)(b + i);
    sums[0] += sums[1] + sums[2] + sums[3];
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[0][lane];
    for (; i < count; i++) sum += a[i] * b[i];
    return sum;
}

/* sum of `count` floats. */
static TARGET __attribute__((noinline)) float NAME(sum)(const float *a, int64_t count)
{
    NAME(vector) sums[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) sums[v] += *(const NAME(unaligned) *)(a + i + v * LANES);
    for (; i + LANES <= count; i += LANES) sums[0] += *(const NAME(unaligned) *)(a + i);
    sums[0] += sums[1] + sums[2] + sums[3];
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[0][lane];
    for (; i < count; i++) sum += a[i];
    return sum;
}
