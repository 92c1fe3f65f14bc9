/* The products as ONNX Runtime sees them. The inputs of adapters follow those of the product: adapter_ids, lora_bank, lora_ranks, lora_layout. */
#include "operators.h"
#include "products.h"

#include <stdlib.h>

/* An initializer as a matrix of at least one element, or of rank 3. */
static OrtStatus *read_constant(us_kernel *self, const OrtKernelInfo *info, size_t index, const char *name, us_tensor *t) {
    const OrtApi *api = self->api;
    const OrtValue *value = NULL;
    OrtTensorTypeAndShapeInfo *shape = NULL;
    int constant = 0;
    OrtStatus *status = US_ORT(api, KernelInfoGetConstantInput_tensor)(info, index, &constant, &value);
    if (status) return status;
    if (!constant || !value) return us_refuse(self, us_message("%s must be an initializer", name));
    status = US_ORT(api, GetTensorTypeAndShape)(value, &shape);
    if (status) return status;
    status = US_ORT(api, GetDimensionsCount)(shape, &t->rank);
    if (!status && t->rank <= MOST_RANK) status = US_ORT(api, GetDimensions)(shape, t->dims, t->rank);
    US_ORT(api, ReleaseTensorTypeAndShapeInfo)(shape);
    if (!status) status = US_ORT(api, GetTensorMutableData)((OrtValue *)value, &t->data);
    return status;
}

static OrtStatus *read_matrix(us_kernel *self, const OrtKernelInfo *info, us_tensor *t) {
    OrtStatus *status = read_constant(self, info, 1, "b", t);
    if (!status && (t->rank != 2 || t->dims[0] < 1 || t->dims[1] < 1)) return us_refuse(self, "b must be a matrix with at least one element");
    return status;
}

/* Weights are packed once, when the session is made; that is why they must be constant. */
static OrtStatus *prepare_int8(us_kernel *self, const OrtKernelInfo *info) {
    us_tensor b = {0};
    OrtStatus *status = read_matrix(self, info, &b);
    if (status) return status;
    self->weights = us_choose(NULL)->pack(b.data, b.dims[0], b.dims[1]);
    return self->weights ? NULL : us_refuse(self, "out of memory for the packed weights");
}

static OrtStatus *prepare_float(us_kernel *self, const OrtKernelInfo *info) {
    us_tensor b = {0};
    OrtStatus *status = read_matrix(self, info, &b);
    if (status) return status;
    self->own = us_float_pack(b.data, b.dims[0], b.dims[1]);
    return self->own ? NULL : us_refuse(self, "out of memory for the packed weights");
}

static void dismiss_float(us_kernel *self) { us_free_float_weights(self->own); }

typedef struct { int64_t depth, cols, block; } int4_shape;

/* What the file says is checked here once against the attributes; the data is used as it lies. */
static OrtStatus *prepare_int4(us_kernel *self, const OrtKernelInfo *info) {
    int4_shape *s = self->own = calloc(1, sizeof *s);
    if (!s) return us_refuse(self, "out of memory for the shape");
    *s = (int4_shape){us_int_attribute(self->api, info, "depth", 0), us_int_attribute(self->api, info, "cols", 0), us_int_attribute(self->api, info, "block", 0)};
    if (s->block != 32 && s->block != 64 && s->block != 128)
        return us_refuse(self, us_message("the attribute block is %lld; expected 32, 64 or 128", (long long)s->block));
    if (s->depth < 1 || s->cols < 1 || s->depth >= 1 << 24 || s->cols >= 1 << 30)
        return us_refuse(self, us_message("the attributes depth and cols are %lld and %lld; expected positive sizes", (long long)s->depth, (long long)s->cols));
    const int64_t panels = (s->cols + US_COLS - 1) / US_COLS, blocks = (s->depth + s->block - 1) / s->block, groups = blocks * s->block / US_GROUP;
    us_tensor b = {0}, scale = {0};
    OrtStatus *status = read_constant(self, info, 1, "b", &b);
    if (!status) status = read_constant(self, info, 2, "scale", &scale);
    if (status) return status;
    if (b.rank != 3 || b.dims[0] != panels || b.dims[1] != groups || b.dims[2] != US_COLS * US_GROUP / 2)
        return us_refuse(self, us_message("b does not have the shape [%lld, %lld, 32] that depth, cols and block give", (long long)panels, (long long)groups));
    if (scale.rank != 3 || scale.dims[0] != panels || scale.dims[1] != blocks || scale.dims[2] != US_COLS)
        return us_refuse(self, us_message("scale does not have the shape [%lld, %lld, 16] that depth, cols and block give", (long long)panels, (long long)blocks));
    return NULL;
}

