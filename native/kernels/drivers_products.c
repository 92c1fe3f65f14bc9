/* Splits products and their adapters into tasks. What a task computes never depends on how the work was split. */
#include "drivers.h"
#include "products.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum {
    BLOCK_ROWS = 64,        /* rows of a task: their activations stay in the second-level cache */
    TASK_NS = 6000,         /* a task takes about this long at least: handing one out costs some hundred nanoseconds */
    LORA_TASK_NS = 20000,   /* with adapters: their rows in the bank are read in longer runs */
    PIECE_BYTES = 64 << 10, /* inputs of a piece of rows with one adapter */
    FEW_PIECES = 4,
    LORA_COLUMNS = 256      /* of a task that does nothing but add adapters */
};

void us_free_weights(us_weights *w) {
    if (!w) return;
    free(w->data);
    free(w->column_sums);
    free(w->offsets);
    free(w->ends);
    free(w);
}

us_float_weights *us_float_pack(const float *b, int64_t depth, int64_t cols) {
    const int64_t panels = (cols + US_COLS - 1) / US_COLS;
    us_float_weights *w = malloc(sizeof *w);
    float *data = aligned_alloc(64, (size_t)(panels * depth * US_COLS) * sizeof *data + 64);
    if (!w || !data) {
        free(w), free(data);
        return NULL;
    }
    *w = (us_float_weights){.depth = depth, .cols = cols, .panels = panels, .data = data};
    for (int64_t panel = 0; panel < panels; panel++) {
        const int64_t first = panel * US_COLS, n = cols - first < US_COLS ? cols - first : US_COLS;
        for (int64_t k = 0; k < depth; k++, data += US_COLS) {
            memcpy(data, b + k * cols + first, (size_t)n * sizeof *data);
            memset(data + n, 0, (size_t)(US_COLS - n) * sizeof *data);
        }
    }
    return w;
}

void us_free_float_weights(us_float_weights *w) {
    if (!w) return;
    free(w->data);
    free(w);
}

static const char *check_lora(const us_lora *l, int64_t rows, int64_t depth, int64_t cols) {
    for (int64_t i = 0; i < l->parts; i++) {
        const int64_t *f = l->layout + i * US_LORA_FIELDS, outputs = f[US_LORA_OUTPUTS];
        if (f[US_LORA_INPUTS] != depth) return us_message("lora_layout[%lld] has %lld inputs for a product of %lld", (long long)i, (long long)f[US_LORA_INPUTS], (long long)depth);
        if (f[US_LORA_A] < 0 || f[US_LORA_A] > l->width || depth > l->width - f[US_LORA_A])
            return us_message("lora_layout[%lld] has A at %lld, which leaves the bank's width of %lld", (long long)i, (long long)f[US_LORA_A], (long long)l->width);
        if (outputs < 0 || f[US_LORA_B] < 0 || f[US_LORA_B] > l->width || outputs > l->width - f[US_LORA_B])
            return us_message("lora_layout[%lld] has B at %lld, which leaves the bank's width of %lld", (long long)i, (long long)f[US_LORA_B], (long long)l->width);
        if (f[US_LORA_FIRST] < 0 || f[US_LORA_FIRST] > cols || outputs > cols - f[US_LORA_FIRST])
            return us_message("lora_layout[%lld] has columns %lld to %lld, not within %lld", (long long)i, (long long)f[US_LORA_FIRST], (long long)outputs, (long long)cols);
        if (f[US_LORA_TARGET] < 0 || f[US_LORA_TARGET] >= l->targets)
            return us_message("lora_layout[%lld] has target %lld of %lld", (long long)i, (long long)f[US_LORA_TARGET], (long long)l->targets);
    }
    for (int64_t row = 0; row < rows; row++) {
        const int32_t slot = l->ids[row];
        if (slot >= l->slots) return us_message("adapter_ids[%lld] is %d, not within -1..%lld", (long long)row, slot, (long long)l->slots - 1);
        if (slot < 0) continue;
        for (int64_t i = 0; i < l->parts; i++) {
            const int64_t target = l->layout[i * US_LORA_FIELDS + US_LORA_TARGET];
            const int32_t rank = l->ranks[slot * l->targets + target];
            if (rank < 0 || rank > l->rank)
                return us_message("lora_ranks[%d, %lld] is %d, not within 0..%lld", slot, (long long)target, rank, (long long)l->rank);
        }
    }
    return NULL;
}

