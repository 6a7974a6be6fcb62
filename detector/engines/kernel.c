/* A decoupled network on one image, without the work that its path leaves out.
 *
 * `pathguard_run` walks a list of steps, made by detector/engines/program.py, over feature maps in one arena. Each map
 * has a byte for each of its channels: 0 says that the channel is exactly zero, and that its memory holds anything. A
 * gate writes these bytes for the convolution behind it, which computes open filters from open channels only.
 *
 * A convolution first lays its open input channels out in a scratch space, for as many output rows at a time as that
 * holds: with what is padded, where whole vectors make up a row of the output, so that none reaches beyond a row; else
 * shifted once for each column of the window, so that each tap of the window is one contiguous run of pixels. See
 * convolution.h for what follows.
 *
 * No Python here: the library is called through ctypes, and the caller checks all sizes.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FILTERS 6      /* of one block at most */
#define MAX_TAPS 128   /* 11 x 11 fits */
#define MOST_LANES 16  /* floats in the widest vector */

struct map {
    int64_t data;   /* floats of the arena before its first channel */
    int64_t open;   /* bytes of the arena's marks before its first channel's */
    int32_t channels, height, width;
    int32_t own;    /* whether each image of a group has a copy, among its own maps */
};

enum { PIXELS, CONVOLVE, GATE, ADD, RELU, AFFINE, MAX_POOL, MEAN_POOL, MEAN, LINEAR, SUBSAMPLE, PAD_CHANNELS, CONCATENATE };

struct step {
    int32_t kind;
    int32_t in, other, out;          /* maps; `other` is -1 where there is none */
    int32_t gate;                    /* CONVOLVE: first filter in the path, -1 for none; GATE: the same */
    int32_t filters;                 /* GATE: how many */
    int32_t relu_before, relu_after; /* of the addition of `other` */
    int32_t kernel_h, kernel_w, stride, padding;
    int32_t hidden;                  /* GATE: units; PAD_CHANNELS: channels before */
    int32_t rows;                    /* CONVOLVE: output rows at a time */
    int32_t count_padding;           /* MEAN_POOL: whether padded pixels count */
    int32_t together;                /* taken by all images of a group before any takes the next */
    int32_t first_read;              /* GATE: place of its first channel among those of all gates, side by side */
    const float *weights, *biases;   /* GATE: of the second layer */
    const float *squeeze, *squeeze_biases; /* GATE: of the first, transposed: (in, hidden) */
    const int32_t *kept;             /* CONVOLVE: place of each filter in its layer; GATE: of each channel in the whole
                                        map; null where all are there */
};

/* Weighted sums of features, seven doubles more behind the weights; null for kinds of them that they do not read. See
   detector/paths/features.py and detector/scoring/sums.py. Weights are (columns, sums); where there is a hidden layer,
   (columns, units). */
struct score {
    const double *offsets;                 /* (sums), or (units) */
    const double *bits, *logits, *margins;
    const double *doubts;                  /* of each class behind the first, then of the log-odds */
    const double *path_fit, *gate_fit;     /* of fit and lead of each layer, then of the whole path */
    const float *odds;                     /* path_fit: log-odds, (classes, filters) */
    const double *closed;                  /* path_fit: sum of log-probabilities of closed filters, (layers, classes) */
    const float *centre;                   /* gate_fit: (filters) */
    const float *whitening;                /* gate_fit: each layer's (width, width), one behind the other */
    const float *means;                    /* gate_fit: each layer's (classes, width), likewise, whitened */
    const uint8_t *known;                  /* gate_fit: whether anything was learnt of the class, (classes) */
    const int32_t *widths;                 /* filters of each layer */
    const double *hidden, *hidden_offsets; /* of the sums of units, (units, sums) and (sums) */
    const double *inputs;                  /* of the means of channels that gates read */
    int32_t layers;
    int32_t sums, benign;
    int32_t units;                         /* of the hidden layer; 0 for none */
};

struct program {
    const struct map *maps;
    const struct step *steps;
    int32_t steps_count, classes, filters, result; /* `result`: the map of class logits */
    int32_t reads;                   /* channels read by gates, of all gates together */
    int64_t marks;                   /* bytes of marks */
    int64_t scratch;                 /* floats of the arena before the scratch space */
    const struct score *score;       /* null for none */
    int64_t own, own_size;           /* floats of the arena before the groups' own maps, and of one image's */
    int64_t group;                   /* images that are taken through the steps side by side */
};

/* Counted up where a struct or an argument changes its meaning; as in detector/engines/library.py. */
#define VERSION 7

