/* Calls every operator with random shapes and hostile values. Each buffer is a heap block of exactly its size, so that AddressSanitizer sees
 * the first float read or written past an end. Usage: fuzz_kernels <seed> <rounds> */
#include "../../native/kernels/decoder.h"
#include "../../native/kernels/ops.h"
#include "../../native/kernels/products.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *us_direct_attention(const char *, const us_attention_args *);
const char *us_direct_norm(const char *, const us_norm_args *);
const char *us_direct_gelu(const char *, const us_gelu_args *);
const char *us_direct_embed(const char *, const us_embed_args *);
const char *us_direct_gemm(const char *, const us_gemm_args *);
const char *us_direct_float_gemm(const char *, const us_float_gemm_args *);
const char *us_direct_int4_gemm(const char *, const us_int4_gemm_args *);
const char *us_direct_lora_add(const char *, const us_lora_add_args *);

const char *us_direct_tokens(const char *, const us_tokens_args *);
const char *us_direct_skip(const char *, const us_skip_args *);
const char *us_direct_gated(const char *, const us_gated_args *);
const char *us_direct_paged(const char *, const us_paged_args *);

static uint64_t state;
static void *blocks[64];
static int block_count;

static int64_t upto(int64_t limit) { /* 0 .. limit - 1 */
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((state >> 33) % (uint64_t)limit);
}

static void *block(int64_t bytes) {
    void *p = malloc((size_t)bytes);
    return blocks[block_count++] = p;
}

static void release(void) {
    while (block_count) free(blocks[--block_count]);
}

static float *floats(int64_t n) {
    static const float odd[] = {NAN, INFINITY, -INFINITY, 3.4e38f, -3.4e38f, 1e-45f, 0.0f, -0.0f};
    float *p = block(n * (int64_t)sizeof(float));
    const int hostile = upto(4) == 0;
    for (int64_t i = 0; i < n; i++) p[i] = hostile && upto(8) == 0 ? odd[upto(8)] : (float)(upto(2001) - 1000) / 250.0f;
    return p;
}

static float *maybe(int64_t n) { return upto(2) ? floats(n) : NULL; }

static us_quant quantized(int64_t rows, int64_t cols) {
    us_quant q = {.mult = floats(cols), .q = block(rows * cols), .per_row = (int32_t)upto(2)};
    q.scale = q.per_row ? block(rows * (int64_t)sizeof(float)) : NULL;
    q.zero_point = q.per_row ? 128 : (int32_t)upto(256);
    return q;
}

static int64_t *ids(int64_t n, int64_t limit) {
    int64_t *p = block(n * 8);
    for (int64_t i = 0; i < n; i++) p[i] = upto(400) ? upto(limit) : upto(2) ? limit : INT64_MIN;
    return p;
}

static void attend(void) {
    const int64_t dim = upto(3) ? 32 << upto(2) : 1 + upto(256), heads = 1 + upto(3), hidden = dim * heads, sequences = upto(20) ? upto(12) : upto(2000);
    int32_t *cu = block((sequences + 1) * 4);
    cu[0] = 0;
    for (int64_t s = 0; s < sequences; s++) cu[s + 1] = cu[s] + (int32_t)(sequences > 12 ? upto(3) : upto(4) ? upto(40) : upto(300));
    us_attention_args a = {.tokens = cu[sequences], .sequences = sequences, .hidden = hidden, .heads = heads, .cu = cu, .rel_span = 1 + upto(64)};
    a.qkv = floats(a.tokens * 3 * hidden);
    a.row_scale = maybe(a.tokens), a.bias = maybe(3 * hidden), a.rel_bias = maybe(heads * (2 * a.rel_span - 1));
    if (sequences && upto(10) == 0) cu[upto(sequences + 1)] += (int32_t)upto(9) - 4; /* most of these must be refused, none may be followed */
    if (upto(2))
        a.out = block(a.tokens * hidden * 4);
    else
        a.quant = quantized(a.tokens, hidden);
    us_direct_attention(NULL, &a);
}

