/* Whole optimizer steps on a CPU: plain loops over pointers, which the compiler turns into vector instructions.
 *
 * A step runs over tiles of a parameter. A tile of the gradient, of the weight and of each moment is read into fp32
 * buffers that stay in the first-level cache, stepped there, and written back in the format in which it is kept. So
 * one rule serves every dtype, every store and every way of writing weights, and each tensor is read once and written
 * once.
 *
 * Results are the same bits on every processor: sums run over 16 lanes whatever the width of its vectors, a
 * parameter is cut into the same parts whatever the number of threads, and the file is compiled with
 * -ffp-contract=off, without which a compiler fuses multiplications and additions where the processor can.
 *
 * Nothing here allocates, calls Python or torch, or keeps anything between two calls. The structures are mirrored in
 * structures.py, which must change together with this file; ABI_VERSION says so.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define ABI_VERSION 4
#define TILE 1024  /* elements; four fp32 buffers of a tile fill half of a first-level cache of 32 KiB */
#define LANES 16

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#ifndef FOR_CPU /* suffix of every exported name: the file is compiled once for each kind of processor */
#define FOR_CPU
#define BASELINE
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_X86_KINDS
#endif
#define JOIN(a, b) a##b
#define NAMED(name, suffix) JOIN(name, suffix)

#define INLINE static inline __attribute__((always_inline))
#define TILED static __attribute__((noinline)) /* works on a whole tile: a call costs nothing beside it */
#define EACH(j, count) for (int64_t j = 0; j < (count); j++)

#ifdef BASELINE
EXPORT int32_t abi_version(void) { return ABI_VERSION; }
EXPORT int32_t tile_elements(void) { return TILE; }
/* The most that this processor can do of what the library was built for. */
EXPORT const char *best_kind(void) {
#ifdef HAS_X86_KINDS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return "_v4";
    if (__builtin_cpu_supports("x86-64-v3")) return "_v3";
#endif
    return "";
}
#endif

/* --- numbers ------------------------------------------------------------------------------------------------------ */

enum { FLOAT32, BFLOAT16, FLOAT16 };

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
INLINE int is_nan(uint32_t u) { return (u & 0x7fffffffu) > 0x7f800000u; }
INLINE float from_bf16(uint16_t x) { return float_of((uint32_t)x << 16); }
INLINE uint16_t to_bf16(float x) {
    uint32_t u = bits_of(x), rounded = u + 0x7fffu + ((u >> 16) & 1u);
    return (uint16_t)(is_nan(u) ? 0x7fc0u : rounded >> 16);
}
/* fp16 by integer arithmetic, as not every compiler vectorises its own type. */
INLINE float from_fp16(uint16_t x) {
    uint32_t sign = (uint32_t)(x & 0x8000u) << 16, rest = x & 0x7fffu;
    uint32_t tiny = bits_of(float_of(0x3f000000u + rest) - 0.5f);  /* the last place of 0.5 is 2**-24 */
    uint32_t normal = (rest << 13) + 0x38000000u;  /* no fp32 number here is subnormal: those may be flushed to zero */
    uint32_t found = rest < 0x400u ? tiny : normal;
    return float_of(sign | (rest >= 0x7c00u ? found + 0x38000000u : found));
}
INLINE uint16_t to_fp16(float x) {
    uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, rest = u & 0x7fffffffu;
    uint32_t normal = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    uint32_t tiny = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;  /* the sum's last place is 2**-24 */
    uint32_t found = rest < 0x38800000u ? tiny : normal;
    found = rest >= 0x47800000u ? 0x7c00u : found;
    found = rest > 0x7f800000u ? 0x7e00u : found;
    return (uint16_t)(sign | found);
}

/* --- random bits: a hash of a key and of the element's index ------------------------------------------------------- */

INLINE uint32_t mix(uint32_t x) {  /* the finalizer of MurmurHash3 */
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}
/* The words first .. first + count - 1, each the random bits of two neighbours. */
INLINE void random_words(uint32_t key, int64_t first, int64_t count, uint32_t *restrict words) {
    int64_t to_next = (((first >> 32) + 1) << 32) - first, before = count < to_next ? count : to_next;
    uint32_t low = (uint32_t)first, here = mix(key ^ (uint32_t)(first >> 32));
    EACH(j, before) words[j] = mix((low + (uint32_t)j) ^ here);
    if (before < count) {
        uint32_t next = mix(key ^ (uint32_t)((first >> 32) + 1));
        EACH(j, count - before) words[before + j] = mix((uint32_t)j ^ next);
    }
}
/* 16 random bits for each of `count` elements from flat index `start` on. */
TILED void random_bits(uint32_t key, int64_t start, int64_t count, uint16_t *restrict bits) {
    uint32_t words[TILE / 2 + 1];
    int64_t first = start >> 1;
    random_words(key, first, ((start + count + 1) >> 1) - first, words);
    memcpy(bits, (uint16_t *)words + (start & 1), 2 * (size_t)count);
}
INLINE uint16_t round_bf16(float x, uint16_t random) {
    uint32_t u = bits_of(x), rounded = u + (uint32_t)(int32_t)(int16_t)random + 0x8000u;
    return (uint16_t)(is_nan(u) ? 0x7fc0u : rounded >> 16);
}
INLINE uint16_t round_fp16(float x, uint16_t random) {
    uint32_t u = bits_of(x), share = (uint32_t)((int32_t)(int16_t)random + 0x8000) >> 3;
    float normal = float_of((u + share) & 0xffffe000u);
    float places = x * 0x1p24f + (float)(int32_t)share * 0x1p-13f;
    float least = (float)(int32_t)(fabsf(places) < 2048.0f ? places : 0.0f);  /* 1024 is reached */
    float tiny = (least > places ? least - 1.0f : least) * 0x1p-24f;  /* floor */
    float rounded = fabsf(x) < 0x1p-14f ? tiny : normal;
    return to_fp16((u & 0x7f800000u) == 0x7f800000u ? x : rounded);
}

/* --- tiles of tensors --------------------------------------------------------------------------------------------- */

/* Ask for the tile after this one: the processor's own prefetching stops at the ends of pages. Tiles of 16-bit numbers
 * gain a quarter; tiles of fp32 lose, as the processor is at its limit of open requests. */
INLINE void prefetch_next(const void *from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch((const char *)from + bytes + line);
}

TILED void read_tile(const void *from, int32_t type, int64_t at, int64_t count, float *restrict to) {
    if (type == FLOAT32) {
        memcpy(to, (const float *)from + at, 4 * (size_t)count);
    } else if (type == BFLOAT16) {
        const uint16_t *restrict x = (const uint16_t *)from + at;
        EACH(j, count) to[j] = from_bf16(x[j]);
    } else {
        const uint16_t *restrict x = (const uint16_t *)from + at;
        EACH(j, count) to[j] = from_fp16(x[j]);
    }
}