/* What Python is held against before it calls: VERSION, then the sizes of map, step, score and program. */
const int64_t *pathguard_layout(void)
{
    static const int64_t layout[] = {
        VERSION, sizeof(struct map), sizeof(struct step), sizeof(struct score), sizeof(struct program),
    };
    return layout;
}

/* What one call of the inner loop reads. */
struct window {
    const float *const *input; /* first pixel of each open input channel */
    const int32_t *channel;    /* its number */
    const int64_t *offset;     /* of each tap */
    int64_t pixels;
    int32_t inputs, taps, relu_before, relu_after;
    int64_t width, gap;        /* pixels of a row of the output, and by how many a row of the input is longer */
};

#if defined(__x86_64__) && defined(__GNUC__)
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma")))
#define LANES 16
#define BLOCK 4
#include "convolution.h"
#undef NAME
#undef TARGET
#undef LANES
#undef BLOCK
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define BLOCK 2
#include "convolution.h"
#undef NAME
#undef TARGET
#undef LANES
#undef BLOCK
#endif
#define NAME(x) x##_any
#define TARGET
#define LANES 4
#define BLOCK 2
#include "convolution.h"

/* The inner loops of one instruction set. */
struct loops {
    void (*convolve)(const struct window *, const float *const *, const float *, float *const *, const float *const *, int);
    float (*dot)(const float *, const float *, int64_t);
    void (*dots)(const float *, const float *, int64_t, int64_t, float *);
    float (*sum)(const float *, int64_t);
    float (*distance)(const float *, const float *, int64_t);
    void (*spread)(float *, const float *, const float *, int);
    void (*weigh)(double *, int, const double *, const int32_t *, const double *, int);
    void (*pool)(const float *, int, int, float *, const float *, float *, int, int, int, int);
    const char *name;
};
#define LOOPS(SET) {convolve_##SET, dot_##SET, dots_##SET, sum_##SET, distance_##SET, spread_##SET, weigh_##SET, pool_##SET, #SET}
static struct loops best = LOOPS(any);

/* Chooses the instruction set: "avx512", "avx2", "any", or null for the best there is. Its name, or null. */
const char *pathguard_use(const char *wanted)
{
#if defined(__x86_64__) && defined(__GNUC__)
    const int has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
    const int has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has512 && (!wanted || !strcmp(wanted, "avx512"))) {
        best = (struct loops)LOOPS(avx512);
        return best.name;
    }
    if (has2 && (!wanted || !strcmp(wanted, "avx2"))) {
        best = (struct loops)LOOPS(avx2);
        return best.name;
    }
#endif
    if (wanted && strcmp(wanted, "any")) return NULL;
    best = (struct loops)LOOPS(any);
    return best.name;
}

struct state {
    const struct program *program;
    const uint8_t *pixels;
    float *arena, *own;
    uint8_t *marks;
    float *logits; /* of the gates */
    float *means;  /* of the channels that gates read; 0 for closed ones */
    uint8_t *bits;
    const float **pointers; /* room for the channels of the widest map */
    int32_t *numbers;       /* the same, twice */
};

static inline const struct map *map_of(const struct state *s, int index) { return s->program->maps + index; }
static inline int64_t size_of(const struct map *m) { return (int64_t)m->height * m->width; }
static inline float *data_of(const struct state *s, const struct map *m) { return (m->own ? s->own : s->arena) + m->data; }
static inline uint8_t *open_of(const struct state *s, const struct map *m) { return s->marks + m->open; }
static inline int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

