/* What a decode step does between its matrix products, for the CPU in float32; kernels/native.py compiles and calls it.

   The same functions as the Triton kernels of decode_layer.py, decode_attention.py and draw.py. A row's result depends on
   nothing but the row: blocks are filled up with zeros, so that a row goes through the same instructions whoever is
   beside it. Vectors are those of GCC and Clang, which every processor has in some width. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
typedef float vec __attribute__((vector_size(64)));
typedef float loose __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(64)));

#define ROWS 8  /* query rows of a block: as many registers of sums */
#define KEYS 64 /* keys of a block */
#define ROUND(n, to) (((n) + (to) - 1) / (to) * (to))

static inline vec all(float x) { return (vec){0} + x; }
static inline vec choose(ints mask, vec yes, vec no) { return (vec)((mask & (ints)yes) | (~mask & (ints)no)); }
static inline vec highest(vec a, vec b) { return choose(a > b, a, b); }

/* The first n of LANES numbers, zeros behind; sizes that are known when compiled are instructions, not calls. */
static inline vec load(const float *x, int64_t n) {
    if (n >= LANES) return *(const loose *)x;
    vec v = {0};
    if (n == LANES / 2) memcpy(&v, x, sizeof v / 2);
    else memcpy(&v, x, n * sizeof(float));
    return v;
}

static inline void store(float *x, vec v, int64_t n) {
    if (n >= LANES) *(loose *)x = v;
    else if (n == LANES / 2) memcpy(x, &v, sizeof v / 2);
    else memcpy(x, &v, n * sizeof(float));
}

/* Do something with n numbers from i on, for all of width: LANES, which the compiler sees, and what is left. */
#define EACH(width, ...)                                                                  \
    do {                                                                                  \
        int64_t i = 0;                                                                    \
        for (; i + LANES <= (width); i += LANES) { const int64_t n = LANES; __VA_ARGS__ } \
        if (i < (width)) { const int64_t n = (width) - i; __VA_ARGS__ }                   \
    } while (0)