static void norm(void) {
    const int64_t rows = upto(40), cols = 1 + upto(700);
    us_norm_args a = {.rows = rows, .cols = cols, .x = floats(rows * cols), .row_scale = maybe(rows), .bias = maybe(cols), .residual = maybe(rows * cols),
                      .gamma = floats(cols), .beta = maybe(cols), .y = block(rows * cols * 4), .epsilon = 1e-12f, .rms = (int32_t)upto(2)};
    if (upto(2)) a.quant = quantized(rows, cols);
    us_direct_norm(NULL, &a);
}

static void gelu(void) {
    const int64_t rows = upto(40), cols = 1 + upto(700);
    us_gelu_args a = {.rows = rows, .cols = cols, .x = floats(rows * cols), .row_scale = maybe(rows), .bias = maybe(cols), .approximate = (int32_t)upto(2)};
    if (upto(2))
        a.y = block(rows * cols * 4);
    else
        a.quant = quantized(rows, cols);
    us_direct_gelu(NULL, &a);
}

static void embed(void) {
    const int64_t rows = upto(40), cols = 1 + upto(300), words = 1 + upto(50), positions = 1 + upto(50), types = 1 + upto(3);
    us_embed_args a = {.rows = rows, .cols = cols, .words = words, .max_positions = positions, .type_count = types, .ids = ids(rows, words),
                       .positions = ids(rows, positions), .types = upto(2) ? ids(rows, types) : NULL, .word = floats(words * cols),
                       .position = floats(positions * cols), .type = maybe(types * cols), .gamma = floats(cols), .beta = maybe(cols),
                       .y = block(rows * cols * 4), .epsilon = 1e-12f};
    if (upto(2)) a.quant = quantized(rows, cols);
    us_direct_embed(NULL, &a);
}

static void *bytes(int64_t n) {
    uint8_t *p = block(n);
    for (int64_t i = 0; i < n; i++) p[i] = (uint8_t)upto(256);
    return p;
}

/* Adapters of which one call in ten points somewhere outside: that must be refused and never followed. */
static const us_lora *adapters(int64_t rows, int64_t depth, int64_t cols) {
    if (!upto(3)) return NULL;
    us_lora *l = block(sizeof *l);
    const int64_t parts = upto(3), outputs = upto(cols + 1), width = depth + cols + upto(9);
    *l = (us_lora){.slots = 1 + upto(4), .rank = upto(10), .width = width, .targets = 1 + upto(3), .parts = parts, .bfloat16 = (int32_t)upto(2)};
    int32_t *ids = block(rows * 4), *ranks = block(l->slots * l->targets * 4);
    int64_t *layout = block(parts * US_LORA_FIELDS * 8);
    for (int64_t i = 0; i < rows; i++) ids[i] = (int32_t)(upto(300) ? upto(l->slots + 1) - 1 : upto(9) - 4);
    for (int64_t i = 0; i < l->slots * l->targets; i++) ranks[i] = (int32_t)(upto(100) ? upto(l->rank + 1) : upto(20) - 5);
    for (int64_t i = 0; i < parts; i++) {
        const int64_t fields[US_LORA_FIELDS] = {upto(width - depth + 1), upto(width - outputs + 1), upto(cols - outputs + 1), outputs, upto(l->targets), depth};
        memcpy(layout + i * US_LORA_FIELDS, fields, sizeof fields);
    }
    if (parts && upto(10) == 0) layout[upto(parts * US_LORA_FIELDS)] = upto(2) ? upto(2 * width) - 5 : INT64_MIN + upto(2) * INT64_MAX;
    l->bank = l->bfloat16 ? bytes(l->slots * l->rank * width * 2) : floats(l->slots * l->rank * width);
    l->ids = ids, l->ranks = ranks, l->layout = layout;
    return l;
}

