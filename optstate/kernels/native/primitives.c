/* The loops that chains are made of, for those that no whole step knows; included at the end of steps.c, whose tiles,
 * weights and codes these functions use. Each computes what the function of the same purpose in eager.py computes.
 */

#define MOST_FACTORS 4

/* A product that is not multiplied out: clamp(dense) * factors * scale. Dimensions along which all factors run alike
 * are joined, so that three are left; a factor's stride is 0 along a dimension in which the factor does not vary. */
typedef struct {
    const void *dense; /* contiguous */
    const float *factor[MOST_FACTORS];
    int64_t strides[MOST_FACTORS][3];
    int64_t rows, cols; /* sizes of the last two dimensions that are left */
    int32_t type, factors;
    float bound, scale;
} Product;

/* The part of a tensor that is here, where this part is no run of elements; the last dimension is a run. */
#define MOST_DIMENSIONS 8
typedef struct {
    int64_t dims, shape[MOST_DIMENSIONS], offset[MOST_DIMENSIONS], whole[MOST_DIMENSIONS];
} Box;

/* --- products ----------------------------------------------------------------------------------------------------- */

INLINE void multiply_segment(const float *from, float *restrict to, const float *restrict f, int64_t stride,
                             int64_t count) {
    if (stride == 0) {
        float number = *f;
        _Pragma("GCC ivdep") EACH(j, count) to[j] = from[j] * number;
    } else if (stride == 1) {
        _Pragma("GCC ivdep") EACH(j, count) to[j] = from[j] * f[j];
    } else {
        EACH(j, count) to[j] = from[j] * f[j * stride];
    }
}

/* A tile of the dense tensor times one factor; `from` may be `to`. */
TILED void multiply_by_factor(const Product *p, int k, int64_t at, int64_t count, const float *from, float *to) {
    const int64_t *strides = p->strides[k];
    int64_t row = at / p->cols, j = at % p->cols;
    for (int64_t done = 0; done < count; row++, j = 0) {
        int64_t length = p->cols - j < count - done ? p->cols - j : count - done;
        const float *f = p->factor[k] + row / p->rows * strides[0] + row % p->rows * strides[1] + j * strides[2];
        multiply_segment(from + done, to + done, f, strides[2], length);
        done += length;
    }
}

/* A tile of the product: in the buffer, or the dense tensor itself where that is fp32 and nothing changes it. */
TILED const float *read_product(const Product *p, int64_t at, int64_t count, float *room) {
    const float *x = room;
    float bound = p->bound, scale = p->scale;
    if (p->type == FLOAT32) x = (const float *)p->dense + at;
    else {
        prefetch_next((const char *)p->dense + 2 * at, 2 * count);
        read_tile(p->dense, p->type, at, count, room);
    }
    if (bound < INFINITY) {
        _Pragma("GCC ivdep") EACH(j, count) room[j] = x[j] > bound ? bound : x[j] < -bound ? -bound : x[j];
        x = room;
    }
    for (int k = 0; k < p->factors; k++) {
        multiply_by_factor(p, k, at, count, x, room);
        x = room;
    }
    if (scale != 1.0f) {
        _Pragma("GCC ivdep") EACH(j, count) room[j] = x[j] * scale;
        x = room;
    }
    return x;
}

#define EACH_TILE(at, count, begin, end)                                                                               \
    for (int64_t at = (begin), count; count = (end) - at < TILE ? (end) - at : TILE, at < (end); at += TILE)

EXPORT void NAMED(multiply_out, FOR_CPU)(const Product *p, float *to, int64_t begin, int64_t end) {
    EACH_TILE(at, count, begin, end) {
        const float *x = read_product(p, at, count, to + at);
        if (x != to + at) memcpy(to + at, x, 4 * (size_t)count);
    }
}