/* How a weight is written; `extra` keeps what the parameter cannot hold. */
enum { PLAIN, STOCHASTIC, KAHAN, SPLIT16, SPLIT8 };
typedef struct {
    void *param, *extra;
    int64_t start;  /* flat index in the whole parameter of the first element here, for the random bits */
    int32_t type, how;
    uint32_t key;
} Weight;

INLINE float from_split(int32_t p, int32_t correction, int dropped) {
    uint32_t word = ((uint32_t)correction + ((uint32_t)p << (16 - dropped))) << dropped;
    int zero_from_outside = (p & 0x7fff) == 0 && correction < 0;
    return float_of(zero_from_outside ? 0u : word);
}
INLINE uint32_t split_word(float x, int dropped) {
    uint32_t word = bits_of(x);
    word = is_nan(word) ? 0x7fc00000u : word;
    return dropped ? word + (1u << (dropped - 1)) : word;
}

/* The fp32 parameter itself, or a buffer with its value. */
TILED float *read_weight(const Weight *w, int64_t at, int64_t count, float *restrict to) {
    int64_t size = w->type == FLOAT32 ? 4 : 2;
    if (size == 2) prefetch_next((const char *)w->param + at * size, count * size);
    if (w->type == FLOAT32) return (float *)w->param + at;
    const int16_t *p = (const int16_t *)w->param + at;
    if (w->how == SPLIT16) {
        const int16_t *correction = (const int16_t *)w->extra + at;
        EACH(j, count) to[j] = from_split(p[j], correction[j], 0);
    } else if (w->how == SPLIT8) {
        const int8_t *correction = (const int8_t *)w->extra + at;
        EACH(j, count) to[j] = from_split(p[j], correction[j], 8);
    } else {
        read_tile(w->param, w->type, at, count, to);
        if (w->how == KAHAN) {
            float rest[TILE];
            read_tile(w->extra, w->type, at, count, rest);
            EACH(j, count) to[j] += rest[j];
        }
    }
    return to;
}

INLINE float finite_or_zero(float x) { return (bits_of(x) & 0x7f800000u) == 0x7f800000u ? 0.0f : x; }
#define WRITE_KAHAN(TO, FROM)                                                                                          \
    EACH(j, count) {                                                                                                   \
        uint16_t first = TO(x[j]);                                                                                     \
        uint16_t rest = TO(finite_or_zero(x[j] - FROM(first)));                                                        \
        uint16_t rounded = TO(FROM(first) + FROM(rest)); /* half a place of rest may call for the neighbour */         \
        p[j] = rounded;                                                                                                \
        extra[j] = TO(finite_or_zero(x[j] - FROM(rounded)));                                                           \
    }

TILED void write_weight(const Weight *w, int64_t at, int64_t count, const float *restrict x) {
    if (w->type == FLOAT32) return;  /* stepped in place */
    uint16_t *restrict p = (uint16_t *)w->param + at;
    if (w->how == PLAIN) {
        if (w->type == BFLOAT16) EACH(j, count) p[j] = to_bf16(x[j]);
        else EACH(j, count) p[j] = to_fp16(x[j]);
    } else if (w->how == STOCHASTIC) {
        uint16_t random[TILE + 2];
        random_bits(w->key, w->start + at, count, random);
        if (w->type == BFLOAT16) EACH(j, count) p[j] = round_bf16(x[j], random[j]);
        else EACH(j, count) p[j] = round_fp16(x[j], random[j]);
    } else if (w->how == KAHAN) {
        uint16_t *restrict extra = (uint16_t *)w->extra + at;
        if (w->type == BFLOAT16) WRITE_KAHAN(to_bf16, from_bf16)
        else WRITE_KAHAN(to_fp16, from_fp16)
    } else if (w->how == SPLIT16) {
        uint16_t *restrict extra = (uint16_t *)w->extra + at;
        EACH(j, count) {
            uint32_t word = split_word(x[j], 0);
            p[j] = (uint16_t)((word + 0x8000u) >> 16);
            extra[j] = (uint16_t)word;
        }
    } else {
        uint8_t *restrict extra = (uint8_t *)w->extra + at;
        EACH(j, count) {
            uint32_t word = split_word(x[j], 8);
            p[j] = (uint16_t)((word + 0x8000u) >> 16);
            extra[j] = (uint8_t)(word >> 8);
        }
    }
}

/* Clamp and scale a tile of the gradient, and add an L2 penalty. */
typedef struct {
    const void *grad;
    int32_t type;
    float bound, scale, penalty;
    float largest; /* in a table of steps: larger elements are refused; negative if none is */
} Gradient;

/* The gradient itself where it is fp32 and nothing changes it, else a buffer with what it becomes. */
TILED const float *read_gradient(const Gradient *g, int64_t at, int64_t count, float *restrict room) {
    float bound = g->bound, scale = g->scale;
    int64_t size = g->type == FLOAT32 ? 4 : 2;
    if (size == 2) prefetch_next((const char *)g->grad + at * size, count * size);
    if (g->type == FLOAT32 && bound == INFINITY && scale == 1.0f) return (const float *)g->grad + at;
    read_tile(g->grad, g->type, at, count, room);
    if (bound < INFINITY) EACH(j, count) room[j] = room[j] > bound ? bound : room[j] < -bound ? -bound : room[j];
    if (scale != 1.0f) EACH(j, count) room[j] *= scale;
    return room;
}

/* Whether no element is NaN, infinite or beyond `largest` in magnitude, from `begin` to `end`. */
EXPORT int32_t NAMED(within, FOR_CPU)(const void *x, int32_t type, float largest, int64_t begin, int64_t end) {
    if (type == FLOAT32) {
        const uint32_t *u = (const uint32_t *)x;
        uint32_t most = 0, limit = bits_of(largest < 0x1.fffffep127f ? largest : 0x1.fffffep127f);
        for (int64_t j = begin; j < end; j++) {
            uint32_t magnitude = u[j] & 0x7fffffffu;
            most = magnitude > most ? magnitude : most;
        }
        return most <= limit;
    }
    const uint16_t *u = (const uint16_t *)x;
    uint16_t most = 0;
    for (int64_t j = begin; j < end; j++) {
        uint16_t magnitude = u[j] & 0x7fffu;
        most = magnitude > most ? magnitude : most;
    }
    if (type == BFLOAT16) return most < 0x7f80u && from_bf16(most) <= largest;
    return most < 0x7c00u && from_fp16(most) <= largest;
}

/* --- moments and the formats they are kept in ---------------------------------------------------------------------- */