static inline float sum(vec v) {
    float x[LANES];
    memcpy(x, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

static inline float top(vec v) {
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

/* e^x to 2 units in the last place; 0 below -87. */
static inline vec vexp(vec x) {
    ints small = x < -87.0f;
    x = choose(small, all(-87.0f), choose(x > 88.0f, all(88.0f), x));
    vec n = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer in the low bits */
    ints power = (ints)n - 0x4B400000;
    n -= 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    return choose(small, all(0.0f), y * (vec)((power + 127) << 23));
}

/* log x for positive normal x. */
static inline vec vlog(vec x) {
    ints bits = (ints)x - 0x3F3504F3; /* sqrt(1/2): the rest is in [sqrt(1/2), sqrt(2)) */
    vec n = __builtin_convertvector(bits >> 23, vec);
    vec f = (vec)((bits & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
    vec s = f * f, y = all(7.0376836292e-2f);
    y = y * f - 1.1514610310e-1f;
    y = y * f + 1.1676998740e-1f;
    y = y * f - 1.2420140846e-1f;
    y = y * f + 1.4249322787e-1f;
    y = y * f - 1.6668057665e-1f;
    y = y * f + 2.0000714765e-1f;
    y = y * f - 2.4999993993e-1f;
    y = y * f + 3.3333331174e-1f;
    y = y * f * s - n * 2.12194440e-4f - 0.5f * s;
    return f + y + n * 0.693359375f;
}

/* A buffer of this thread's that grows. */
static float *scratch(int64_t numbers) {
    static __thread float *buffer = NULL;
    static __thread int64_t size = 0;
    if (numbers > size) {
        free(buffer);
        size = numbers + numbers / 2;
        buffer = aligned_alloc(64, ROUND(size * sizeof(float), 64));
        if (!buffer) abort();
    }
    return buffer;
}

/* x [rows, width] += delta (may be NULL);  y = x / sqrt(mean(x^2) + eps) * weight. */
void add_rms_norm(float *x, const float *delta, const float *weight, float *y, int64_t rows, int64_t width, float eps) {
    for (int64_t r = 0; r < rows; r++, x += width, y += width) {
        vec squares = {0};
        EACH(width, {
            vec v = load(x + i, n);
            if (delta) {
                v += load(delta + r * width + i, n);
                store(x + i, v, n);
            }
            squares += v * v;
        });
        float scale = 1.0f / sqrtf(sum(squares) / width + eps);
        EACH(width, store(y + i, load(x + i, n) * scale * load(weight + i, n), n););
    }
}

/* h [rows, 2 width] -> y [rows, width] = silu(first half) * second half. */
void swiglu(const float *h, float *y, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; r++, h += 2 * width, y += width)
        EACH(width, {
            vec gate = load(h + i, n);
            store(y + i, gate / (1.0f + vexp(-gate)) * load(h + width + i, n), n);
        });
}

/* See decode_layer.py. qkv [B, Hk, rep + 2, D], q [B, Hk * rep, D], caches [slots, Hk, limit, D]. */
void rotate_and_store(const float *qkv, const float *cos, const float *sin, const int64_t *rows, const int64_t *length,
                      const int64_t *prompt, float *q, float *k, float *v, int64_t B, int64_t slots, int64_t limit,
                      int64_t Hk, int64_t rep, int64_t D) {
    for (int64_t b = 0; b < B; b++) {
        int64_t slot = rows[b], own = length[slot] - 1, half = D / 2;
        if (slot >= slots || own < 0 || own >= limit) continue; /* a row that is none */
        const float *c = cos + (prompt[slot] + own) * D, *s = sin + (prompt[slot] + own) * D;
        for (int64_t head = 0; head < Hk; head++) {
            int64_t place = ((slot * Hk + head) * limit + own) * D;
            for (int64_t i = 0; i <= rep; i++, qkv += D) {
                float *to = i < rep ? q + ((b * Hk + head) * rep + i) * D : k + place;
                for (int64_t d = 0; d < half; d++) to[d] = qkv[d] * c[d] + qkv[d + half] * s[d];
                for (int64_t d = half; d < D; d++) to[d] = qkv[d] * c[d] + qkv[d - half] * s[d];
            }
            memcpy(v + place, qkv, D * sizeof(float));
            qkv += D;
        }
    }
}

/* scores[r][p] of ROWS rows with keys [first, first + KEYS), which lie turned, [D][KEYS]. */
static void score(const float *q, const float *turned, float *scores, int64_t stride, int64_t D) {
    for (int64_t half = 0; half < ROWS; half += 4) {
        vec a[4] = {{0}}, b[4] = {{0}}, c[4] = {{0}}, e[4] = {{0}};
        const float *row = q + half * D;
        for (int64_t d = 0; d < D; d++, row++)
            for (int j = 0; j < 4; j++) {
                vec k = load(turned + d * KEYS + j * LANES, LANES);
                a[j] += k * row[0], b[j] += k * row[D], c[j] += k * row[2 * D], e[j] += k * row[3 * D];
            }
        for (int j = 0; j < 4; j++) {
            float *to = scores + half * stride + j * LANES;
            store(to, a[j], LANES), store(to + stride, b[j], LANES);
            store(to + 2 * stride, c[j], LANES), store(to + 3 * stride, e[j], LANES);
        }
    }
}

/* Add sum over keys of weight[r][p] value[p] to out [ROWS][D]. */
static void add_values(const float *weight, int64_t stride, const float *values, int64_t keys, float *out, int64_t D) {
    EACH(D, {
        vec o[ROWS] = {{0}};
        for (int64_t p = 0; p < keys; p++) {
            vec v = load(values + p * D + i, n);
            for (int r = 0; r < ROWS; r++) o[r] += v * weight[r * stride + p];
        }
        for (int r = 0; r < ROWS; r++) store(out + r * D + i, load(out + r * D + i, n) + o[r], n);
    });
}

/* See decode_attention.py: each work item is a whole prompt with up to most / rep rows that read it. */
void decode_attention(const float *q, const float *k_slab, const float *v_slab, const float *k_own, const float *v_own,
                      const int64_t *rows, const int64_t *length, const int64_t *members, const int64_t *work,
                      int64_t items, float *out, int64_t most, int64_t limit, int64_t Hk, int64_t rep, int64_t D,
                      float scale) {
    for (int64_t n = 0; n < items; n++, work += 6) {
        int64_t start = work[0], capacity = work[1], prompt = work[3], count = work[5] & 0xFFFFFFFF;
        const int64_t *member = members + work[4];
        int64_t prefix = ROUND(prompt, KEYS), stride = prefix + ROUND(limit, LANES), R = ROUND(count * rep, ROWS);
        float *turned = scratch(ROUND(most, ROWS) * (stride + 2 * D) + KEYS * D);
        float *queries = turned + KEYS * D, *sums = queries + R * D, *scores = sums + R * D;
        for (int64_t head = 0; head < Hk; head++) {
            const float *k = k_slab + (start * Hk + head * capacity) * D;
            const float *v = v_slab + (start * Hk + head * capacity) * D;
            memset(queries, 0, 2 * R * D * sizeof(float));
            for (int64_t r = 0; r < count * rep; r++) {
                const float *from = q + ((member[r / rep] * Hk + head) * rep + r % rep) * D;
                for (int64_t d = 0; d < D; d++) queries[r * D + d] = from[d] * scale;
            }
            for (int64_t p = 0; p < prompt; p += KEYS) {
                int64_t there = prompt - p < KEYS ? prompt - p : KEYS;
                if (there < KEYS) memset(turned, 0, KEYS * D * sizeof(float));
                for (int64_t j = 0; j < there; j++)
                    for (int64_t d = 0; d < D; d++) turned[d * KEYS + j] = k[(p + j) * D + d];
                for (int64_t r = 0; r < R; r += ROWS) score(queries + r * D, turned, scores + r * stride + p, stride, D);
            }
            float total[R];
            for (int64_t r = 0; r < R; r++) {
                float *s = scores + r * stride;
                int64_t own = 0;
                for (int64_t p = prompt; p < prefix; p++) s[p] = -INFINITY;
                if (r < count * rep) {
                    int64_t slot = rows[member[r / rep]];
                    const float *key = k_own + (slot * Hk + head) * limit * D;
                    own = length[slot];
                    for (int64_t j = 0; j < own; j++, key += D) {
                        vec products = {0};
                        EACH(D, products += load(queries + r * D + i, n) * load(key + i, n););
                        s[prefix + j] = sum(products);
                    }
                }
                int64_t end = prefix + ROUND(own, LANES);
                for (int64_t p = prefix + own; p < end; p++) s[p] = -INFINITY;
                vec m = all(-INFINITY), t = {0};
                for (int64_t p = 0; p < end; p += LANES) m = highest(load(s + p, LANES), m);
                float high = top(m);
                for (int64_t p = 0; p < end; p += LANES) {
                    vec e = vexp(load(s + p, LANES) - high);
                    store(s + p, e, LANES);
                    t += e;
                }
                total[r] = sum(t);
            }
            for (int64_t r = 0; r < R; r += ROWS) add_values(scores + r * stride, stride, v, prompt, sums + r * D, D);
            for (int64_t r = 0; r < count * rep; r++) {
                int64_t b = member[r / rep], slot = rows[b], own = length[slot];
                const float *w = scores + r * stride + prefix, *value = v_own + (slot * Hk + head) * limit * D;
                float *to = out + ((b * Hk + head) * rep + r % rep) * D;
                EACH(D, {
                    vec o = load(sums + r * D + i, n);
                    for (int64_t j = 0; j < own; j++) o += load(value + j * D + i, n) * w[j];
                    store(to + i, o / total[r], n);
                });
            }
        }
    }
}

static inline uint64_t mixed(uint64_t x) { /* noise.uniform: SplitMix64 but for its last step */
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    return (x ^ (x >> 27)) * 0x94D049BB133111EBu;
}

static float log_sum(const float *x, int64_t n, float high) {
    if (high == -INFINITY) return high;
    vec total = {0};
    for (int64_t i = 0; i < n; i += LANES) total += vexp(load(x + i, LANES) - high);
    return high + logf(sum(total));
}

/* See sampling.draw_rows. logits [B, local], the first valid of them count; allowed [local], floor [B] and ties [B] may be
   NULL. found: float [4, B]: highest noisy logit, that logit without noise, log-sum-exp of all and of the kept. */
void draw_rows(const float *logits, const double *temperature, const uint8_t *allowed, const float *floor,
               const int64_t *ties, const int64_t *counter, int64_t B, int64_t local, int64_t valid, int64_t first,
               int64_t *token, float *found) {
    int64_t width = ROUND(valid, LANES);
    float *z = scratch(3 * width), *kept = z + width, *noise = kept + width;
    ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int64_t b = 0; b < B; b++, logits += local) {
        int greedy = temperature[b] == 0;
        float T = greedy ? 1.0f : (float)temperature[b], floor_b = floor ? floor[b] : -INFINITY;
        for (int64_t i = 0; i < valid; i++) z[i] = logits[i] / T;
        for (int64_t i = valid; i < width; i++) z[i] = -INFINITY, noise[i] = 0.5f;
        memcpy(kept, z, width * sizeof(float));
        if (allowed)
            for (int64_t i = 0; i < valid; i++) kept[i] = allowed[i] ? kept[i] : -INFINITY;
        if (floor)
            for (int64_t i = 0; i < valid; i++) kept[i] = logits[i] < floor_b ? -INFINITY : kept[i];
        if (floor && ties)
            for (int64_t i = 0, left = ties[b]; i < valid; i++)
                if (logits[i] == floor_b && kept[i] > -INFINITY && left-- <= 0) kept[i] = -INFINITY;
        if (!greedy)
            for (int64_t i = 0; i < valid; i++) {
                uint64_t x = mixed((uint64_t)counter[b] + (uint64_t)(first + i + 1) * 0x9E3779B97F4A7C15u);
                noise[i] = ((float)(int32_t)(x >> 41) + 0.5f) * 0x1p-23f;
            }
        vec high = all(-INFINITY), kept_high = high, best = high;
        ints where = lane;
        for (int64_t i = 0; i < width; i += LANES) {
            vec x = load(kept + i, LANES);
            high = highest(load(z + i, LANES), high);
            kept_high = highest(x, kept_high);
            if (!greedy) x -= vlog(-vlog(load(noise + i, LANES)));
            ints more = x > best;
            best = choose(more, x, best);
            where = (more & (lane + (int32_t)i)) | (~more & where);
        }
        int64_t column = where[0];
        float most = best[0];
        for (int i = 1; i < LANES; i++)
            if (best[i] > most || (best[i] == most && where[i] < column)) most = best[i], column = where[i];
        token[b] = first + column;
        found[b] = most;
        found[B + b] = width ? kept[column] : -INFINITY;
        found[2 * B + b] = log_sum(z, width, top(high));
        found[3 * B + b] = allowed || floor ? log_sum(kept, width, top(kept_high)) : found[2 * B + b];
    }
}