/* `to` becomes `from`, moved by a share of the distance towards the value, or towards its square plus eps. */
EXPORT void NAMED(move_towards, FOR_CPU)(const Product *p, const void *from, void *to, int32_t type, int32_t squared,
                                         float weight, float eps, int64_t begin, int64_t end) {
    float value[TILE], room[TILE];
    int64_t size = type == FLOAT32 ? 4 : 2;
    EACH_TILE(at, count, begin, end) {
        const float *restrict x = read_product(p, at, count, value);
        float *restrict now = type == FLOAT32 ? (float *)to + at : room;
        if (type != FLOAT32) read_tile(from, type, at, count, room);
        else if (from != to) memcpy(now, (const float *)from + at, (size_t)(size * count));
        if (squared) EACH(j, count) now[j] = move(now[j], x[j] * x[j] + eps, weight);
        else EACH(j, count) now[j] = move(now[j], x[j], weight);
        if (type == BFLOAT16) EACH(j, count) ((uint16_t *)to)[at + j] = to_bf16(now[j]);
        else if (type == FLOAT16) EACH(j, count) ((uint16_t *)to)[at + j] = to_fp16(now[j]);
    }
}

/* 1 / (sqrt(x) / correction + eps): what Adam multiplies by. */
EXPORT void NAMED(invert_roots, FOR_CPU)(const float *restrict x, float *restrict to, float correction, float eps,
                                         int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j++) to[j] = 1.0f / (sqrtf(x[j]) / correction + eps);
}

/* --- sums --------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t matrices, rows, cols;
    int64_t parts;      /* of one matrix: ranges of rows; of several: the matrices themselves */
    float *row, *col;   /* sums of squares: [matrices][rows], and [parts][cols] */
    const float *minus; /* subtracted from the value first; or NULL */
} Sums;

/* The same as add_squares, in as few instructions as a short row needs. */
INLINE double add_few_squares(const float *restrict x, int64_t count, float *restrict sums) {
    float total = 0;
    EACH(j, count) {
        float square = x[j] * x[j];
        total += square;
        sums[j] += square;
    }
    return total;
}

INLINE const float *read_difference(const Product *p, const float *minus, int64_t at, int64_t count, float *room) {
    const float *x = read_product(p, at, count, room);
    if (!minus) return x;
    const float *restrict other = minus + at;
    _Pragma("GCC ivdep") EACH(j, count) room[j] = x[j] - other[j];
    return room;
}

/* Sums of squares of the rows and columns of some parts: a tile is a piece of a row, or several whole rows. */
EXPORT void NAMED(sum_squares, FOR_CPU)(const Product *p, const Sums *s, int64_t first_part, int64_t last_part) {
    int64_t n = s->cols, rows_at_once = n < TILE ? TILE / n : 1;
    float room[TILE], slab[TILE];
    for (int64_t part = first_part; part < last_part; part++) {
        int64_t matrix = s->matrices == 1 ? 0 : part;
        int64_t begin = s->matrices == 1 ? s->rows * part / s->parts : 0;
        int64_t end = s->matrices == 1 ? s->rows * (part + 1) / s->parts : s->rows;
        float *restrict cols = s->col + part * n;
        memset(cols, 0, 4 * (size_t)n);
        for (int64_t i0 = begin; i0 < end; i0 += SLAB) {
            int64_t i1 = end - i0 < SLAB ? end : i0 + SLAB;
            double totals[SLAB] = {0};
            for (int64_t j = 0; j < n; j += TILE) {
                int64_t count = n - j < TILE ? n - j : TILE;
                memset(slab, 0, 4 * (size_t)count);
                for (int64_t i = i0; i < i1; i += rows_at_once) {
                    int64_t rows = i1 - i < rows_at_once ? i1 - i : rows_at_once;
                    const float *x = read_difference(p, s->minus, (matrix * s->rows + i) * n + j, rows * count, room);
                    for (int64_t r = 0; r < rows; r++) {
                        totals[i - i0 + r] += count < LANES ? add_few_squares(x + r * count, count, slab)
                                                            : add_squares(x + r * count, count, slab);
                    }
                }
                EACH(l, count) cols[j + l] += slab[l];
            }
            for (int64_t i = i0; i < i1; i++) s->row[matrix * s->rows + i] = (float)totals[i - i0];
        }
    }
}