enum { NOTHING, FULL32, FULL16, FULL16_RANDOM, SIGNED8, UNSIGNED8, SIGNED_E4M3, UNSIGNED_E4M3, SIGNED4, LINEAR4, SPREAD, OUTER };
typedef struct {
    void *data;           /* numbers, codes, one number per `block` elements, or one per row */
    float *scale;         /* the largest magnitude of each block, or one number per column */
    const float *values;  /* what the codes stand for */
    const float *decades; /* [4][8]: where each decade of a dynamic map begins; slope and offset of its codes; the last */
    int64_t start;        /* as in Weight, for the random bits */
    int64_t block;        /* elements per scale; per number; or per row */
    int32_t kind;
    uint32_t key;
} Moment;

#define SMALLEST_MAXIMUM 0x1p-120f
#define LARGEST_MAXIMUM 0x1.fffffep127f

/* The place, among the magnitudes of a dynamic map, that is nearest to x: linear within a decade. */
INLINE int32_t place_in_map(float x, const float *restrict decades) {
    float slope = 0.0f, offset = 0.0f, last = 0.0f;
    _Pragma("GCC unroll 8") for (int k = 0; k < 8; k++) {
        int above = x > decades[k];
        slope = above ? decades[8 + k] : slope;
        offset = above ? decades[16 + k] : offset;
        last = above ? decades[24 + k] : last;
    }
    float place = x * slope + offset;
    return (int32_t)(place < last ? place : last);
}
INLINE uint8_t to_e4m3(float x) {  /* |x| <= 448 */
    uint32_t u = bits_of(x), sign = (u >> 24) & 0x80u, rest = u & 0x7fffffffu;
    uint32_t normal = (rest - 0x3c000000u + 0x7ffffu + ((rest >> 20) & 1u)) >> 20;
    uint32_t tiny = bits_of(float_of(rest) + 16384.0f) - 0x46800000u;  /* the sum's last place is 2**-9 */
    return (uint8_t)(sign | (rest < 0x3c800000u ? tiny : normal));
}
INLINE uint32_t place_in_signed4(float x, const float *restrict bounds) {
    uint32_t place = 0;
    _Pragma("GCC unroll 15") for (int k = 0; k < 15; k++) place += x > bounds[k];
    return place;
}

TILED void decode_block(const Moment *m, int64_t at, int64_t count, float *restrict to) {
    float scale = m->scale[at / m->block];
    const float *restrict values = m->values;
    if (m->kind == SIGNED4 || m->kind == LINEAR4) {
        const uint8_t *restrict codes = (const uint8_t *)m->data + at / 2;
        float pair[2];
        int64_t j = 0;
        for (; j + 1 < count; j += 2) {
            memcpy(to + j, values + 2 * codes[j / 2], 8);  /* values[code][2]: what both halves of a byte stand for */
        }
        if (j < count) {
            memcpy(pair, values + 2 * codes[j / 2], 8);
            to[j] = pair[0];
        }
    } else {
        const uint8_t *restrict codes = (const uint8_t *)m->data + at;
        /* One by one: processors gather more slowly than they load, and a compiler would gather. */
        EACH(j, count) {
            to[j] = values[codes[j]];
            __asm__ volatile("");
        }
    }
    EACH(j, count) to[j] *= scale;
}

TILED void encode_block(const Moment *m, int64_t at, int64_t count, const float *restrict x) {
    uint32_t largest = 0;  /* the bits of positive numbers are in the order of the numbers */
    EACH(j, count) {
        uint32_t magnitude = bits_of(x[j]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    float most = float_of(largest);
    most = most < SMALLEST_MAXIMUM ? SMALLEST_MAXIMUM : most > LARGEST_MAXIMUM ? LARGEST_MAXIMUM : most;
    m->scale[at / m->block] = most;
    float inverse = 1.0f / most;
    uint8_t *restrict codes = (uint8_t *)m->data + (m->kind == SIGNED4 || m->kind == LINEAR4 ? at / 2 : at);
    if (m->kind == SIGNED8) {
        float decades[32];
        memcpy(decades, m->decades, sizeof decades);
        EACH(j, count) {
            int32_t place = place_in_map(fabsf(x[j]) * inverse, decades);
            int32_t below = 127 - (place > 127 ? 127 : place);  /* the map has no -1 */
            codes[j] = (uint8_t)(x[j] < 0 ? below : 127 + place);
        }
    } else if (m->kind == UNSIGNED8) {
        float decades[32];
        memcpy(decades, m->decades, sizeof decades);
        EACH(j, count) {
            int32_t place = place_in_map(x[j] * inverse, decades);
            codes[j] = (uint8_t)(place + (place == 0 && x[j] > 0));  /* what is positive stays positive */
        }
    } else if (m->kind == SIGNED_E4M3 || m->kind == UNSIGNED_E4M3) {
        float least = m->kind == UNSIGNED_E4M3 ? 0x1p-9f : 0.0f;
        EACH(j, count) {
            float scaled = x[j] / most * 448.0f;
            scaled = scaled > 448.0f ? 448.0f : scaled < -448.0f ? -448.0f : scaled;
            codes[j] = to_e4m3(x[j] > 0 && scaled < least ? least : scaled);
        }
    } else {
        uint8_t places[TILE];
        if (m->kind == SIGNED4) {
            float bounds[15];
            memcpy(bounds, m->decades, sizeof bounds);
            EACH(j, count) places[j] = (uint8_t)place_in_signed4(x[j] * inverse, bounds);
        } else {
            EACH(j, count) {
                float place = x[j] / most * 16.0f - 1.5f;  /* exact, as 16 is a power of two and 1.5 has few bits */
                int32_t below = (int32_t)place;
                int32_t above = below + ((float)below < place);
                above = above > 15 ? 15 : above;
                places[j] = (uint8_t)(above < 0 ? 0 : above);
            }
        }
        for (int64_t j = count; j & 1; j++) places[j] = 0;
        EACH(j, (count + 1) / 2) codes[j] = (uint8_t)(places[2 * j] << 4 | places[2 * j + 1]);
    }
}

/* The fp32 moment itself, or a buffer with its value. */
TILED float *read_moment(const Moment *m, int64_t at, int64_t count, float *restrict to) {
    if (m->kind == FULL32) {
        return (float *)m->data + at;
    }
    if (m->kind == FULL16 || m->kind == FULL16_RANDOM) {
        read_tile(m->data, BFLOAT16, at, count, to);
    } else if (m->kind == SPREAD) {
        const float *restrict numbers = (const float *)m->data;
        for (int64_t j = 0, last; j < count; j = last) {
            int64_t place = (at + j) / m->block, end = (place + 1) * m->block - at;
            last = end < count ? end : count;
            for (int64_t i = j; i < last; i++) to[i] = numbers[place];
        }
    } else if (m->kind == OUTER) {
        const float *restrict rows = (const float *)m->data;
        for (int64_t j = 0, last; j < count; j = last) {
            int64_t row = (at + j) / m->block, end = (row + 1) * m->block - at;
            const float *restrict cols = m->scale - row * m->block + at;
            last = end < count ? end : count;
            for (int64_t i = j; i < last; i++) to[i] = rows[row] * cols[i];
        }
    } else if (m->kind != NOTHING) {
        for (int64_t j = 0; j < count; j += m->block) {
            decode_block(m, at + j, count - j < m->block ? count - j : m->block, to + j);
        }
    }
    return to;
}

TILED void write_moment(const Moment *m, int64_t at, int64_t count, const float *restrict x) {
    if (m->kind == FULL16) {
        uint16_t *restrict to = (uint16_t *)m->data + at;
        EACH(j, count) to[j] = to_bf16(x[j]);
    } else if (m->kind == FULL16_RANDOM) {
        uint16_t *restrict to = (uint16_t *)m->data + at, random[TILE + 2];
        random_bits(m->key, m->start + at, count, random);
        EACH(j, count) to[j] = round_bf16(x[j], random[j]);
    } else if (m->kind >= SIGNED8 && m->kind <= LINEAR4) {
        for (int64_t j = 0; j < count; j += m->block) {
            encode_block(m, at + j, count - j < m->block ? count - j : m->block, x + j);
        }
    }
}

/* Statistics alone, for chains that no whole step knows: from `begin`, a multiple of the block, to `end`. */
EXPORT void NAMED(decode, FOR_CPU)(const Moment *m, float *to, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += TILE) read_moment(m, at, end - at < TILE ? end - at : TILE, to + at);
}
EXPORT void NAMED(encode, FOR_CPU)(const Moment *m, const float *x, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += TILE) write_moment(m, at, end - at < TILE ? end - at : TILE, x + at);
}