/* The adapters' four inputs from `first` on: all or none. Their contents are checked by the driver. */
static const char *read_lora(us_call *c, size_t first, int64_t rows, us_lora *l, const us_lora **used) {
    const us_tensor *ids = &c->in[first], *bank = ids + 1, *ranks = ids + 2, *layout = ids + 3;
    if (!ids->data) return NULL;
    if (!bank->data || !ranks->data || !layout->data) return "adapter_ids needs lora_bank, lora_ranks and lora_layout";
    if (bank->type != ORT_FLOAT && bank->type != ORT_UINT16) return us_message("lora_bank has element type %d; expected float32, or uint16 for bfloat16", (int)bank->type);
    if (!us_fits(c, first, "adapter_ids", 1, rows, 0) || !us_fits(c, first + 1, "lora_bank", 3, -1, -1)) return NULL;
    if (!us_fits(c, first + 2, "lora_ranks", 2, bank->dims[0], -1) || !us_fits(c, first + 3, "lora_layout", 2, -1, US_LORA_FIELDS)) return NULL;
    *l = (us_lora){.ids = ids->data, .bank = bank->data, .ranks = ranks->data, .layout = layout->data, .slots = bank->dims[0], .rank = bank->dims[1],
                   .width = bank->dims[2], .targets = ranks->dims[1], .parts = layout->dims[0], .bfloat16 = bank->type == ORT_UINT16};
    *used = l;
    return NULL;
}

static const char *compute_int8(us_call *c, us_runner *runner) {
    const us_tensor *in = c->in;
    const us_weights *w = c->self->weights;
    if (!us_fits(c, 0, "a", 2, -1, w->depth) || !us_fits(c, 3, "b_scale", 1, w->cols, 0)) return NULL;
    if (in[2].rank > 1 || in[4].rank > 1 || (in[2].rank && in[2].dims[0] != 1) || (in[4].rank && in[4].dims[0] != 1))
        return "a_scale and a_zero_point must be scalars";
    us_gemm_args a = {.a = in[0].data, .weights = w, .b_scale = in[3].data, .rows = in[0].dims[0], .depth = w->depth, .cols = w->cols,
                      .a_scale = *(const float *)in[2].data, .a_zero = *(const uint8_t *)in[4].data, .mult = in[9].data, .row_scale = in[10].data};
    us_lora lora;
    const char *wrong = read_lora(c, 5, a.rows, &lora, &a.lora);
    if (wrong || !us_fits(c, 9, "mult", 1, a.depth, 0) || !us_fits(c, 10, "row_scale", 1, a.rows, 0)) return wrong;
    a.y = us_output(c, 0, 2, a.rows, a.cols);
    return c->status ? NULL : us_gemm(us_choose(NULL), &a, runner);
}

static const char *compute_float(us_call *c, us_runner *runner) {
    const us_float_weights *w = c->self->own;
    if (!us_fits(c, 0, "a", 2, -1, w->depth)) return NULL;
    us_float_gemm_args a = {.a = c->in[0].data, .weights = w, .rows = c->in[0].dims[0], .depth = w->depth, .cols = w->cols};
    us_lora lora;
    const char *wrong = read_lora(c, 2, a.rows, &lora, &a.lora);
    if (wrong || c->status) return wrong;
    a.y = us_output(c, 0, 2, a.rows, a.cols);
    return c->status ? NULL : us_float_gemm(us_choose(NULL), &a, runner);
}

static const char *compute_int4(us_call *c, us_runner *runner) {
    const int4_shape *s = c->self->own;
    if (!us_fits(c, 0, "a", 2, -1, s->depth)) return NULL;
    us_int4_gemm_args a = {.a = c->in[0].data, .b = c->in[1].data, .scale = c->in[2].data, .rows = c->in[0].dims[0], .depth = s->depth, .cols = s->cols, .block = s->block};
    us_lora lora;
    const char *wrong = read_lora(c, 3, a.rows, &lora, &a.lora);
    if (wrong || c->status) return wrong;
    a.y = us_output(c, 0, 2, a.rows, a.cols);
    return c->status ? NULL : us_int4_gemm(us_choose(NULL), &a, runner);
}

static const char *compute_lora_add(us_call *c, us_runner *runner) {
    const us_tensor *y = &c->in[0], *x = &c->in[1];
    if (!us_fits(c, 0, "y", 2, -1, -1) || !us_fits(c, 1, "x", 2, y->dims[0], -1)) return NULL;
    us_lora_add_args a = {.x = x->data, .y = y->data, .rows = y->dims[0], .depth = x->dims[1], .cols = y->dims[1]};
    us_lora lora;
    const char *wrong = read_lora(c, 2, a.rows, &lora, &a.lora);
    if (wrong || c->status) return wrong;
    a.out = us_output(c, 0, 2, a.rows, a.cols);
    return c->status ? NULL : us_lora_add(us_choose(NULL), &a, runner);
}

const us_op us_product_ops[] = {
    {US_OP_BASE, "Int8Gemm", "usffuITILFF", "f", 0, compute_int8, prepare_int8, NULL},
    {US_OP_BASE, "FloatGemm", "ffITIL", "f", 0, compute_float, prepare_float, dismiss_float},
    {US_OP_BASE, "Int4Gemm", "fuwITIL", "f", 0, compute_int4, prepare_int4, NULL},
    {US_OP_BASE, "LoraAdd", "ffitil", "f", 0, compute_lora_add, NULL, NULL},
};
const size_t us_product_op_count = sizeof us_product_ops / sizeof *us_product_ops;