static void gemm(void) {
    const int64_t rows = upto(150), depth = 1 + upto(300), cols = 1 + upto(100);
    us_gemm_args a = {.rows = rows, .depth = depth, .cols = cols, .a_scale = 0.5f, .a_zero = (int32_t)upto(256), .b_scale = floats(cols)};
    int8_t *right = block(depth * cols);
    const int64_t range = upto(2) ? 256 : 128;
    for (int64_t i = 0; i < depth * cols; i++) right[i] = (int8_t)(upto(range) - range / 2);
    a.a = bytes(rows * depth), a.b = right, a.y = block(rows * cols * 4);
    a.lora = adapters(rows, depth, cols), a.mult = maybe(depth), a.row_scale = maybe(rows);
    us_direct_gemm(NULL, &a);
}

static void float_gemm(void) {
    const int64_t rows = upto(150), depth = 1 + upto(600), cols = 1 + upto(100);
    us_float_gemm_args a = {.rows = rows, .depth = depth, .cols = cols, .a = floats(rows * depth), .b = floats(depth * cols), .y = block(rows * cols * 4)};
    a.lora = adapters(rows, depth, cols);
    us_direct_float_gemm(NULL, &a);
}

static void int4_gemm(void) {
    const int64_t rows = upto(150), depth = 1 + upto(600), cols = 1 + upto(100), size = 32 << upto(3), panels = (cols + US_COLS - 1) / US_COLS;
    us_int4_gemm_args a = {.rows = rows, .depth = depth, .cols = cols, .block = size, .a = floats(rows * depth), .y = block(rows * cols * 4)};
    const int64_t blocks = (depth + size - 1) / size;
    a.b = bytes(panels * blocks * size * US_COLS / 2), a.scale = bytes(panels * blocks * US_COLS * 2);
    a.lora = adapters(rows, depth, cols);
    us_direct_int4_gemm(NULL, &a);
}

static void lora_add(void) {
    const int64_t rows = upto(150), depth = 1 + upto(300), cols = 1 + upto(600);
    us_lora_add_args a = {.rows = rows, .depth = depth, .cols = cols, .x = floats(rows * depth), .y = floats(rows * cols), .out = block(rows * cols * 4)};
    a.lora = adapters(rows, depth, cols);
    us_direct_lora_add(NULL, &a);
}

static void tokens(void) {
    const int64_t rows = upto(40), cols = 1 + upto(300), words = 1 + upto(50), extra = upto(4);
    us_tokens_args a = {.rows = rows, .cols = cols, .words = words, .extra_rows = extra, .ids = ids(rows, words + extra), .multiplier = 2.0f,
                        .bfloat16 = (int32_t)upto(2), .extra = floats(extra * cols), .y = block(rows * cols * 4)};
    a.table = a.bfloat16 ? memset(block(words * cols * 2), 63, (size_t)(words * cols * 2)) : floats(words * cols);
    us_direct_tokens(NULL, &a);
}

static void skip(void) {
    const int64_t rows = upto(40), cols = 1 + upto(700);
    us_skip_args a = {.rows = rows, .cols = cols, .x = floats(rows * cols), .row_scale = maybe(rows), .bias = maybe(cols), .residual = maybe(rows * cols),
                      .inner = maybe(cols), .gamma = floats(cols), .s = upto(2) ? block(rows * cols * 4) : NULL, .epsilon = 1e-6f};
    if (upto(2))
        a.quant = quantized(rows, cols);
    else
        a.y = block(rows * cols * 4);
    us_direct_skip(NULL, &a);
}

static void gated(void) {
    const int64_t rows = upto(40), cols = 1 + upto(400);
    us_gated_args a = {.rows = rows, .cols = cols, .x = floats(rows * 2 * cols), .row_scale = maybe(rows), .bias = maybe(2 * cols), .kind = (int32_t)upto(4)};
    if (upto(2))
        a.y = block(rows * cols * 4);
    else
        a.quant = quantized(rows, cols);
    us_direct_gated(NULL, &a);
}