/* --- steps in which every element goes its own way ------------------------------------------------------------------ */

enum { DESCENT, ADAM, LION, AVERAGE, HEAVY_BALL, ROOT_OF_SUM };
typedef struct {
    Weight weight;
    Gradient grad;
    Moment first, second;
    int32_t rule, nesterov, moves_second;
    float first_weight, second_weight;  /* shares of the new value in the averages; of a heavy ball: 1 - dampening */
    float mix;                          /* Lion: share of the gradient in the direction; heavy ball: beta */
    float inverse_correction, eps;      /* Adam */
    float step, keep;                   /* param <- param * keep - step * update */
} Elementwise;

/* torch.lerp: from whichever end is nearer. */
INLINE float move(float from, float to, float weight) {
    int near = weight < 0.5f; /* the same for all elements of a loop */
    return (near ? from : to) + (near ? weight : weight - 1.0f) * (to - from);
}

TILED void step_tile(const Elementwise *s, int64_t count, const float *restrict g, float *restrict p, float *restrict m,
                      float *restrict v) {
    float w1 = s->first_weight, w2 = s->second_weight, step = s->step, keep = s->keep, mix = s->mix;
    if (s->rule == DESCENT) {
        EACH(j, count) p[j] = p[j] * keep - g[j] * step;
    } else if (s->rule == ADAM) {
        float inverse = s->inverse_correction, eps = s->eps;
        w2 = s->moves_second ? w2 : 0.0f;
        EACH(j, count) {
            float first = move(m[j], g[j], w1), second = move(v[j], g[j] * g[j], w2);
            m[j] = first;
            v[j] = second;
            p[j] = p[j] * keep - first * step / (sqrtf(second) * inverse + eps);
        }
    } else if (s->rule == LION) {
        EACH(j, count) {
            float direction = move(m[j], g[j], mix);
            float sign = direction > 0 ? step : direction < 0 ? -step : direction * step;
            m[j] = move(m[j], g[j], w1);
            p[j] = p[j] * keep - sign;
        }
    } else if (s->rule == AVERAGE) {
        EACH(j, count) m[j] = move(m[j], g[j], w1);
        if (s->nesterov) EACH(j, count) p[j] = p[j] * keep - move(m[j], g[j], w1) * step;
        else EACH(j, count) p[j] = p[j] * keep - m[j] * step;
    } else if (s->rule == ROOT_OF_SUM) {
        float eps = s->eps;
        EACH(j, count) v[j] += g[j] * g[j];
        if (s->first.kind == NOTHING) {
            EACH(j, count) p[j] = p[j] * keep - g[j] * step / sqrtf(v[j] + eps);
        } else {
            EACH(j, count) m[j] = move(m[j], g[j] / sqrtf(v[j] + eps), w1);
            EACH(j, count) p[j] = p[j] * keep - m[j] * step;
        }
    } else {
        EACH(j, count) m[j] = m[j] * mix + g[j] * w1;
        if (s->nesterov) EACH(j, count) p[j] = p[j] * keep - (m[j] * mix + g[j]) * step;
        else EACH(j, count) p[j] = p[j] * keep - m[j] * step;
    }
}

/* The elements from `begin`, a multiple of every block, to `end`. */
EXPORT void NAMED(step_elementwise, FOR_CPU)(const Elementwise *s, int64_t begin, int64_t end) {
    float room[4][TILE], penalty = s->grad.penalty;
    for (int64_t at = begin; at < end; at += TILE) {
        int64_t count = end - at < TILE ? end - at : TILE;
        float *p = read_weight(&s->weight, at, count, room[0]);
        const float *g = read_gradient(&s->grad, at, count, room[1]);
        if (penalty != 0.0f) {
            EACH(j, count) room[1][j] = g[j] + p[j] * penalty;
            g = room[1];
        }
        float *m = read_moment(&s->first, at, count, room[2]), *v = read_moment(&s->second, at, count, room[3]);
        step_tile(s, count, g, p, m, v);
        write_weight(&s->weight, at, count, p);
        write_moment(&s->first, at, count, m);
        if (s->moves_second) write_moment(&s->second, at, count, v);
    }
}

/* --- sums --------------------------------------------------------------------------------------------------------- */

/* Sum of squares of a tile, in 16 lanes. */
TILED double squares_of(const float *restrict x, int64_t count) {
    float lanes[LANES] = {0};
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        for (int l = 0; l < LANES; l++) lanes[l] += x[j + l] * x[j + l];
    }
    for (int l = 0; j < count; j++, l++) lanes[l] += x[j] * x[j];
    double total = 0;
    for (int l = 0; l < LANES; l++) total += lanes[l];
    return total;
}

/* The same, and every square joins the sum of its column. */
TILED double add_squares(const float *restrict x, int64_t count, float *restrict sums) {
    float lanes[LANES] = {0};
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        for (int l = 0; l < LANES; l++) {
            float square = x[j + l] * x[j + l];
            lanes[l] += square;
            sums[j + l] += square;
        }
    }
    for (int l = 0; j < count; j++, l++) {
        lanes[l] += x[j] * x[j];
        sums[j] += x[j] * x[j];
    }
    double total = 0;
    for (int l = 0; l < LANES; l++) total += lanes[l];
    return total;
}