/* Lay out `rows` output rows from `first` on of one channel, for all taps; `planes`, `shift` and `phase` tell which. */
static void lay_out(const struct step *step, const struct map *in, const float *source, float *target, int64_t plane,
                    int first, int count, int lowest, int width)
{
    const int stride = step->stride, phases = stride < step->kernel_h ? stride : step->kernel_h;
    const int same = stride == 1 && width == in->width;
    for (int dx = 0; dx < step->kernel_w; dx++)
        for (int q = 0; q < phases; q++, target += plane) {
            const int shift = dx - step->padding;
            /* Rows of this plane are k * stride + phase. */
            const int phase = ((q - step->padding) % stride + stride) % stride;
            const int begin = first + lowest;
            if (same) {
                int top = begin < 0 ? -begin : 0, bottom = in->height - begin;
                if (bottom > count) bottom = count;
                if (bottom < top) bottom = top = 0;
                if (top) memset(target, 0, 4 * (int64_t)top * width);
                const float *from = source + (int64_t)(begin + top) * width;
                float *to = target + (int64_t)top * width;
                const int64_t pixels = (int64_t)(bottom - top) * width;
                const int away = shift < 0 ? -shift : shift;
                if (away >= width) memset(to, 0, 4 * pixels);
                else if (shift == 0) memcpy(to, from, 4 * pixels);
                else if (pixels) {
                    if (shift < 0) memcpy(to + away, from, 4 * (pixels - away));
                    else memcpy(to, from + away, 4 * (pixels - away));
                    for (int64_t row = shift < 0 ? 0 : width - away; row < pixels; row += width)
                        for (int column = 0; column < away; column++) to[row + column] = 0;
                }
                if (bottom < count) memset(target + (int64_t)bottom * width, 0, 4 * (int64_t)(count - bottom) * width);
                continue;
            }
            for (int k = 0; k < count; k++) {
                const int row = (begin + k) * stride + phase;
                float *to = target + (int64_t)k * width;
                if (row < 0 || row >= in->height) {
                    memset(to, 0, 4 * (int64_t)width);
                    continue;
                }
                const float *from = source + (int64_t)row * in->width + shift;
                int left = shift < 0 ? (-shift + stride - 1) / stride : 0;
                int right = in->width - shift > 0 ? (in->width - shift - 1) / stride + 1 : 0;
                if (left > width) left = width;
                if (right > width) right = width;
                if (right < left) right = left;
                for (int column = 0; column < left; column++) to[column] = 0;
                if (stride == 1) memcpy(to + left, from + left, 4 * (int64_t)(right - left));
                else if (stride == 2) for (int column = left; column < right; column++) to[column] = from[2 * column];
                else for (int column = left; column < right; column++) to[column] = from[column * stride];
                for (int column = right; column < width; column++) to[column] = 0;
            }
        }
}

/* Lay out `count` rows of one channel, of `row` pixels with what is padded, for the output rows from `first` on. */
static void lay_out_rows(const struct step *step, const struct map *in, const float *source, float *target, int64_t row,
                         int first, int64_t count)
{
    const int left = step->padding, right = (int)row - left - in->width;
    for (int y = first - step->padding; y < first - step->padding + count; y++, target += row) {
        if (y < 0 || y >= in->height) {
            memset(target, 0, 4 * row);
            continue;
        }
        for (int i = 0; i < left; i++) target[i] = 0;
        memcpy(target + left, source + (int64_t)y * in->width, 4 * (int64_t)in->width);
        for (int i = 0; i < right; i++) target[left + in->width + i] = 0;
    }
}