/* The column sums of all parts of one matrix, in the place of those of the first. */
EXPORT void NAMED(join_columns, FOR_CPU)(const Sums *s) {
    for (int64_t part = 1; part < s->parts; part++) {
        const float *restrict more = s->col + part * s->cols;
        EACH(j, s->cols) s->col[j] += more[j];
    }
}

/* Sums of squares of rows alone. */
EXPORT void NAMED(sum_rows, FOR_CPU)(const Product *p, int64_t cols, float *sums, int64_t first, int64_t last) {
    float room[TILE];
    for (int64_t i = first; i < last; i++) {
        double total = 0;
        EACH_TILE(j, count, 0, cols) total += squares_of(read_product(p, i * cols + j, count, room), count);
        sums[i] = (float)total;
    }
}

INLINE int64_t tile_of_part(int64_t part, int64_t parts, int64_t count) {
    int64_t at = (count + TILE - 1) / TILE * part / parts * TILE;
    return at < count ? at : count;
}

/* The sum of all squares of `count` elements, part by part. */
EXPORT void NAMED(measure_product, FOR_CPU)(const Product *p, double *totals, int64_t size, int64_t parts,
                                            int64_t first_part, int64_t last_part) {
    float room[TILE];
    for (int64_t part = first_part; part < last_part; part++) {
        double total = 0;
        EACH_TILE(at, count, tile_of_part(part, parts, size), tile_of_part(part + 1, parts, size)) {
            total += squares_of(read_product(p, at, count, room), count);
        }
        totals[part] = total;
    }
}

/* The same of a weight, with what is kept beside the parameter. */
EXPORT void NAMED(measure_weight, FOR_CPU)(const Weight *w, double *totals, int64_t size, int64_t parts,
                                           int64_t first_part, int64_t last_part) {
    float room[TILE];
    for (int64_t part = first_part; part < last_part; part++) {
        double total = 0;
        EACH_TILE(at, count, tile_of_part(part, parts, size), tile_of_part(part + 1, parts, size)) {
            total += squares_of(read_weight(w, at, count, room), count);
        }
        totals[part] = total;
    }
}

/* --- weights ------------------------------------------------------------------------------------------------------ */

INLINE int64_t index_in_whole(const Box *box, int64_t at) {
    int64_t index = 0, stride = 1;
    for (int64_t d = box->dims - 1; d >= 0; d--) {
        index += (at % box->shape[d] + box->offset[d]) * stride;
        at /= box->shape[d];
        stride *= box->whole[d];
    }
    return index;
}

/* Random bits of elements from flat index `at` on: of the whole tensor, or of the box. */
TILED void random_bits_in(uint32_t key, const Box *box, int64_t at, int64_t count, uint16_t *restrict bits) {
    if (!box) {
        random_bits(key, at, count, bits);
        return;
    }
    int64_t run = box->shape[box->dims - 1];
    for (int64_t done = 0; done < count;) {
        int64_t left = run - (at + done) % run, length = left < count - done ? left : count - done;
        random_bits(key, index_in_whole(box, at + done), length, bits + done);
        done += length;
    }
}
EXPORT void NAMED(fill_random_bits, FOR_CPU)(uint32_t key, const Box *box, int64_t start, uint16_t *bits, int64_t begin,
                                             int64_t end) {
    EACH_TILE(at, count, begin, end) random_bits_in(key, box, start + at, count, bits + at);
}

TILED void write_weight_in(const Weight *w, const Box *box, int64_t at, int64_t count, const float *restrict x) {
    if (!box || w->how != STOCHASTIC || w->type == FLOAT32) {
        write_weight(w, at, count, x);
        return;
    }
    uint16_t *restrict p = (uint16_t *)w->param + at, random[TILE + 2];
    random_bits_in(w->key, box, w->start + at, count, random);
    if (w->type == BFLOAT16) EACH(j, count) p[j] = round_bf16(x[j], random[j]);
    else EACH(j, count) p[j] = round_fp16(x[j], random[j]);
}