/* Sum of squares of a tile times its column factors. */
TILED double squares_of_product(const float *restrict x, const float *restrict b, int64_t count) {
    float lanes[LANES] = {0};
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        for (int l = 0; l < LANES; l++) {
            float value = x[j + l] * b[j + l];
            lanes[l] += value * value;
        }
    }
    for (int l = 0; j < count; j++, l++) {
        float value = x[j] * b[j];
        lanes[l] += value * value;
    }
    double total = 0;
    for (int l = 0; l < LANES; l++) total += lanes[l];
    return total;
}

/* Sum of the squares of a weight, with what is kept beside the parameter. */
EXPORT double NAMED(weight_squares, FOR_CPU)(const Weight *w, int64_t begin, int64_t end) {
    float room[TILE];
    double total = 0;
    for (int64_t at = begin; at < end; at += TILE) {
        int64_t count = end - at < TILE ? end - at : TILE;
        total += squares_of(read_weight(w, at, count, room), count);
    }
    return total;
}
/* Sums of squares of `rows` rows of `cols` elements each. */
EXPORT void NAMED(row_squares, FOR_CPU)(const Gradient *g, int64_t cols, int64_t first, int64_t last, float *sums) {
    float room[TILE];
    for (int64_t i = first; i < last; i++) {
        double total = 0;
        for (int64_t j = 0; j < cols; j += TILE) {
            int64_t count = cols - j < TILE ? cols - j : TILE;
            total += squares_of(read_gradient(g, i * cols + j, count, room), count);
        }
        sums[i] = (float)total;
    }
}

/* --- steps with a factored second moment --------------------------------------------------------------------------- */

typedef struct {
    Weight weight;
    Gradient grad;
    Moment first;               /* the average of finished updates, or nothing */
    int64_t matrices, rows, cols;
    int64_t parts;              /* of one matrix: ranges of rows; of several: the matrices themselves */
    float *row, *col;           /* the statistic: means [matrices][rows] and [matrices][cols] */
    float *row_factor, *col_factor; /* as large; sums of squares first, then the factors of the update */
    float *col_parts;           /* [parts][cols], if there is one matrix */
    double *squares;            /* [parts][2]: of the update before it is clipped, and of the weight */
    float averaging, eps;       /* weight of the new squares, and what is added to them */
    float threshold;            /* bound on the update's root mean square; infinite for none */
    float least_rms;            /* of the weight; negative if updates are not scaled by it */
    float step, decay;          /* of the update and of the weight, before the weight's root mean square */
    int32_t decay_is_scaled;    /* whether that multiplies the decay, too */
    float first_weight, after;  /* momentum: share of the new update; what multiplies the average in the end */
} FactoredStep;

INLINE void part_of(const FactoredStep *s, int64_t part, int64_t *matrix, int64_t *begin, int64_t *end) {
    *matrix = s->matrices == 1 ? 0 : part;
    *begin = s->matrices == 1 ? s->rows * part / s->parts : 0;
    *end = s->matrices == 1 ? s->rows * (part + 1) / s->parts : s->rows;
}

#define SLAB 64  /* rows whose squares are summed before they join the total of their column */

/* First pass: sums of squares of the gradient's rows and columns. */
EXPORT void NAMED(sum_factored, FOR_CPU)(const FactoredStep *s, int64_t first_part, int64_t last_part) {
    int64_t n = s->cols, matrix, begin, end;
    float room[TILE], slab[TILE];
    for (int64_t part = first_part; part < last_part; part++) {
        part_of(s, part, &matrix, &begin, &end);
        float *restrict cols = s->matrices == 1 ? s->col_parts + part * n : s->col_factor + matrix * n;
        float *restrict rows = s->row_factor + matrix * s->rows;
        memset(cols, 0, 4 * (size_t)n);
        for (int64_t i0 = begin; i0 < end; i0 += SLAB) {
            int64_t i1 = end - i0 < SLAB ? end : i0 + SLAB;
            double totals[SLAB] = {0};
            for (int64_t j = 0; j < n; j += TILE) {
                int64_t count = n - j < TILE ? n - j : TILE;
                memset(slab, 0, 4 * (size_t)count);
                for (int64_t i = i0; i < i1; i++) {
                    const float *x = read_gradient(&s->grad, (matrix * s->rows + i) * n + j, count, room);
                    totals[i - i0] += add_squares(x, count, slab);
                }
                EACH(l, count) cols[j + l] += slab[l];
            }
            for (int64_t i = i0; i < i1; i++) rows[i] = (float)totals[i - i0];
        }
    }
}

/* The column sums of all parts. Returns whether they are finite, as they are if and only if every square is. */
EXPORT int32_t NAMED(finish_sums, FOR_CPU)(const FactoredStep *s) {
    int64_t n = s->cols;
    if (s->matrices == 1) {
        memcpy(s->col_factor, s->col_parts, 4 * (size_t)n);
        for (int64_t part = 1; part < s->parts; part++) {
            const float *restrict more = s->col_parts + part * n;
            EACH(j, n) s->col_factor[j] += more[j];
        }
    }
    double total = 0;
    EACH(j, s->matrices * n) total += s->col_factor[j];
    EACH(i, s->matrices * s->rows) total += s->row_factor[i];
    return total <= 0x1.fffffep127;
}

/* Move the statistic, and leave the factors of the update where the sums were. */
EXPORT void NAMED(move_factored, FOR_CPU)(const FactoredStep *s) {
    float w = s->averaging, eps = s->eps;
    for (int64_t k = 0; k < s->matrices; k++) {
        float *restrict row = s->row + k * s->rows, *restrict a = s->row_factor + k * s->rows;
        float *restrict col = s->col + k * s->cols, *restrict b = s->col_factor + k * s->cols;
        float n = (float)s->cols, m = (float)s->rows;
        double total = 0;
        EACH(i, s->rows) {
            row[i] = move(row[i], a[i] / n + eps, w);
            total += row[i];
        }
        float mean = (float)(total / (double)s->rows);
        EACH(i, s->rows) a[i] = 1.0f / sqrtf(row[i] / mean);
        EACH(j, s->cols) {
            col[j] = move(col[j], b[j] / m + eps, w);
            b[j] = 1.0f / sqrtf(col[j]);
        }
    }
}

/* Second pass: sums of squares of the update and of the weight. */
EXPORT void NAMED(measure_factored, FOR_CPU)(const FactoredStep *s, int64_t first_part, int64_t last_part) {
    int64_t n = s->cols, matrix, begin, end;
    float room[TILE];
    for (int64_t part = first_part; part < last_part; part++) {
        part_of(s, part, &matrix, &begin, &end);
        const float *restrict a = s->row_factor + matrix * s->rows, *restrict b = s->col_factor + matrix * n;
        double of_update = 0, of_weight = 0;
        for (int64_t i = begin; i < end; i++) {
            int64_t at = (matrix * s->rows + i) * n;
            double in_row = 0;
            for (int64_t j = 0; j < n; j += TILE) {
                int64_t count = n - j < TILE ? n - j : TILE;
                if (s->threshold < INFINITY) {
                    in_row += squares_of_product(read_gradient(&s->grad, at + j, count, room), b + j, count);
                }
                if (s->least_rms >= 0) of_weight += squares_of(read_weight(&s->weight, at + j, count, room), count);
            }
            double root = sqrt(in_row) * a[i];  /* the square of a row without gradient may overflow alone */
            of_update += root * root;
        }
        s->squares[2 * part] = of_update;
        s->squares[2 * part + 1] = of_weight;
    }
}