static void convolve(const struct state *s, const struct step *step)
{
    const struct map *in = map_of(s, step->in), *out = map_of(s, step->out);
    const struct map *other = step->other < 0 ? NULL : map_of(s, step->other);
    const int taps = step->kernel_h * step->kernel_w, width = out->width, stride = step->stride;
    const int phases = stride < step->kernel_h ? stride : step->kernel_h;
    const int64_t in_size = size_of(in), out_size = size_of(out);
    const uint8_t *in_open = open_of(s, in);
    uint8_t *out_open = open_of(s, out);
    float *const out_data = data_of(s, out);

    /* Open filters, and what becomes of closed ones. */
    int32_t *filters = s->numbers, *channels = s->numbers + out->channels;
    int filters_count = 0, inputs = 0;
    for (int c = 0; c < out->channels; c++) {
        const int open = step->gate < 0 || s->bits[step->gate + (step->kept ? step->kept[c] : c)];
        out_open[c] = (uint8_t)open;
        if (open) filters[filters_count++] = c;
        else if (other && open_of(s, other)[c]) {
            const float *from = data_of(s, other) + c * out_size;
            float *to = out_data + c * out_size;
            out_open[c] = 1;
            if (step->relu_after) for (int64_t i = 0; i < out_size; i++) to[i] = from[i] > 0 ? from[i] : 0;
            else if (to != from) memcpy(to, from, 4 * out_size);
        }
    }
    for (int c = 0; c < in->channels; c++) if (in_open[c]) channels[inputs++] = c;

    const float **input = s->pointers;
    const int plain = taps == 1 && stride == 1 && step->padding == 0;
    int64_t offset[MAX_TAPS];
    /* As in detector/engines/program.py. */
    const int whole_rows = stride == 1 && width % MOST_LANES == 0;
    const int64_t gap = whole_rows && !plain ? step->kernel_w - 1 : 0;
    struct window window = {input, channels, offset, 0, inputs, taps, step->relu_before, step->relu_after, width, gap};
    const int lowest = floor_div(-step->padding, stride), highest = floor_div(step->kernel_h - 1 - step->padding, stride);
    for (int first = 0; first < out->height; first += step->rows) {
        const int rows = out->height - first < step->rows ? out->height - first : step->rows;
        const int64_t begin = (int64_t)first * width;
        window.pixels = (int64_t)rows * width;
        if (plain) {
            offset[0] = 0;
            for (int i = 0; i < inputs; i++) input[i] = data_of(s, in) + channels[i] * in_size + begin;
        } else if (whole_rows) {
            const int64_t row = width + gap, plane = (rows + step->kernel_h - 1) * row;
            float *scratch = s->arena + s->program->scratch;
            for (int tap = 0; tap < taps; tap++) offset[tap] = tap / step->kernel_w * row + tap % step->kernel_w;
            for (int i = 0; i < inputs; i++) {
                float *target = scratch + i * plane;
                lay_out_rows(step, in, data_of(s, in) + channels[i] * in_size, target, row, first, plane / row);
                input[i] = target;
            }
        } else {
            const int count = rows + highest - lowest;
            const int64_t plane = ((int64_t)count * width + 15) / 16 * 16, planes = (int64_t)step->kernel_w * phases;
            float *scratch = s->arena + s->program->scratch;
            for (int dy = 0; dy < step->kernel_h; dy++)
                for (int dx = 0; dx < step->kernel_w; dx++) {
                    const int row = floor_div(dy - step->padding, stride) - lowest;
                    offset[dy * step->kernel_w + dx] = (dx * phases + dy % stride) * plane + (int64_t)row * width;
                }
            for (int i = 0; i < inputs; i++) {
                float *target = scratch + i * planes * plane;
                lay_out(step, in, data_of(s, in) + channels[i] * in_size, target, plane, first, count, lowest, width);
                input[i] = target;
            }
        }
        /* Blocks of nearly equal size. */
        const int blocks = (filters_count + FILTERS - 1) / FILTERS;
        for (int b = 0, done = 0; b < blocks; b++) {
            const int size = (filters_count - done + blocks - b - 1) / (blocks - b);
            const float *weights[FILTERS], *added[FILTERS];
            float *outputs[FILTERS], biases[FILTERS];
            int adds = 0;
            for (int f = 0; f < size; f++) {
                const int c = filters[done + f];
                weights[f] = step->weights + (int64_t)c * in->channels * taps;
                biases[f] = step->biases[c];
                outputs[f] = out_data + c * out_size + begin;
                added[f] = other && open_of(s, other)[c] ? data_of(s, other) + c * out_size + begin : NULL;
                adds |= added[f] != NULL;
            }
            best.convolve(&window, weights, biases, outputs, adds ? added : NULL, size);
            done += size;
        }
    }
}

/* A gate's second layer: logits of its filters from the sums of its units. */
static void excite(const struct step *step, float *units, float *logits)
{
    for (int h = 0; h < step->hidden; h++) if (units[h] < 0) units[h] = 0;
    for (int f = 0; f < step->filters; f++)
        logits[f] = step->biases[f] + best.dot(units, step->weights + (int64_t)f * step->hidden, step->hidden);
}

/* Its first layer: what channel `c`, of `size` pixels, adds to the units; writes the channel's mean. */
static void squeeze(const struct step *step, int64_t c, const float *pixels, int64_t size, float *units, float *means)
{
    const float pooled = best.sum(pixels, size) / size;
    means[step->first_read + (step->kept ? step->kept[c] : c)] = pooled;
    const float *row = step->squeeze + c * step->hidden;
    for (int h = 0; h < step->hidden; h++) units[h] += pooled * row[h];
}

static void gate(const struct state *s, const struct step *step)
{
    const struct map *in = map_of(s, step->in);
    const int64_t size = size_of(in);
    const uint8_t *open = open_of(s, in);
    float *units = s->arena + s->program->scratch, *logits = s->logits + step->gate;
    memcpy(units, step->squeeze_biases, 4 * step->hidden);
    for (int c = 0; c < in->channels; c++)
        if (open[c]) squeeze(step, c, data_of(s, in) + c * size, size, units, s->means);
    excite(step, units, logits);
    for (int f = 0; f < step->filters; f++) s->bits[step->gate + f] = logits[f] > 0;
}

/* For an engine whose convolutions are another library's, and whose maps hold open channels only: what a gate says of
 * one image. `read` are the numbers of the `channels` channels of `input`, null for all; `units` is room for the hidden
 * ones. Writes the channels' means, which are zero before, and the numbers of the open filters, in ascending order, and
 * says how many they are. */