static void drop_plan(us_lora_plan *p) {
    free(p->order);
    free(p->piece);
    free(p->hidden);
    free(p->inverse);
}

/* Rows in order of their slots (a counting sort), cut into pieces of one slot. */
static int sort_rows(us_lora_plan *p, int64_t rows) {
    const us_lora *l = p->lora;
    int64_t longest = PIECE_BYTES / (p->depth * 4 + 1);
    longest = longest < 4 ? 4 : longest > 16 ? 16 : longest;
    int32_t *ends = calloc((size_t)l->slots + 1, sizeof *ends);
    p->order = malloc((size_t)p->count * sizeof *p->order);
    p->piece = malloc((size_t)p->count * sizeof *p->piece);
    p->hidden = malloc((size_t)(p->count * l->parts * l->rank) * sizeof *p->hidden + 1);
    p->inverse = p->x ? NULL : malloc((size_t)p->depth * sizeof *p->inverse);
    if (!ends || !p->order || !p->piece || !p->hidden || (!p->x && !p->inverse)) {
        free(ends);
        return 0;
    }
    for (int64_t row = 0; row < rows; row++)
        if (l->ids[row] >= 0) ends[l->ids[row] + 1]++;
    for (int64_t s = 0; s < l->slots; s++) ends[s + 1] += ends[s];
    for (int64_t row = 0; row < rows; row++)
        if (l->ids[row] >= 0) p->order[ends[l->ids[row]]++] = (int32_t)row;
    free(ends);
    for (int64_t k = 0; p->inverse && k < p->depth; k++) p->inverse[k] = 1.0f / p->mult[k];
    for (int32_t i = 0; i < p->count; i++) {
        const int32_t slot = l->ids[p->order[i]];
        us_lora_piece *last = p->piece + p->pieces - 1;
        if (p->pieces && last->slot == slot && last->end - last->begin < longest)
            last->end++;
        else
            p->piece[p->pieces++] = (us_lora_piece){slot, i, i + 1};
    }
    return 1;
}

/* A task is a piece, or one part of one where pieces are few: then inputs are made once a part. */
typedef struct { const us_kernels *kernels; us_lora_plan *plan; int64_t parts; atomic_int out_of_memory; } down_job;

static void down_task(void *data, size_t index) {
    down_job *job = data;
    const us_lora_plan *p = job->plan;
    const us_products *products = job->kernels->products;
    const int64_t at = (int64_t)index * job->parts / p->lora->parts, first = (int64_t)index * job->parts % p->lora->parts;
    const us_lora_piece *piece = p->piece + at;
    float *inputs = p->x ? NULL : malloc((size_t)((piece->end - piece->begin) * p->depth) * sizeof *inputs);
    if (!p->x && !inputs) {
        atomic_store(&job->out_of_memory, 1);
        return;
    }
    if (inputs) products->lora_inputs(p, at, inputs);
    for (int64_t part = first; part < first + job->parts; part++) products->lora_down(p, at, part, inputs);
    free(inputs);
}

/* Finds the rows with adapters and computes A x of each. `p` comes with its inputs; drop_plan is the caller's. */
static const char *plan_lora(us_lora_plan *p, const us_kernels *kernels, int64_t rows, us_runner *runner) {
    const us_lora *l = p->lora;
    if (!l || !l->ids) return NULL;
    int64_t count = 0;
    for (int64_t row = 0; row < rows; row++) count += l->ids[row] >= 0;
    if (!count || !l->parts) return NULL;
    const char *wrong = check_lora(l, rows, p->depth, p->cols);
    if (wrong) return wrong;
    if (!p->x && !p->mult) return "adapters over quantized inputs need mult";
    p->count = count;
    if (!sort_rows(p, rows)) return "out of memory for the rows with adapters";
    down_job job = {.kernels = kernels, .plan = p, .parts = p->pieces < FEW_PIECES ? 1 : l->parts};
    run(runner, down_task, (size_t)(p->pieces * l->parts / job.parts), &job);
    return job.out_of_memory ? "out of memory for the inputs of adapters" : NULL;
}