/* What multiplies the update and the weight, from the sums of all parts. */
INLINE void coefficients_of(const double *squares, int64_t parts, double count, float threshold, float least_rms,
                            float *step, float *decay, int32_t decay_is_scaled) {
    double of_update = 0, of_weight = 0;
    for (int64_t part = 0; part < parts; part++) {
        of_update += squares[2 * part];
        of_weight += squares[2 * part + 1];
    }
    if (threshold < INFINITY) {
        float excess = (float)(of_update / count) / (threshold * threshold);
        *step *= 1.0f / sqrtf(excess > 1.0f ? excess : 1.0f);
    }
    if (least_rms >= 0) {
        float rms = sqrtf((float)(of_weight / count));
        rms = rms > least_rms ? rms : least_rms;
        *step *= rms;
        if (decay_is_scaled) *decay *= rms;
    }
}

/* Third pass: write the weight, and the momentum if there is one. */
EXPORT void NAMED(apply_factored, FOR_CPU)(const FactoredStep *s, int64_t first_part, int64_t last_part) {
    int64_t n = s->cols, matrix, begin, end;
    float step = s->step, decay = s->decay, room[3][TILE];
    coefficients_of(s->squares, s->parts, (double)s->matrices * (double)s->rows * (double)n, s->threshold, s->least_rms,
                    &step, &decay, s->decay_is_scaled);
    float keep = 1.0f - decay, w = s->first_weight, after = s->after;
    for (int64_t part = first_part; part < last_part; part++) {
        part_of(s, part, &matrix, &begin, &end);
        const float *restrict b = s->col_factor + matrix * n;
        for (int64_t i = begin; i < end; i++) {
            int64_t at = (matrix * s->rows + i) * n;
            float a = s->row_factor[matrix * s->rows + i] * step;
            for (int64_t j = 0; j < n; j += TILE) {
                int64_t count = n - j < TILE ? n - j : TILE;
                const float *restrict x = read_gradient(&s->grad, at + j, count, room[0]);
                float *restrict p = read_weight(&s->weight, at + j, count, room[1]);
                if (s->first.kind == NOTHING) {
                    EACH(l, count) p[l] = p[l] * keep - x[l] * a * b[j + l];
                } else {
                    float *restrict m = read_moment(&s->first, at + j, count, room[2]);
                    EACH(l, count) {
                        m[l] = move(m[l], x[l] * a * b[j + l], w);
                        p[l] = p[l] * keep - m[l] * after;
                    }
                    write_moment(&s->first, at + j, count, m);
                }
                write_weight(&s->weight, at + j, count, p);
            }
        }
    }
}

/* --- the same for a second moment kept in full: vectors, which have nothing to factor --------------------------------
 * `row` is the moment, `rows` the number of elements, and there is one matrix of one column. */

/* Move the moment; sums of squares of the update and of the weight. */
EXPORT void NAMED(move_full, FOR_CPU)(const FactoredStep *s, int64_t first_part, int64_t last_part) {
    float room[2][TILE], w = s->averaging, eps = s->eps;
    for (int64_t part = first_part; part < last_part; part++) {
        int64_t begin = s->rows * part / s->parts, end = s->rows * (part + 1) / s->parts;
        double of_update = 0, of_weight = 0;
        for (int64_t at = begin; at < end; at += TILE) {
            int64_t count = end - at < TILE ? end - at : TILE;
            float *restrict v = s->row + at, *restrict u = room[1];
            const float *restrict x = read_gradient(&s->grad, at, count, room[0]);
            EACH(j, count) {
                v[j] = move(v[j], x[j] * x[j] + eps, w);
                u[j] = x[j] / sqrtf(v[j]);
            }
            of_update += squares_of(u, count);
            if (s->least_rms >= 0) of_weight += squares_of(read_weight(&s->weight, at, count, room[0]), count);
        }
        s->squares[2 * part] = of_update;
        s->squares[2 * part + 1] = of_weight;
    }
}

EXPORT void NAMED(apply_full, FOR_CPU)(const FactoredStep *s, int64_t first_part, int64_t last_part) {
    float step = s->step, decay = s->decay, room[3][TILE];
    coefficients_of(s->squares, s->parts, (double)s->rows, s->threshold, s->least_rms, &step, &decay,
                    s->decay_is_scaled);
    float keep = 1.0f - decay, w = s->first_weight, after = s->after;
    for (int64_t part = first_part; part < last_part; part++) {
        int64_t begin = s->rows * part / s->parts, end = s->rows * (part + 1) / s->parts;
        for (int64_t at = begin; at < end; at += TILE) {
            int64_t count = end - at < TILE ? end - at : TILE;
            const float *restrict v = s->row + at;
            const float *restrict x = read_gradient(&s->grad, at, count, room[0]);
            float *restrict p = read_weight(&s->weight, at, count, room[1]);
            if (s->first.kind == NOTHING) {
                EACH(j, count) p[j] = p[j] * keep - x[j] / sqrtf(v[j]) * step;
            } else {
                float *restrict m = read_moment(&s->first, at, count, room[2]);
                EACH(j, count) {
                    m[j] = move(m[j], x[j] / sqrtf(v[j]) * step, w);
                    p[j] = p[j] * keep - m[j] * after;
                }
                write_moment(&s->first, at, count, m);
            }
            write_weight(&s->weight, at, count, p);
        }
    }
}

/* --- CAME: a factored second moment, and a factored average of how far updates stray from their average --------------
 * `s` is as above, `residual` has the second statistic and room for its sums. The average is kept in fp32. */