int32_t pathguard_gate(const struct step *step, const float *input, const int64_t *read, int32_t channels, int64_t size,
                       float *units, float *logits, float *means, int64_t *opened)
{
    int32_t count = 0;
    memcpy(units, step->squeeze_biases, 4 * step->hidden);
    for (int c = 0; c < channels; c++) squeeze(step, read ? read[c] : c, input + c * size, size, units, means);
    excite(step, units, logits);
    for (int f = 0; f < step->filters; f++)
        if (logits[f] > 0) opened[count++] = f;
    return count;
}

/* For the same engine: the weights of the `makes` filters `made` of a convolution of `channels` channels, for the
 * `reads` channels `read` alone, and their biases; null for all. */
void pathguard_cut(const struct step *step, int32_t channels, const int64_t *read, int32_t reads, const int64_t *made,
                   int32_t makes, float *weights, float *biases)
{
    const int64_t taps = step->kernel_h * step->kernel_w;
    for (int f = 0; f < makes; f++) {
        const int64_t from = made ? made[f] : f;
        const float *filter = step->weights + from * channels * taps;
        biases[f] = step->biases[from];
        if (!read)
            memcpy(weights + f * (int64_t)reads * taps, filter, 4 * reads * taps);
        else if (taps == 9) /* a copy of known size is a few instructions */
            for (int c = 0; c < reads; c++) memcpy(weights + (f * (int64_t)reads + c) * 9, filter + read[c] * 9, 36);
        else
            for (int c = 0; c < reads; c++)
                memcpy(weights + (f * (int64_t)reads + c) * taps, filter + read[c] * taps, 4 * taps);
    }
}

/* For the same engine: the sum of two maps of `channels` channels of `size` pixels, which hold the channels numbered
 * `one_read` and `other_read`, in ascending order, alone; null for all. The sum holds all. */
void pathguard_sum(const float *one, const int64_t *one_read, int32_t ones, const float *other,
                   const int64_t *other_read, int32_t others, int32_t channels, int64_t size, int32_t relu, float *sum)
{
    int32_t i = 0, j = 0;
    for (int c = 0; c < channels; c++, sum += size) {
        const float *a = i < ones && (!one_read || one_read[i] == c) ? one + size * i++ : NULL;
        const float *b = j < others && (!other_read || other_read[j] == c) ? other + size * j++ : NULL;
        if (!a) {
            a = b;
            b = NULL;
        }
        if (!a) memset(sum, 0, 4 * size);
        else if (b && relu) for (int64_t p = 0; p < size; p++) sum[p] = a[p] + b[p] > 0 ? a[p] + b[p] : 0;
        else if (b) for (int64_t p = 0; p < size; p++) sum[p] = a[p] + b[p];
        else if (relu) for (int64_t p = 0; p < size; p++) sum[p] = a[p] > 0 ? a[p] : 0;
        else memcpy(sum, a, 4 * size);
    }
}

static void pool(const struct state *s, const struct step *step)
{
    const struct map *in = map_of(s, step->in), *out = map_of(s, step->out);
    const int largest = step->kind == MAX_POOL, padding = step->padding;
    /* A row between what is padded. */
    float *start = s->arena + s->program->scratch, *line = start + padding;
    for (int i = 0; i < padding; i++) start[i] = line[in->width + i] = largest ? -INFINITY : 0;
    memcpy(open_of(s, out), open_of(s, in), in->channels);
    for (int c = 0; c < in->channels; c++) {
        if (!open_of(s, in)[c]) continue;
        const float *from = data_of(s, in) + c * size_of(in);
        float *to = data_of(s, out) + c * size_of(out);
        for (int row = 0; row < out->height; row++, to += out->width) {
            int top = row * step->stride - padding, bottom = top + step->kernel_h;
            /* torch counts padded pixels up to the padding's own end. */
            const int high = (bottom < in->height + padding ? bottom : in->height + padding) - top;
            if (top < 0) top = 0;
            if (bottom > in->height) bottom = in->height;
            best.pool(from + (int64_t)top * in->width, bottom - top, in->width, line, start, to, out->width,
                      step->kernel_w, step->stride, largest);
            if (largest) continue;
            for (int column = 0; column < out->width; column++) {
                int left = column * step->stride - padding, right = left + step->kernel_w;
                const int wide = (right < in->width + padding ? right : in->width + padding) - left;
                if (left < 0) left = 0;
                if (right > in->width) right = in->width;
                to[column] /= step->count_padding ? high * wide : (bottom - top) * (right - left);
            }
        }
    }
}