/* A product over blocks of rows by ranges of panels. `own` computes one of them and says whether it had the memory. */
typedef struct product {
    const us_kernels *kernels;
    const void *args, *more;
    int (*own)(const struct product *, int64_t begin, int64_t end, int64_t first, int64_t last);
    const us_lora_plan *plan;
    float *y;
    int64_t rows, cols, panels, row_parts, panel_step;
    atomic_int out_of_memory;
} product;

static void product_task(void *data, size_t index) {
    product *p = data;
    const int64_t begin = (int64_t)index % p->row_parts * BLOCK_ROWS, end = begin + BLOCK_ROWS < p->rows ? begin + BLOCK_ROWS : p->rows;
    const int64_t first = (int64_t)index / p->row_parts * p->panel_step, last = first + p->panel_step < p->panels ? first + p->panel_step : p->panels;
    if (!p->own(p, begin, end, first, last)) {
        atomic_store(&p->out_of_memory, 1);
        return;
    }
    if (p->plan->pieces)
        p->kernels->products->lora_up(p->plan, p->y, begin, end, first * US_COLS, last * US_COLS < p->cols ? last * US_COLS : p->cols);
}

/* `panel_ns`: what a panel costs over BLOCK_ROWS rows, or all of them where they are fewer, about. */
static const char *multiply(product *p, double panel_ns, us_runner *runner) {
    p->row_parts = (p->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    p->panel_step = (int64_t)((p->plan->pieces ? LORA_TASK_NS : TASK_NS) / panel_ns) + 1;
    run(runner, product_task, (size_t)(p->row_parts * ((p->panels + p->panel_step - 1) / p->panel_step)), p);
    return p->out_of_memory ? us_message("out of memory for a copy of the inputs") : NULL;
}

/* A core reads some 12 bytes a nanosecond from memory. */
static double cost(int64_t rows, double bytes, double products_per_ns, double products) {
    const double block = rows < BLOCK_ROWS ? (double)rows : BLOCK_ROWS, work = block * products / products_per_ns, reading = bytes / 12;
    return (work > reading ? work : reading) + 20;
}

static int int8_own(const product *p, int64_t begin, int64_t end, int64_t first, int64_t last) {
    const us_gemm_args *a = p->args;
    const int copies = a->weights->depth % 8 != 0;
    uint8_t *own = copies ? malloc((size_t)((end - begin) * (a->weights->depth + 8))) : NULL;
    if (copies && !own) return 0;
    p->kernels->gemm_part(a, begin, end, first, last, own);
    free(own);
    return 1;
}

const char *us_gemm(const us_kernels *kernels, const us_gemm_args *a, us_runner *runner) {
    const us_weights *w = a->weights;
    if (w->depth >= 1 << 15) return us_message("b has %lld rows; sums of more than 32767 products may overflow", (long long)w->depth);
    if (!a->rows || !w->cols) return NULL;
    us_lora_plan plan = {.lora = a->lora, .depth = w->depth, .cols = w->cols, .q = a->a, .mult = a->mult, .row_scale = a->row_scale, .zero = (float)a->a_zero};
    product p = {.kernels = kernels, .args = a, .own = int8_own, .plan = &plan, .y = a->y, .rows = a->rows, .cols = w->cols, .panels = w->panels};
    const char *wrong = plan_lora(&plan, kernels, a->rows, runner);
    if (!wrong) wrong = multiply(&p, cost(a->rows, (double)w->depth * US_COLS, 100, (double)w->depth * US_COLS), runner);
    drop_plan(&plan);
    return wrong;
}

static int float_own(const product *p, int64_t begin, int64_t end, int64_t first, int64_t last) {
    p->kernels->products->float_part(p->args, begin, end, first, last);
    return 1;
}

const char *us_float_gemm(const us_kernels *kernels, const us_float_gemm_args *a, us_runner *runner) {
    const us_float_weights *w = a->weights;
    if (!a->rows || !w->cols) return NULL;
    us_lora_plan plan = {.lora = a->lora, .depth = w->depth, .cols = w->cols, .x = a->a};
    product p = {.kernels = kernels, .args = a, .own = float_own, .plan = &plan, .y = a->y, .rows = a->rows, .cols = w->cols, .panels = w->panels};
    const char *wrong = plan_lora(&plan, kernels, a->rows, runner);
    if (!wrong) wrong = multiply(&p, cost(a->rows, (double)w->depth * US_COLS * 4, 40, (double)w->depth * US_COLS), runner);
    drop_plan(&plan);
    return wrong;
}

typedef struct {
    const us_kernels *kernels;
    const us_int4_gemm_args *args;
    const us_int4_activations *to;
    int64_t step;
} quantize_job;

static void quantize_task(void *data, size_t index) {
    const quantize_job *job = data;
    const int64_t begin = (int64_t)index * job->step, end = begin + job->step < job->args->rows ? begin + job->step : job->args->rows;
    job->kernels->products->int4_quantize(job->args, job->to, begin, end);
}

static int int4_own(const product *p, int64_t begin, int64_t end, int64_t first, int64_t last) {
    p->kernels->products->int4_part(p->args, p->more, begin, end, first, last);
    return 1;
}

const char *us_int4_gemm(const us_kernels *kernels, const us_int4_gemm_args *a, us_runner *runner) {
    if (a->block != 32 && a->block != 64 && a->block != 128) return us_message("block is %lld; expected 32, 64 or 128", (long long)a->block);
    if (a->depth < 1 || a->cols < 1 || a->depth >= 1 << 24) return us_message("depth is %lld and cols is %lld; expected 1 to 2^24", (long long)a->depth, (long long)a->cols);
    if (!a->rows) return NULL;
    us_int4_activations x = {.blocks = (a->depth + a->block - 1) / a->block};
    const int64_t scales = a->rows * x.blocks, panels = (a->cols + US_COLS - 1) / US_COLS, padded = x.blocks * a->block;
    char *memory = malloc((size_t)(scales * (a->block + (int64_t)sizeof *x.scale + (int64_t)sizeof *x.shift)));
    if (!memory) return "out of memory for rounded inputs";
    x.scale = (void *)memory, x.shift = (void *)(x.scale + scales), x.q = (void *)(x.shift + scales);
    quantize_job quantize = {.kernels = kernels, .args = a, .to = &x, .step = 16384 / padded + 1};
    run(runner, quantize_task, (size_t)((a->rows + quantize.step - 1) / quantize.step), &quantize);
    us_lora_plan plan = {.lora = a->lora, .depth = a->depth, .cols = a->cols, .x = a->a};
    product p = {.kernels = kernels, .args = a, .more = &x, .own = int4_own, .plan = &plan, .y = a->y, .rows = a->rows, .cols = a->cols, .panels = panels};
    const char *wrong = plan_lora(&plan, kernels, a->rows, runner);
    if (!wrong) wrong = multiply(&p, cost(a->rows, (double)padded * US_COLS / 2, 100, (double)padded * US_COLS), runner);
    drop_plan(&plan);
    free(memory);
    return wrong;
}

typedef struct {
    const us_kernels *kernels;
    const us_lora_add_args *args;
    const us_lora_plan *plan;
    int64_t row_parts;
} add_job;

static void add_task(void *data, size_t index) {
    const add_job *job = data;
    const us_lora_add_args *a = job->args;
    const int64_t begin = (int64_t)index % job->row_parts * BLOCK_ROWS, end = begin + BLOCK_ROWS < a->rows ? begin + BLOCK_ROWS : a->rows;
    const int64_t first = (int64_t)index / job->row_parts * LORA_COLUMNS, last = first + LORA_COLUMNS < a->cols ? first + LORA_COLUMNS : a->cols;
    for (int64_t row = begin; row < end; row++)
        memcpy(a->out + row * a->cols + first, a->y + row * a->cols + first, (size_t)(last - first) * sizeof(float));
    if (job->plan->pieces) job->kernels->products->lora_up(job->plan, a->out, begin, end, first, last);
}

const char *us_lora_add(const us_kernels *kernels, const us_lora_add_args *a, us_runner *runner) {
    if (!a->rows || !a->cols) return NULL;
    us_lora_plan plan = {.lora = a->lora, .depth = a->depth, .cols = a->cols, .x = a->x};
    add_job job = {.kernels = kernels, .args = a, .plan = &plan, .row_parts = (a->rows + BLOCK_ROWS - 1) / BLOCK_ROWS};
    const char *wrong = plan_lora(&plan, kernels, a->rows, runner);
    if (!wrong) run(runner, add_task, (size_t)(job.row_parts * ((a->cols + LORA_COLUMNS - 1) / LORA_COLUMNS)), &job);
    drop_plan(&plan);
    return wrong;
}