/* Third pass: move the average of updates; sums of squares of the distance, of rows and columns. */
EXPORT void NAMED(average_updates, FOR_CPU)(const FactoredStep *s, const FactoredStep *residual, int64_t first_part,
                                            int64_t last_part) {
    int64_t n = s->cols, matrix, begin, end;
    float step = 1.0f, decay = 0.0f, w = s->first_weight, room[TILE], distance[TILE], slab[TILE];
    coefficients_of(s->squares, s->parts, (double)s->matrices * (double)s->rows * (double)n, s->threshold, -1.0f, &step,
                    &decay, 0);
    for (int64_t part = first_part; part < last_part; part++) {
        part_of(s, part, &matrix, &begin, &end);
        const float *restrict b = s->col_factor + matrix * n;
        float *restrict cols = s->matrices == 1 ? residual->col_parts + part * n : residual->col_factor + matrix * n;
        float *restrict rows = residual->row_factor + matrix * s->rows;
        memset(cols, 0, 4 * (size_t)n);
        for (int64_t i0 = begin; i0 < end; i0 += SLAB) {
            int64_t i1 = end - i0 < SLAB ? end : i0 + SLAB;
            double totals[SLAB] = {0};
            for (int64_t j = 0; j < n; j += TILE) {
                int64_t count = n - j < TILE ? n - j : TILE;
                memset(slab, 0, 4 * (size_t)count);
                for (int64_t i = i0; i < i1; i++) {
                    int64_t at = (matrix * s->rows + i) * n + j;
                    const float *restrict x = read_gradient(&s->grad, at, count, room);
                    float *restrict m = (float *)s->first.data + at;
                    float a = s->row_factor[matrix * s->rows + i] * step;
                    EACH(l, count) {
                        float update = x[l] * a * b[j + l];
                        m[l] = move(m[l], update, w);
                        distance[l] = update - m[l];
                    }
                    totals[i - i0] += add_squares(distance, count, slab);
                }
                EACH(l, count) cols[j + l] += slab[l];
            }
            for (int64_t i = i0; i < i1; i++) rows[i] = (float)totals[i - i0];
        }
    }
}

/* Fourth pass: write the weight from the average and the factors of the second statistic. */
EXPORT void NAMED(apply_average, FOR_CPU)(const FactoredStep *s, const FactoredStep *residual, int64_t first_part,
                                          int64_t last_part) {
    int64_t n = s->cols, matrix, begin, end;
    float keep = 1.0f - s->decay, room[TILE];
    for (int64_t part = first_part; part < last_part; part++) {
        part_of(s, part, &matrix, &begin, &end);
        const float *restrict b = residual->col_factor + matrix * n;
        for (int64_t i = begin; i < end; i++) {
            int64_t at = (matrix * s->rows + i) * n;
            float a = residual->row_factor[matrix * s->rows + i] * s->step;
            for (int64_t j = 0; j < n; j += TILE) {
                int64_t count = n - j < TILE ? n - j : TILE;
                const float *restrict m = (const float *)s->first.data + at + j;
                float *restrict p = read_weight(&s->weight, at + j, count, room);
                EACH(l, count) p[l] = p[l] * keep - m[l] * a * b[j + l];
                write_weight(&s->weight, at + j, count, p);
            }
        }
    }
}

/* --- SM3: a sum of squares of which only the largest value of every row and column is kept --------------------------- */

typedef struct {
    Weight weight;
    Gradient grad;
    Moment first; /* the average of updates, or nothing */
    int64_t rows, cols, parts;
    float *row, *col, *col_parts; /* the maxima; and those of each part, [parts][cols] */
    float eps, step, keep, first_weight;
} MaximaStep;

/* One pass: the new bound, the update, the weight. Maxima are the same in whichever order they are taken. */
EXPORT void NAMED(step_maxima, FOR_CPU)(const MaximaStep *s, int64_t first_part, int64_t last_part) {
    int64_t n = s->cols;
    float eps = s->eps, step = s->step, keep = s->keep, w = s->first_weight, room[3][TILE], bound[TILE];
    for (int64_t part = first_part; part < last_part; part++) {
        float *restrict largest = s->col_parts + part * n;
        memset(largest, 0, 4 * (size_t)n);
        for (int64_t i = s->rows * part / s->parts; i < s->rows * (part + 1) / s->parts; i++) {
            float row = s->row[i];
            uint32_t most = 0;
            for (int64_t j = 0; j < n; j += TILE) {
                int64_t count = n - j < TILE ? n - j : TILE, at = i * n + j;
                const float *restrict x = read_gradient(&s->grad, at, count, room[0]), *restrict col = s->col + j;
                float *restrict p = read_weight(&s->weight, at, count, room[1]);
                EACH(l, count) {
                    bound[l] = (row < col[l] ? row : col[l]) + x[l] * x[l];
                    largest[j + l] = bound[l] > largest[j + l] ? bound[l] : largest[j + l];
                    most = bits_of(bound[l]) > most ? bits_of(bound[l]) : most; /* no bound is negative */
                }
                if (s->first.kind == NOTHING) {
                    EACH(l, count) p[l] = p[l] * keep - x[l] * step / sqrtf(bound[l] + eps);
                } else {
                    float *restrict m = read_moment(&s->first, at, count, room[2]);
                    EACH(l, count) {
                        m[l] = move(m[l], x[l] / sqrtf(bound[l] + eps), w);
                        p[l] = p[l] * keep - m[l] * step;
                    }
                    write_moment(&s->first, at, count, m);
                }
                write_weight(&s->weight, at, count, p);
            }
            s->row[i] = float_of(most);
        }
    }
}
EXPORT void NAMED(finish_maxima, FOR_CPU)(const MaximaStep *s) {
    memcpy(s->col, s->col_parts, 4 * (size_t)s->cols);
    for (int64_t part = 1; part < s->parts; part++) {
        const float *restrict more = s->col_parts + part * s->cols;
        EACH(j, s->cols) s->col[j] = more[j] > s->col[j] ? more[j] : s->col[j];
    }
}

/* --- many small parameters in one call ---------------------------------------------------------------------------------
 * A table has a structure for each parameter, as the functions above take it. What differs from step to step is in
 * columns beside it: the gradient, the count of updates, and a structure that holds the numbers of this step and serves
 * all parameters with the same ones. `begin_many` only reads: it says which gradients are to be refused.
 * `finish_many` writes, with what the first call left in `room`. A range is one of elements, counted over all
 * parameters: it has the parameters whose first element lies in it. */

enum { MANY_ELEMENTWISE, MANY_FACTORED, MANY_FULL, MANY_CONFIDENCE, MANY_MAXIMA, MANY_CHECKED };
typedef struct {
    int64_t count;
    const int64_t *kinds, *elements;
    const uint64_t *steps, *numbers; /* addresses; CONFIDENCE has two structures, one behind the other */
    const uint64_t *grads;
    const int64_t *grad_types;
    const int64_t *updates; /* which step of each parameter this is: joins the keys of random bits, which are of names */
    const int64_t *room_at; /* where each one's room begins: numbers of 8 bytes */
    double *room;
    int32_t *fine; /* whether the gradient may be used */
} Many;