/* Of all images of a group at once: each four rows of the weights are read from memory once. */
static void linear(const struct state *states, int images, const struct step *step)
{
    const struct map *in = map_of(states, step->in), *out = map_of(states, step->out);
    const int64_t size = size_of(in), total = in->channels * size;
    int runs[images];
    for (int i = 0; i < images; i++) {
        const struct state *s = states + i;
        const uint8_t *open = open_of(s, in);
        float *from = data_of(s, in);
        /* Runs of open channels: a closed one's weights need not be read. */
        int32_t *begins = s->numbers, *ends = s->numbers + in->channels;
        runs[i] = 0;
        if (size < 16) { /* too short to be worth skipping */
            for (int c = 0; c < in->channels; c++) if (!open[c]) memset(from + c * size, 0, 4 * size);
            begins[0] = 0, ends[0] = in->channels, runs[i] = 1;
        } else
            for (int c = 0; c < in->channels; c++) {
                if (!open[c]) continue;
                if (runs[i] && ends[runs[i] - 1] == c) ends[runs[i] - 1] = c + 1;
                else begins[runs[i]] = c, ends[runs[i]++] = c + 1;
            }
        memset(open_of(s, out), 1, out->channels);
    }
    for (int o = 0; o < out->channels; o += 4) {
        const int rows = out->channels - o < 4 ? out->channels - o : 4;
        for (int i = 0; i < images; i++) {
            const int32_t *begins = states[i].numbers, *ends = begins + in->channels;
            const float *from = data_of(states + i, in), *weights = step->weights + o * total;
            float *to = data_of(states + i, out) + o;
            memcpy(to, step->biases + o, 4 * rows);
            for (int r = 0; r < runs[i]; r++) {
                const int64_t begin = begins[r] * size, count = (ends[r] - begins[r]) * size;
                if (rows == 4) best.dots(from + begin, weights + begin, total, count, to);
                else for (int k = 0; k < rows; k++) to[k] += best.dot(from + begin, weights + k * total + begin, count);
            }
            if (step->relu_after) for (int k = 0; k < rows; k++) to[k] = to[k] > 0 ? to[k] : 0;
        }
    }
}

/* Steps that treat each channel of the output alone. */
static void by_channel(const struct state *s, const struct step *step)
{
    const struct map *in = step->in < 0 ? NULL : map_of(s, step->in), *out = map_of(s, step->out);
    const struct map *other = step->other < 0 ? NULL : map_of(s, step->other);
    const int64_t size = size_of(out);
    uint8_t *out_open = open_of(s, out);
    for (int c = 0; c < out->channels; c++) {
        float *to = data_of(s, out) + c * size;
        if (step->kind == PIXELS) { /* channels last -> first */
            for (int64_t i = 0; i < size; i++) to[i] = (float)s->pixels[i * out->channels + c] / 255.0f;
            out_open[c] = 1;
            continue;
        }
        int source = c - (step->kind == PAD_CHANNELS ? step->hidden : 0);
        const struct map *chosen = in;
        if (step->kind == CONCATENATE && c >= in->channels) chosen = other, source = c - in->channels;
        const int open = source >= 0 && source < chosen->channels && open_of(s, chosen)[source];
        const float *from = open ? data_of(s, chosen) + source * size_of(chosen) : NULL;
        out_open[c] = (uint8_t)open;
        if (step->kind == ADD) {
            const float *more = open_of(s, other)[c] ? data_of(s, other) + c * size : NULL;
            if (!from) from = more, more = NULL;
            out_open[c] = from != NULL;
            if (!from) continue;
            if (more && step->relu_after) for (int64_t i = 0; i < size; i++) { float sum = from[i] + more[i]; to[i] = sum > 0 ? sum : 0; }
            else if (more) for (int64_t i = 0; i < size; i++) to[i] = from[i] + more[i];
            else if (step->relu_after) for (int64_t i = 0; i < size; i++) to[i] = from[i] > 0 ? from[i] : 0;
            else if (to != from) memcpy(to, from, 4 * size);
        } else if (step->kind == AFFINE) {
            const float scale = step->weights[c], shift = step->biases[c];
            out_open[c] = 1;
            for (int64_t i = 0; i < size; i++) to[i] = from ? from[i] * scale + shift : shift;
        } else if (!open) {
            continue;
        } else if (step->kind == RELU) {
            for (int64_t i = 0; i < size; i++) to[i] = from[i] > 0 ? from[i] : 0;
        } else if (step->kind == MEAN) {
            to[0] = best.sum(from, size_of(in)) / size_of(in);
        } else if (step->kind == SUBSAMPLE) {
            for (int row = 0; row < out->height; row++)
                for (int column = 0; column < out->width; column++)
                    to[row * out->width + column] = from[(int64_t)row * step->stride * in->width + column * step->stride];
        } else if (to != from) { /* PAD_CHANNELS, CONCATENATE */
            memcpy(to, from, 4 * size);
        }
    }
}