/* param <- param * keep - value */
EXPORT void NAMED(apply_product, FOR_CPU)(const Product *product, const Weight *w, const Box *box, float keep,
                                          int64_t begin, int64_t end) {
    float room[2][TILE];
    EACH_TILE(at, count, begin, end) {
        float *restrict p = read_weight(w, at, count, room[0]);
        const float *restrict x = read_product(product, at, count, room[1]);
        if (keep == 1.0f) EACH(j, count) p[j] -= x[j];
        else EACH(j, count) p[j] = p[j] * keep - x[j];
        write_weight_in(w, box, at, count, p);
    }
}

/* The value of the weight becomes `x`. */
EXPORT void NAMED(store_weight, FOR_CPU)(const float *x, const Weight *w, const Box *box, int64_t begin, int64_t end) {
    EACH_TILE(at, count, begin, end) write_weight_in(w, box, at, count, x + at);
}

/* to <- to + scale * weight */
EXPORT void NAMED(add_weight, FOR_CPU)(const Weight *w, float *to, float scale, int64_t begin, int64_t end) {
    float room[TILE];
    EACH_TILE(at, count, begin, end) {
        const float *restrict p = read_weight(w, at, count, room);
        EACH(j, count) to[at + j] += p[j] * scale;
    }
}

/* --- codes: blocks of any size, with the codes that the tables of eager PyTorch give ---------------------------------
 * `decades` of an 8-bit map is followed by its bounds: [257], between NaN and infinity, entry i + 1 is the
 * largest number that has code i. */

INLINE float largest_magnitude(const float *restrict x, int64_t count, uint32_t so_far) {
    EACH(j, count) {
        uint32_t magnitude = bits_of(x[j]) & 0x7fffffffu;
        so_far = magnitude > so_far ? magnitude : so_far;
    }
    return float_of(so_far);
}

/* The place that the decades say is at most one from the nearest. */
TILED void write_places(const float *restrict x, int64_t count, int is_signed, const float *tables, uint8_t *restrict to) {
    float decades[32];
    int32_t places[TILE];
    const float *restrict bounds = tables + 32;
    memcpy(decades, tables, sizeof decades);
    if (is_signed) {
        EACH(j, count) {
            int32_t place = place_in_map(fabsf(x[j]), decades);
            int32_t below = 127 - (place > 127 ? 127 : place);
            places[j] = x[j] < 0 ? below : 127 + place;
        }
    } else {
        EACH(j, count) places[j] = place_in_map(x[j], decades);
    }
    EACH(j, count) {
        int32_t place = places[j];
        to[j] = (uint8_t)(place + (x[j] > bounds[place + 1]) - (x[j] <= bounds[place]));
        __asm__ volatile("");
    }
}

/* Codes of at most TILE numbers of one block, whose largest magnitude is known. Begins at a whole byte. */
TILED void write_codes(const Moment *m, int64_t at, int64_t count, const float *restrict x, float most) {
    float scaled[TILE];
    uint8_t places[TILE];
    if (m->kind == SIGNED_E4M3 || m->kind == UNSIGNED_E4M3) {
        uint8_t *restrict codes = (uint8_t *)m->data + at;
        float least = m->kind == UNSIGNED_E4M3 ? 0x1p-9f : 0.0f;
        EACH(j, count) {
            float number = x[j] / most * 448.0f;
            number = number > 448.0f ? 448.0f : number < -448.0f ? -448.0f : number;
            codes[j] = to_e4m3(x[j] > 0 && number < least ? least : number);
        }
        return;
    }
    EACH(j, count) scaled[j] = x[j] / most;
    if (m->kind == SIGNED8) {
        write_places(scaled, count, 1, m->decades, (uint8_t *)m->data + at);
    } else if (m->kind == UNSIGNED8) {
        EACH(j, count) { /* a quotient may underflow to zero: the number itself tells that it was positive */
            float tiny = x[j] < 1e-37f ? x[j] : 1e-37f;
            scaled[j] = scaled[j] > tiny ? scaled[j] : tiny;
        }
        write_places(scaled, count, 0, m->decades, (uint8_t *)m->data + at);
    } else {
        uint8_t *restrict codes = (uint8_t *)m->data + at / 2;
        float bounds[15];
        memcpy(bounds, m->decades, sizeof bounds);
        EACH(j, count) places[j] = (uint8_t)place_in_signed4(scaled[j], bounds);
        if (count & 1) places[count] = 0;
        EACH(j, (count + 1) / 2) codes[j] = (uint8_t)(places[2 * j] << 4 | places[2 * j + 1]);
    }
}