INLINE void set_operands(const Many *m, int64_t i, Weight *weight, Gradient *grad, const Gradient *numbers) {
    *grad = *numbers;
    grad->grad = (const void *)(uintptr_t)m->grads[i];
    grad->type = (int32_t)m->grad_types[i];
    weight->key = mix(weight->key ^ (uint32_t)m->updates[i]);
}
INLINE void set_moment(const Many *m, int64_t i, Moment *moment, const Moment *numbers) {
    moment->kind = numbers->kind;
    moment->key = mix(moment->key ^ (uint32_t)m->updates[i]);
}
/* Copy what is from `field` to the end of a structure: its numbers. */
#define COPY_NUMBERS(to, from, type, field)                                                                            \
    memcpy((char *)(to) + offsetof(type, field), (const char *)(from) + offsetof(type, field),                         \
           sizeof(type) - offsetof(type, field))

INLINE Elementwise elementwise_at(const Many *m, int64_t i) {
    Elementwise s = *(const Elementwise *)(uintptr_t)m->steps[i];
    const Elementwise *numbers = (const Elementwise *)(uintptr_t)m->numbers[i];
    set_operands(m, i, &s.weight, &s.grad, &numbers->grad);
    set_moment(m, i, &s.first, &numbers->first);
    set_moment(m, i, &s.second, &numbers->second);
    COPY_NUMBERS(&s, numbers, Elementwise, rule);
    return s;
}
/* room: behind it begins the room of the next one. */
INLINE FactoredStep factored_at(const Many *m, int64_t i, int64_t which, double **room) {
    FactoredStep s = ((const FactoredStep *)(uintptr_t)m->steps[i])[which];
    const FactoredStep *numbers = (const FactoredStep *)(uintptr_t)m->numbers[i] + which;
    int64_t one = s.matrices == 1, factors = s.matrices * (s.rows + s.cols) + (one ? s.parts * s.cols : 0);
    set_operands(m, i, &s.weight, &s.grad, &numbers->grad);
    set_moment(m, i, &s.first, &numbers->first);
    COPY_NUMBERS(&s, numbers, FactoredStep, averaging);
    s.squares = *room;
    s.row_factor = (float *)(*room + 2 * s.parts);
    s.col_factor = s.row_factor + s.matrices * s.rows;
    s.col_parts = s.col_factor + s.matrices * s.cols;
    *room += 2 * s.parts + (factors + 1) / 2;
    return s;
}
INLINE FactoredStep full_at(const Many *m, int64_t i) {
    FactoredStep s = *(const FactoredStep *)(uintptr_t)m->steps[i];
    const FactoredStep *numbers = (const FactoredStep *)(uintptr_t)m->numbers[i];
    set_operands(m, i, &s.weight, &s.grad, &numbers->grad);
    set_moment(m, i, &s.first, &numbers->first);
    COPY_NUMBERS(&s, numbers, FactoredStep, averaging);
    s.squares = m->room + m->room_at[i];
    return s;
}
INLINE MaximaStep maxima_at(const Many *m, int64_t i) {
    MaximaStep s = *(const MaximaStep *)(uintptr_t)m->steps[i];
    const MaximaStep *numbers = (const MaximaStep *)(uintptr_t)m->numbers[i];
    set_operands(m, i, &s.weight, &s.grad, &numbers->grad);
    set_moment(m, i, &s.first, &numbers->first);
    COPY_NUMBERS(&s, numbers, MaximaStep, eps);
    s.col_parts = (float *)(m->room + m->room_at[i]);
    return s;
}
/* The largest magnitude that a gradient may have. */
INLINE float largest_at(const Many *m, int64_t i) {
    const char *numbers = (const char *)(uintptr_t)m->numbers[i];
    switch (m->kinds[i]) {
    case MANY_FACTORED: case MANY_FULL: case MANY_CONFIDENCE: return ((const FactoredStep *)numbers)->grad.largest;
    case MANY_MAXIMA: return ((const MaximaStep *)numbers)->grad.largest;
    default: return ((const Elementwise *)numbers)->grad.largest;
    }
}

/* Look at the gradients: whether they may be used. The sums of those that are summed stay in the room. */
EXPORT void NAMED(begin_many, FOR_CPU)(const Many *m, int64_t begin, int64_t end) {
    int64_t first = 0;
    for (int64_t i = 0; i < m->count && first < end; first += m->elements[i++]) {
        if (first < begin) continue;
        float largest = largest_at(m, i);
        int32_t fine = 1;
        if (largest >= 0) {
            fine = NAMED(within, FOR_CPU)((const void *)(uintptr_t)m->grads[i], (int32_t)m->grad_types[i], largest, 0,
                                          m->elements[i]);
        }
        if (fine && (m->kinds[i] == MANY_FACTORED || m->kinds[i] == MANY_CONFIDENCE)) {
            double *room = m->room + m->room_at[i];
            FactoredStep s = factored_at(m, i, 0, &room);
            NAMED(sum_factored, FOR_CPU)(&s, 0, s.parts);
            fine = NAMED(finish_sums, FOR_CPU)(&s) || largest >= 0;
        }
        m->fine[i] = fine;
    }
}

/* Write the parameters and their state. */
EXPORT void NAMED(finish_many, FOR_CPU)(const Many *m, int64_t begin, int64_t end) {
    int64_t first = 0;
    for (int64_t i = 0; i < m->count && first < end; first += m->elements[i++]) {
        if (first < begin) continue;
        double *room = m->room + m->room_at[i];
        if (m->kinds[i] == MANY_ELEMENTWISE) {
            Elementwise s = elementwise_at(m, i);
            NAMED(step_elementwise, FOR_CPU)(&s, 0, m->elements[i]);
        } else if (m->kinds[i] == MANY_FACTORED) {
            FactoredStep s = factored_at(m, i, 0, &room);
            NAMED(move_factored, FOR_CPU)(&s);
            NAMED(measure_factored, FOR_CPU)(&s, 0, s.parts);
            NAMED(apply_factored, FOR_CPU)(&s, 0, s.parts);
        } else if (m->kinds[i] == MANY_FULL) {
            FactoredStep s = full_at(m, i);
            NAMED(move_full, FOR_CPU)(&s, 0, s.parts);
            NAMED(apply_full, FOR_CPU)(&s, 0, s.parts);
        } else if (m->kinds[i] == MANY_CONFIDENCE) {
            FactoredStep s = factored_at(m, i, 0, &room), residual = factored_at(m, i, 1, &room);
            NAMED(move_factored, FOR_CPU)(&s);
            if (s.threshold < INFINITY) NAMED(measure_factored, FOR_CPU)(&s, 0, s.parts);
            NAMED(average_updates, FOR_CPU)(&s, &residual, 0, s.parts);
            NAMED(finish_sums, FOR_CPU)(&residual);
            NAMED(move_factored, FOR_CPU)(&residual);
            NAMED(apply_average, FOR_CPU)(&s, &residual, 0, s.parts);
        } else if (m->kinds[i] == MANY_MAXIMA) {
            MaximaStep s = maxima_at(m, i);
            NAMED(step_maxima, FOR_CPU)(&s, 0, s.parts);
            NAMED(finish_maxima, FOR_CPU)(&s);
        }
    }
}

#include "primitives.c"