static int descending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* Log-likelihood of one layer's gates for each class, a filter. */
static void likelihoods(const struct program *p, int kind, int layer, int first, int64_t square, const float *gate_logits,
                        const uint8_t *bits, float *room, double *likely)
{
    const struct score *score = p->score;
    const int width = score->widths[layer];
    if (kind == 0) {
        for (int f = 0; f < width; f++) room[f] = bits[first + f];
        for (int k = 0; k < p->classes; k++)
            likely[k] = (best.dot(room, score->odds + (int64_t)k * p->filters + first, width) +
                         score->closed[layer * p->classes + k]) / width;
        return;
    }
    float *centred = room + width;
    for (int f = 0; f < width; f++) room[f] = 0, centred[f] = gate_logits[first + f] - score->centre[first + f];
    best.spread(room, score->whitening + square, centred, width);
    const float *means = score->means + (int64_t)first * p->classes;
    for (int k = 0; k < p->classes; k++) likely[k] = -0.5 * best.distance(room, means + (int64_t)k * width, width) / width;
    double worst = 0;
    for (int k = 0; k < p->classes; k++) if (score->known[k] && likely[k] < worst) worst = likely[k];
    for (int k = 0; k < p->classes; k++) if (!score->known[k]) likely[k] = worst;
}

/* Adds the fit of each layer, and of all, to the predicted class. */
static void add_fits(const struct program *p, int kind, int predicted, const float *gate_logits, const uint8_t *bits,
                     float *room, double *sums, int count)
{
    const struct score *score = p->score;
    double fits[2 * (score->layers + 1)];
    double *likely = (double *)room, *whole = likely + p->classes;
    memset(whole, 0, p->classes * sizeof *whole);
    int first = 0;
    int64_t square = 0;
    for (int layer = 0; layer <= score->layers; layer++) {
        if (layer < score->layers) {
            const int width = score->widths[layer];
            likelihoods(p, kind, layer, first, square, gate_logits, bits, (float *)(whole + p->classes), likely);
            for (int k = 0; k < p->classes; k++) whole[k] += likely[k] * width / p->filters;
            first += width, square += (int64_t)width * width;
        } else
            likely = whole;
        double other = -1e300;
        for (int k = 0; k < p->classes; k++) if (k != predicted && likely[k] > other) other = likely[k];
        fits[2 * layer] = likely[predicted], fits[2 * layer + 1] = likely[predicted] - other;
    }
    best.weigh(sums, count, kind ? score->gate_fit : score->path_fit, NULL, fits, 2 * (score->layers + 1));
}

/* log(first + sum of exp(sums)) */
static double together(const double *sums, int count, int first)
{
    double largest = first ? 0 : sums[0], total = 0;
    for (int k = 0; k < count; k++) if (sums[k] > largest) largest = sums[k];
    for (int k = 0; k < count; k++) total += exp(sums[k] - largest);
    return largest + log(total + (first ? exp(-largest) : 0));
}

static double score_of(const struct program *p, const float *class_logits, const float *gate_logits, const float *means,
                       const uint8_t *bits, float *room)
{
    const struct score *score = p->score;
    const int classes = p->classes, filters = p->filters;
    const int first = score->units ? score->units : score->sums; /* how many are summed of the columns */
    double of_columns[first + 7], of_units[score->sums + 7], *sums = of_columns, *values = (double *)room;
    memcpy(sums, score->offsets, first * sizeof *sums);
    int predicted = 0;
    for (int k = 1; k < classes; k++) if (class_logits[k] > class_logits[predicted]) predicted = k;
    if (score->bits) {
        int32_t *open = (int32_t *)(values + filters);
        int opened = 0;
        for (int f = 0; f < filters; f++) open[opened] = f, values[f] = 1, opened += bits[f];
        best.weigh(sums, first, score->bits, open, values, opened);
    }
    if (score->logits) {
        for (int f = 0; f < filters; f++) values[f] = gate_logits[f];
        best.weigh(sums, first, score->logits, NULL, values, filters);
    }
    if (score->inputs) {
        for (int c = 0; c < p->reads; c++) values[c] = means[c];
        best.weigh(sums, first, score->inputs, NULL, values, p->reads);
    }
    if (score->margins || score->doubts) {
        float *ordered = (float *)(values + classes);
        memcpy(ordered, class_logits, 4 * classes);
        qsort(ordered, classes, sizeof(float), descending);
        for (int k = 1; k < classes; k++) values[k - 1] = ordered[0] - ordered[k];
        if (score->margins) best.weigh(sums, first, score->margins, NULL, values, classes - 1);
        if (score->doubts) {
            double odds = 0;
            for (int k = 1; k < classes; k++) {
                values[k - 1] = exp((double)(ordered[k] - ordered[0]));
                odds += exp((double)(ordered[k] - ordered[1]));
            }
            values[classes - 1] = ordered[1] - ordered[0] + log(odds);
            best.weigh(sums, first, score->doubts, NULL, values, classes);
        }
    }
    if (score->path_fit) add_fits(p, 0, predicted, gate_logits, bits, room, sums, first);
    if (score->gate_fit) add_fits(p, 1, predicted, gate_logits, bits, room, sums, first);
    if (score->units) {
        for (int u = 0; u < first; u++) if (sums[u] < 0) sums[u] = 0;
        sums = memcpy(of_units, score->hidden_offsets, score->sums * sizeof *sums);
        best.weigh(sums, score->sums, score->hidden, NULL, of_columns, first);
    }
    if (score->sums == 1) return sums[0];
    return together(sums + score->benign, score->sums - score->benign, 0) - together(sums, score->benign, 1);
}

