/* The inner loops, for one instruction set: of the convolution, register-blocked, then of all else.
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
typedef double NAME(doubles) __attribute__((vector_size(4 * LANES)));
typedef double NAME(unaligned_doubles) __attribute__((vector_size(4 * LANES), aligned(8)));

static inline __attribute__((always_inline)) TARGET void NAME(block)(
    const struct window *w, const float *const *weights, const float *biases, float *const *outputs,
    const float *const *added, const int filters, const int vectors, int64_t pixel, int last)
{
    NAME(vector) sums[FILTERS][4];
    int64_t place[4]; /* of each vector in the input */
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        const int64_t at = pixel + v * LANES;
        place[v] = at + (uint32_t)at / (uint32_t)w->width * w->gap;
    }
#pragma GCC unroll 8
    for (int f = 0; f < filters; f++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[f][v] = (NAME(vector)){0} + biases[f];
    for (int i = 0; i < w->inputs; i++) {
        const float *input = w->input[i];
        const int64_t from = (int64_t)w->channel[i] * w->taps;
        for (int t = 0; t < w->taps; t++) {
            const float *tap = input + w->offset[t];
            NAME(vector) pixels[4];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) pixels[v] = *(const NAME(unaligned) *)(tap + place[v]);
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

/* sum of a vector, halved again and again: one lane after the other would wait for each addition. */
static inline __attribute__((always_inline)) TARGET float NAME(total)(NAME(vector) vector)
{
    float lanes[LANES];
    memcpy(lanes, &vector, sizeof lanes);
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0];
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
    float sum = NAME(total)(sums[0]);
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
    float sum = NAME(total)(sums[0]);
    for (; i < count; i++) sum += a[i];
    return sum;
}

/* The same of four rows of b, `stride` floats apart, added to `sums`; the four rows behind them are sent for. */
static TARGET __attribute__((noinline)) void NAME(dots)(const float *a, const float *b, int64_t stride, int64_t count,
                                                        float *sums)
{
    NAME(vector) parts[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const NAME(vector) values = *(const NAME(unaligned) *)(a + i);
#pragma GCC unroll 4
        for (int row = 0; row < 4; row++) {
            parts[row] += values * *(const NAME(unaligned) *)(b + row * stride + i);
            __builtin_prefetch(b + (row + 4) * stride + i, 0, 2);
        }
    }
    for (int row = 0; row < 4; row++) {
        sums[row] += NAME(total)(parts[row]);
        for (int64_t rest = i; rest < count; rest++) sums[row] += a[rest] * b[row * stride + rest];
    }
}

/* sum of (a - b) * (a - b) over `count` floats. */
static TARGET __attribute__((noinline)) float NAME(distance)(const float *a, const float *b, int64_t count)
{
    NAME(vector) sums = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const NAME(vector) apart = *(const NAME(unaligned) *)(a + i) - *(const NAME(unaligned) *)(b + i);
        sums += apart * apart;
    }
    float sum = NAME(total)(sums);
    for (; i < count; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sum;
}

/* Adds `values` x `rows` to `sums`, all of `width` floats. */
static TARGET __attribute__((noinline)) void NAME(spread)(float *restrict sums, const float *restrict rows,
                                                          const float *restrict values, int width)
{
    for (int row = 0; row < width; row++)
        for (int k = 0; k < width; k++) sums[k] += values[row] * rows[(int64_t)row * width + k];
}

/* Some `vectors` of the sums below, which stay in registers. */
static inline __attribute__((always_inline)) TARGET void NAME(weigh_some)(
    double *sums, int width, const double *weights, const int32_t *rows, const double *values, int count,
    const int vectors)
{
    NAME(doubles) held[4];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) held[v] = *(NAME(unaligned_doubles) *)(sums + v * (LANES / 2));
    for (int i = 0; i < count; i++) {
        const double *row = weights + (int64_t)(rows ? rows[i] : i) * width;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) held[v] += *(const NAME(unaligned_doubles) *)(row + v * (LANES / 2)) * values[i];
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) *(NAME(unaligned_doubles) *)(sums + v * (LANES / 2)) = held[v];
}

/* Adds `count` values times their rows of `width` weights to `sums`: those numbered `rows`, null for the first ones.
 * Up to seven doubles behind the sums are overwritten, and as many behind the last row read. */
static TARGET __attribute__((noinline)) void NAME(weigh)(double *sums, int width, const double *weights,
                                                         const int32_t *rows, const double *values, int count)
{
    for (int k = 0; k < width; k += 4 * (LANES / 2)) {
        switch ((width - k + LANES / 2 - 1) / (LANES / 2)) {
        case 1: NAME(weigh_some)(sums + k, width, weights + k, rows, values, count, 1); break;
        case 2: NAME(weigh_some)(sums + k, width, weights + k, rows, values, count, 2); break;
        case 3: NAME(weigh_some)(sums + k, width, weights + k, rows, values, count, 3); break;
        default: NAME(weigh_some)(sums + k, width, weights + k, rows, values, count, 4);
        }
    }
}

/* One row of pooled pixels: the largest, or the sum, of each window of `rows` rows of `width` pixels and of `kernel`
 * columns. `line` is room for such a row, behind what lies to its left; windows begin at `start`. */
static TARGET __attribute__((noinline)) void NAME(pool)(const float *from, int rows, int width, float *restrict line,
                                                        const float *start, float *restrict to, int columns, int kernel,
                                                        int stride, int largest)
{
    memcpy(line, from, 4 * (int64_t)width);
    for (int row = 1; row < rows; row++) {
        from += width;
        if (largest) for (int i = 0; i < width; i++) line[i] = from[i] > line[i] ? from[i] : line[i];
        else for (int i = 0; i < width; i++) line[i] += from[i];
    }
    for (int k = 0; k < kernel; k++, start++) {
        if (!k) for (int i = 0; i < columns; i++) to[i] = start[(int64_t)i * stride];
        else if (!largest) for (int i = 0; i < columns; i++) to[i] += start[(int64_t)i * stride];
        else if (stride == 2) for (int i = 0; i < columns; i++) to[i] = start[2 * i] > to[i] ? start[2 * i] : to[i];
        else for (int i = 0; i < columns; i++) to[i] = start[(int64_t)i * stride] > to[i] ? start[(int64_t)i * stride] : to[i];
    }
}
