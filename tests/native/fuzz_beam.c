/* Random shapes for the loops of beam search; every array ends where its last element does, so that the sanitizer sees any step beyond. */
#include "../../native/kernels/beam.h"

#include <stdio.h>
#include <stdlib.h>

static uint64_t state = 88172645463325252ull;
static uint64_t next(void) { return state ^= state << 13, state ^= state >> 7, state ^= state << 17; }
static int64_t within(int64_t low, int64_t high) { return low + (int64_t)(next() % (uint64_t)(high - low + 1)); }

static float *floats(int64_t count) {
    float *p = malloc((size_t)count * sizeof *p);
    for (int64_t i = 0; i < count; i++) p[i] = (float)within(-1000, 1000) / 300.0f;
    return p;
}

static void attend(void) {
    const int64_t heads = within(1, 4), dim = within(1, 70), inner = heads * dim, rows = within(1, 6), own = within(0, 1);
    const int64_t steps = own ? within(1, 40) : 2, slots = within(50, 90), column = within(0, 9), width = column + 2 * inner + within(0, 3);
    const int64_t columns = own ? 3 * inner : inner, span = within(1, 50);
    int32_t *table = malloc((size_t)(rows * steps) * sizeof *table), *lengths = malloc((size_t)rows * sizeof *lengths);
    int64_t longest = 1;
    for (int64_t row = 0; row < rows; row++) {
        lengths[row] = (int32_t)within(1, own ? steps : 45);
        if (lengths[row] > longest) longest = lengths[row];
        for (int64_t i = 0; i < steps; i++) table[row * steps + i] = (int32_t)within(0, slots - 1);
        if (!own) {
            table[row * 2] = (int32_t)within(0, slots - lengths[row]);
            table[row * 2 + 1] = lengths[row];
        }
    }
    float *x = floats(rows * columns), *bias = floats(columns), *pool = floats(slots * width), *relative = floats(heads * span);
    float *y = floats(rows * inner), *scratch = floats(2 * dim + longest);
    const us_beam_args a = {.x = x, .bias = next() & 1 ? bias : NULL, .pool = pool, .table = table, .lengths = own ? lengths : NULL,
                            .relative = next() & 1 ? relative : NULL, .y = y, .rows = rows, .columns = columns, .inner = inner, .heads = heads,
                            .slots = slots, .width = width, .column = column, .steps = steps, .span = span, .scale = 0.3f, .own = (int32_t)own};
    us_beam_units_base(&a, 0, rows * heads, scratch);
    for (int64_t i = 0; i < rows * inner; i++)
        if (!(y[i] == y[i])) abort();
    free(table), free(lengths), free(x), free(bias), free(pool), free(relative), free(y), free(scratch);
}

static void choose(void) {
    const int64_t rows = within(1, 4), cols = within(1, 9000), k = within(1, cols < 300 ? cols : 300);
    float *x = floats(rows * cols), *lse = floats(rows), *values = floats(rows * k);
    int64_t *ids = malloc((size_t)(rows * k) * sizeof *ids);
    const us_top_args a = {.x = x, .lse = lse, .values = values, .ids = ids, .rows = rows, .cols = cols, .k = k};
    us_top_rows_base(&a, 0, rows);
    for (int64_t i = 0; i < rows * k; i++)
        if (ids[i] < 0 || ids[i] >= cols || x[i / k * cols + ids[i]] != values[i]) abort();
    free(x), free(lse), free(values), free(ids);
}

int main(int count, char **arguments) {
    const int rounds = count > 1 ? atoi(arguments[1]) : 1000;
    for (int i = 0; i < rounds; i++) attend(), choose();
    return 0;
}