/* Scores what an engine says about `images` images; `room` as pathguard_run's scratch space. */
void pathguard_score(const struct program *p, int64_t images, const float *class_logits, const float *gate_logits,
                     const float *means, const uint8_t *bits, double *room, double *scores)
{
    for (int64_t i = 0; i < images; i++)
        scores[i] = score_of(p, class_logits + i * p->classes, gate_logits + i * p->filters, means + i * p->reads,
                             bits + i * p->filters, (float *)room);
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return 1000000000 * (int64_t)time.tv_sec + time.tv_nsec;
}

/* One step of `images` images, one after the other but for linear maps; adds the time it takes to `nanoseconds`. */
static void take(const struct state *states, int images, const struct step *step, int64_t *nanoseconds)
{
    const int64_t began = nanoseconds ? now() : 0;
    if (step->kind == LINEAR) linear(states, images, step);
    else
        for (const struct state *s = states; s < states + images; s++)
            switch (step->kind) {
            case CONVOLVE: convolve(s, step); break;
            case GATE: gate(s, step); break;
            case MAX_POOL: case MEAN_POOL: pool(s, step); break;
            default: by_channel(s, step);
            }
    if (nanoseconds) *nanoseconds += now() - began;
}

/* Answers `images` images, `(images, height, width, channels)` of bytes; adds what each step took to `nanoseconds`,
 * null for nowhere. 0, or 1 where memory ran out. */
int pathguard_run(const struct program *p, int64_t images, int64_t image_bytes, int32_t widest, const uint8_t *pixels,
                  float *arena, float *class_logits, float *gate_logits, float *means, uint8_t *bits,
                  double *scores, int64_t *nanoseconds)
{
    const int group = images < p->group ? (int)images : (int)p->group;
    uint8_t *marks = malloc(group * p->marks + 1);
    const float **pointers = malloc((widest + 1) * sizeof *pointers);
    int32_t *numbers = malloc(2 * (group + 1) * (widest + 1) * sizeof *numbers);
    struct state *states = malloc((group + 1) * sizeof *states);
    const int failed = !(marks && pointers && numbers && states);
    if (!failed) memset(means, 0, images * p->reads * sizeof *means);
    for (int64_t first = 0; first < images && !failed; first += group) {
        const int count = images - first < group ? (int)(images - first) : group;
        for (int i = 0; i < count; i++)
            states[i] = (struct state){
                p, pixels + (first + i) * image_bytes, arena, arena + p->own + i * p->own_size, marks + i * p->marks,
                gate_logits + (first + i) * p->filters, means + (first + i) * p->reads, bits + (first + i) * p->filters,
                pointers, numbers + 2 * i * (widest + 1),
            };
        for (int k = 0, end; k < p->steps_count; k = end) {
            const struct step *steps = p->steps;
            end = k + 1;
            if (steps[k].together) {
                take(states, count, steps + k, nanoseconds ? nanoseconds + k : NULL);
                continue;
            }
            while (end < p->steps_count && !steps[end].together) end++;
            for (int i = 0; i < count; i++)
                for (int j = k; j < end; j++) take(states + i, 1, steps + j, nanoseconds ? nanoseconds + j : NULL);
        }
        for (int i = 0; i < count; i++) {
            float *logits = class_logits + (first + i) * p->classes;
            memcpy(logits, data_of(states + i, map_of(states + i, p->result)), 4 * p->classes);
            if (scores)
                scores[first + i] =
                    score_of(p, logits, states[i].logits, states[i].means, states[i].bits, arena + p->scratch);
        }
    }
    free(marks), free(pointers), free(numbers), free(states);
    return failed;
}