/* From `begin`, a multiple of the block, to `end`. */
EXPORT void NAMED(encode_blocks, FOR_CPU)(const Moment *m, const float *x, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += m->block) {
        int64_t last = end - at < m->block ? end : at + m->block;
        float most = largest_magnitude(x + at, last - at, 0);
        most = most < SMALLEST_MAXIMUM ? SMALLEST_MAXIMUM : most > LARGEST_MAXIMUM ? LARGEST_MAXIMUM : most;
        m->scale[at / m->block] = most;
        EACH_TILE(j, count, at, last) write_codes(m, j, count, x + j, most);
    }
}
EXPORT void NAMED(decode_blocks, FOR_CPU)(const Moment *m, float *to, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += m->block) {
        decode_block(m, at, end - at < m->block ? end - at : m->block, to + at);
    }
}

/* --- what a conversion changes: Adam's moments, and the steps that follow from them ---------------------------------- */

typedef struct {
    const float *first, *second;         /* the averages as they were */
    const float *new_first, *new_second; /* as they are now, or NULL where one is kept */
    float first_bias, second_bias, eps;  /* what the averages are of those proper; what is added to the root */
} Change;
/* Sums of squares: of numbers, of their error, of the update, of its error, of the new update; then counts, a ratio. */
enum { VALUE, ERROR, UPDATE, UPDATE_ERROR, NEW_UPDATE, ZEROS, GROWTH, FIGURES };

TILED void add_figures(double *figures, int64_t count, const float *restrict old, const float *restrict new,
                       const float *restrict before, const float *restrict after) {
    float room[TILE];
    int32_t kept = 0, were = 0;
    EACH(j, count) room[j] = new[j] - old[j];
    figures[ERROR] += squares_of(room, count);
    EACH(j, count) room[j] = after[j] - before[j];
    figures[UPDATE_ERROR] += squares_of(room, count);
    figures[VALUE] += squares_of(old, count);
    figures[UPDATE] += squares_of(before, count);
    figures[NEW_UPDATE] += squares_of(after, count);
    EACH(j, count) were += old[j] != 0;
    EACH(j, count) kept += new[j] != 0;
    figures[ZEROS] += were - kept;
}

/* Adds to figures of the first moment, of the second one, and of the update with both changes, [3][FIGURES]. */
EXPORT void NAMED(measure_change, FOR_CPU)(const Change *c, double *figures, int64_t begin, int64_t end) {
    float before[TILE], after[TILE], m[TILE], root[TILE], new_m[TILE], new_root[TILE];
    double *of_second = figures + FIGURES, *of_both = figures + 2 * FIGURES;
    EACH_TILE(at, count, begin, end) {
        const float *restrict first = c->first + at, *restrict second = c->second + at;
        EACH(j, count) {
            m[j] = first[j] / c->first_bias;
            root[j] = sqrtf(second[j] / c->second_bias) + c->eps;
            before[j] = m[j] / root[j];
        }
        if (c->new_first) {
            EACH(j, count) new_m[j] = c->new_first[at + j] / c->first_bias;
            EACH(j, count) after[j] = new_m[j] / root[j];
            add_figures(figures, count, first, c->new_first + at, before, after);
        }
        if (c->new_second) {
            const float *restrict new = c->new_second + at;
            float most = (float)of_second[GROWTH];
            EACH(j, count) new_root[j] = sqrtf(new[j] / c->second_bias) + c->eps;
            EACH(j, count) after[j] = m[j] / new_root[j];
            EACH(j, count) {
                float ratio = second[j] / (new[j] > 0x1p-126f ? new[j] : 0x1p-126f);
                most = ratio > most ? ratio : most;
            }
            of_second[GROWTH] = most;
            add_figures(of_second, count, second, new, before, after);
        }
        if (c->new_first && c->new_second) EACH(j, count) after[j] = new_m[j] / new_root[j];
        add_figures(of_both, count, before, after, before, after);
    }
}