/* A pool whose bytes are anything, so that positions that were never written hold anything too. */
static void pages_of(us_paged_args *a, int32_t *cu, int32_t *past, const int64_t head_bytes) {
    for (int64_t s = 0; s < a->sequences; s++) {
        past[s] = (int32_t)(upto(8) ? upto(90) : upto(2500));
        cu[s + 1] = cu[s] + (int32_t)(upto(3) ? upto(3) : upto(70));
        const int64_t pages = (past[s] + cu[s + 1] - cu[s] + US_PAGE - 1) / US_PAGE;
        a->width = pages > a->width ? pages : a->width;
    }
    a->tokens = cu[a->sequences];
    int32_t *table = block(a->sequences * a->width * 4);
    for (int64_t i = 0; i < a->sequences * a->width; i++) table[i] = (int32_t)upto(a->pages);
    if (a->sequences && a->width && upto(10) == 0) table[upto(a->sequences * a->width)] = upto(2) ? -1 : (int32_t)a->pages;
    if (a->sequences && upto(10) == 0) past[upto(a->sequences)] += (int32_t)upto(40) - 20;
    if (a->sequences && upto(10) == 0) cu[upto(a->sequences + 1)] += (int32_t)upto(9) - 4;
    a->cu = cu, a->past = past, a->table = table;
    a->page_bytes = a->kv_heads * head_bytes;
    const int64_t bytes = a->layers * a->pages * a->page_bytes;
    a->pool = block(bytes);
    for (int64_t i = 0; i < bytes; i++) a->pool[i] = (uint8_t)upto(256);
}

static void page(void) {
    static const int64_t sizes[] = {4, 2, 1};
    const int64_t dim = upto(3) ? 32 << upto(2) : 1 + upto(256), kv_heads = 1 + upto(2), group = 1 + upto(8), sequences = upto(6);
    us_paged_args a = {.sequences = sequences, .layers = 1 + upto(2), .pages = 1 + upto(12), .kv_heads = kv_heads, .heads = kv_heads * group, .dim = dim,
                       .kv_dtype = (int32_t)upto(3), .window = upto(2) ? 0 : upto(100), .softcap = upto(2) ? 0.0f : 5.0f, .epsilon = 1e-6f};
    a.layer = upto(a.layers);
    pages_of(&a, memset(block((sequences + 1) * 4), 0, 4), block(sequences * 4), 2 * dim * US_PAGE * sizes[a.kv_dtype] + (a.kv_dtype == 2 ? 2 * US_PAGE * 4 : 0));
    const int64_t width = (a.heads + 2 * kv_heads) * dim, tokens = a.tokens > 0 ? a.tokens : 0;
    a.positions = upto(20) ? 2600 : 50, a.half = dim > 1 ? 1 + upto(dim / 2) : 0;
    if (a.half && upto(4)) a.cos = floats(a.positions * a.half), a.sin = floats(a.positions * a.half);
    a.qkv = floats(tokens * width), a.row_scale = maybe(tokens), a.bias = maybe(width), a.q_gamma = maybe(dim), a.k_gamma = maybe(dim);
    if (upto(2))
        a.out = block(tokens * a.heads * dim * 4);
    else
        a.quant = quantized(tokens, a.heads * dim);
    us_direct_paged(NULL, &a);
}

int main(int count, char **arguments) {
    static void (*const calls[])(void) = {attend, norm, gelu, embed, gemm, float_gemm, int4_gemm, lora_add, tokens, skip, gated, page};
    if (count != 3) return 2;
    state = strtoull(arguments[1], NULL, 10);
    const long rounds = strtol(arguments[2], NULL, 10);
    for (long i = 0; i < rounds; i++) {
        calls[upto((int64_t)(sizeof calls / sizeof *calls))]();
        release();
    }
    printf("%ld calls, no finding\n", rounds);
    return 0;
}
