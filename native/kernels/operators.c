/* The operators as ONNX Runtime sees them: reading of inputs, shape checks, the encoders' operators, and the registration. */
#include "operators.h"
#include "pool.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

OrtStatus *us_refuse(const us_kernel *self, const char *why) {
    char text[400];
    snprintf(text, sizeof text, "%s: %s", self->op->name, why);
    return US_ORT(self->api, CreateStatus)(ORT_INVALID_ARGUMENT, text);
}

void us_keep(us_call *c, OrtStatus *status) {
    if (!c->status)
        c->status = status;
    else if (status)
        US_ORT(c->self->api, ReleaseStatus)(status);
}

static void read_input(us_call *c, size_t index) {
    const OrtApi *api = c->self->api;
    const OrtValue *value = NULL;
    OrtTensorTypeAndShapeInfo *info = NULL;
    us_tensor *t = &c->in[index];
    us_keep(c, US_ORT(api, KernelContext_GetInput)(c->context, index, &value));
    if (c->status || !value) return;
    us_keep(c, US_ORT(api, GetTensorTypeAndShape)(value, &info));
    if (c->status) return;
    us_keep(c, US_ORT(api, GetDimensionsCount)(info, &t->rank));
    us_keep(c, US_ORT(api, GetTensorElementType)(info, &t->type));
    if (t->rank <= MOST_RANK) us_keep(c, US_ORT(api, GetDimensions)(info, t->dims, t->rank));
    US_ORT(api, ReleaseTensorTypeAndShapeInfo)(info);
    us_keep(c, US_ORT(api, GetTensorMutableData)((OrtValue *)value, &t->data));
    /* An empty tensor may have no address, and NULL means absent here. */
    static float nothing[1];
    if (!t->data) t->data = nothing;
}

void *us_output(us_call *c, size_t index, size_t rank, int64_t rows, int64_t cols) {
    const int64_t dims[2] = {rows, cols};
    OrtValue *value = NULL;
    void *data = NULL;
    size_t count = 0;
    us_keep(c, US_ORT(c->self->api, KernelContext_GetOutputCount)(c->context, &count));
    if (c->status || index >= count) return NULL;
    us_keep(c, US_ORT(c->self->api, KernelContext_GetOutput)(c->context, index, dims, rank, &value));
    if (c->status || !value) return NULL;
    us_keep(c, US_ORT(c->self->api, GetTensorMutableData)(value, &data));
    static float nothing[1];
    return data ? data : nothing;
}

int us_fits(us_call *c, size_t index, const char *name, size_t rank, int64_t a, int64_t b) {
    const us_tensor *t = &c->in[index];
    if (!t->data || c->status) return !c->status;
    if (t->rank == rank && (a < 0 || t->dims[0] == a) && (rank < 2 || b < 0 || t->dims[1] == b)) return 1;
    const long long d[MOST_RANK] = {t->dims[0], t->dims[1], t->dims[2]};
    char seen[80], wanted[64];
    if (t->rank == 1)
        snprintf(seen, sizeof seen, "[%lld]", d[0]);
    else if (t->rank == 2)
        snprintf(seen, sizeof seen, "[%lld, %lld]", d[0], d[1]);
    else if (t->rank == 3)
        snprintf(seen, sizeof seen, "rank 3 ([%lld, %lld, %lld])", d[0], d[1], d[2]);
    else
        snprintf(seen, sizeof seen, "rank %zu", t->rank);
    snprintf(wanted, sizeof wanted, rank == 1 ? "[%lld]" : rank == 2 ? "[%lld, %lld]" : "[%lld, %lld, ...]", (long long)a, (long long)b);
    us_keep(c, us_refuse(c->self, us_message("%s has shape %s, expected rank %zu with %s (-1: any)", name, seen, rank, wanted)));
    return 0;
}

/* The shared pool, once somebody told its size; before, the session's own: without one (a single thread) that runs in place. */
static void *run_in_session(void *pool, void (*task)(void *, size_t), size_t count, void *data) {
    const us_call *c = pool;
    if (!us_pool_threads()) return US_ORT(c->self->api, KernelContext_ParallelFor)(c->context, task, count, 0, data);
    us_pool_run(task, count, data);
    return NULL;
}

us_quant us_quant_outputs(us_call *c, size_t mult, size_t first_output, int64_t rows, int64_t cols) {
    us_quant quant = {.zero_point = (int32_t)c->self->zero_point, .per_row = (int32_t)c->self->per_row};
    if (!c->self->op->quantized || !us_fits(c, mult, "mult", 1, cols, 0)) return quant;
    quant.mult = c->in[mult].data;
    quant.q = us_output(c, first_output, 2, rows, cols);
    if (quant.per_row) {
        quant.scale = us_output(c, first_output + 1, 1, rows, 0);
        if (!quant.scale && !c->status) us_keep(c, us_refuse(c->self, "per_row = 1 needs the output out_scale"));
    }
    return quant;
}

static const char *compute_attention(us_call *c, us_runner *runner) {
    const us_tensor *in = c->in;
    if (!us_fits(c, 0, "qkv", 2, -1, -1) || !us_fits(c, 1, "cu_seqlens", 1, -1, 0)) return NULL;
    const int64_t tokens = in[0].dims[0], columns = in[0].dims[1], heads = c->self->heads;
    if (columns < 3 || columns % 3) return us_message("qkv has %lld columns; expected Q | K | V of equal width", (long long)columns);
    if (in[1].dims[0] < 1) return "cu_seqlens is empty; expected one entry more than there are sequences";
    if (!us_fits(c, 2, "row_scale", 1, tokens, 0) || !us_fits(c, 3, "bias", 1, columns, 0) || !us_fits(c, 4, "rel_bias", 2, heads, -1)) return NULL;
    if (in[4].data && in[4].dims[1] % 2 == 0) return us_message("rel_bias has %lld columns; expected an odd number", (long long)in[4].dims[1]);
    us_attention_args a = {.qkv = in[0].data, .cu = in[1].data, .row_scale = in[2].data, .bias = in[3].data, .rel_bias = in[4].data,
                           .tokens = tokens, .sequences = in[1].dims[0] - 1, .hidden = columns / 3, .heads = heads,
                           .rel_span = in[4].data ? (in[4].dims[1] + 1) / 2 : 0, .scale = c->self->scale};
    if (c->self->op->quantized)
        a.quant = us_quant_outputs(c, 5, 0, tokens, a.hidden);
    else
        a.out = us_output(c, 0, 2, tokens, a.hidden);
    return c->status ? NULL : us_attention(us_choose(NULL), &a, runner);
}

static const char *compute_norm(us_call *c, us_runner *runner) {
    const us_tensor *in = c->in;
    if (!us_fits(c, 0, "x", 2, -1, -1)) return NULL;
    const int64_t rows = in[0].dims[0], cols = in[0].dims[1];
    if (!us_fits(c, 1, "row_scale", 1, rows, 0) || !us_fits(c, 2, "bias", 1, cols, 0) || !us_fits(c, 3, "residual", 2, rows, cols) ||
        !us_fits(c, 4, "gamma", 1, cols, 0) || !us_fits(c, 5, "beta", 1, cols, 0))
        return NULL;
    us_norm_args a = {.x = in[0].data, .row_scale = in[1].data, .bias = in[2].data, .residual = in[3].data, .gamma = in[4].data,
                      .beta = in[5].data, .rows = rows, .cols = cols, .epsilon = c->self->epsilon, .rms = (int32_t)c->self->rms};
    a.y = us_output(c, 0, 2, rows, cols);
    a.quant = us_quant_outputs(c, 6, 1, rows, cols);
    return c->status ? NULL : us_norm(us_choose(NULL), &a, runner);
}

static const char *compute_gelu(us_call *c, us_runner *runner) {
    const us_tensor *in = c->in;
    if (!us_fits(c, 0, "x", 2, -1, -1)) return NULL;
    const int64_t rows = in[0].dims[0], cols = in[0].dims[1];
    if (!us_fits(c, 1, "row_scale", 1, rows, 0) || !us_fits(c, 2, "bias", 1, cols, 0)) return NULL;
    us_gelu_args a = {.x = in[0].data, .row_scale = in[1].data, .bias = in[2].data, .rows = rows, .cols = cols,
                      .approximate = (int32_t)c->self->approximate};
    if (c->self->op->quantized)
        a.quant = us_quant_outputs(c, 3, 0, rows, cols);
    else
        a.y = us_output(c, 0, 2, rows, cols);
    return c->status ? NULL : us_gelu(us_choose(NULL), &a, runner);
}

static const char *compute_embed(us_call *c, us_runner *runner) {
    const us_tensor *in = c->in;
    if (!us_fits(c, 0, "input_ids", 1, -1, 0) || !us_fits(c, 3, "word", 2, -1, -1)) return NULL;
    const int64_t rows = in[0].dims[0], cols = in[3].dims[1];
    if (!us_fits(c, 1, "position_ids", 1, rows, 0) || !us_fits(c, 2, "token_type_ids", 1, rows, 0) || !us_fits(c, 4, "position", 2, -1, cols) ||
        !us_fits(c, 5, "token_type", 2, -1, cols) || !us_fits(c, 6, "gamma", 1, cols, 0) || !us_fits(c, 7, "beta", 1, cols, 0))
        return NULL;
    us_embed_args a = {.ids = in[0].data, .positions = in[1].data, .types = in[2].data, .word = in[3].data, .position = in[4].data,
                       .type = in[5].data, .gamma = in[6].data, .beta = in[7].data, .rows = rows, .cols = cols, .words = in[3].dims[0],
                       .max_positions = in[4].dims[0], .type_count = in[5].data ? in[5].dims[0] : 0, .epsilon = c->self->epsilon};
    a.y = us_output(c, 0, 2, rows, cols);
    a.quant = us_quant_outputs(c, 8, 1, rows, cols);
    return c->status ? NULL : us_embed(us_choose(NULL), &a, runner);
}

OrtStatus *us_op_compute(void *state, OrtKernelContext *context) {
    us_call c = {.self = state, .context = context};
    us_runner runner = {.run = run_in_session, .pool = &c};
    size_t present = 0;
    us_keep(&c, US_ORT(c.self->api, KernelContext_GetInputCount)(context, &present));
    const size_t inputs = us_op_input_count(&c.self->op->base);
    for (size_t i = 0; i < inputs && i < present && !c.status; i++) read_input(&c, i);
    if (c.status) return c.status;
    const char *wrong = NULL;
    us_pool_enter();
    wrong = c.self->op->compute(&c, &runner);
    us_pool_leave();
    us_keep(&c, runner.failure);
    if (wrong) us_keep(&c, us_refuse(c.self, wrong));
    return c.status;
}

/* A missing attribute is a status too: it is dropped and the default stays. */
int64_t us_int_attribute(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t value) {
    int64_t found = 0;
    OrtStatus *status = US_ORT(api, KernelInfoGetAttribute_int64)(info, name, &found);
    if (!status) return found;
    US_ORT(api, ReleaseStatus)(status);
    return value;
}

float us_float_attribute(const OrtApi *api, const OrtKernelInfo *info, const char *name, float value) {
    float found = 0;
    OrtStatus *status = US_ORT(api, KernelInfoGetAttribute_float)(info, name, &found);
    if (!status) return found;
    US_ORT(api, ReleaseStatus)(status);
    return value;
}

static OrtStatus *prepare_attention(us_kernel *self, const OrtKernelInfo *info) {
    return self->heads < 1 ? us_refuse(self, "the attribute num_heads must be at least 1") : NULL;
}

void us_op_destroy(void *state) {
    us_kernel *self = state;
    if (self->op->dismiss)
        self->op->dismiss(self);
    else
        free(self->own);
    us_free_weights(self->weights);
    free(self);
}

OrtStatus *us_op_create(const OrtCustomOp *base, const OrtApi *api, const OrtKernelInfo *info, void **state) {
    us_kernel *self = calloc(1, sizeof *self);
    if (!self) return US_ORT(api, CreateStatus)(ORT_FAIL, "out of memory for a kernel");
    self->api = api;
    self->op = (const us_op *)base;
    self->heads = us_int_attribute(api, info, "num_heads", 0);
    self->scale = us_float_attribute(api, info, "scale", 0.0f);
    self->epsilon = us_float_attribute(api, info, "epsilon", 1e-12f);
    self->rms = us_int_attribute(api, info, "rms", 0);
    self->approximate = us_int_attribute(api, info, "approximate", 0);
    self->zero_point = us_int_attribute(api, info, "zero_point", 128);
    self->per_row = us_int_attribute(api, info, "per_row", 0);
    OrtStatus *status = NULL;
    if (self->zero_point < 0 || self->zero_point > 255) status = us_refuse(self, "the attribute zero_point must be within 0..255");
    if (!status && self->op->prepare) status = self->op->prepare(self, info);
    if (status) {
        us_op_destroy(self);
        return status;
    }
    *state = self;
    return NULL;
}

const char *us_op_name(const OrtCustomOp *base) { return ((const us_op *)base)->name; }
const char *us_op_provider(const OrtCustomOp *base) { return "CPUExecutionProvider"; }
static OrtElementType type_of(char letter) {
    switch (letter | 0x20) {
    case 'i': return ORT_INT32;
    case 'l': return ORT_INT64;
    case 'u': return ORT_UINT8;
    case 's': return ORT_INT8;
    case 'w': return ORT_UINT16;
    case 't': return ORT_UNDEFINED; /* as ONNX Runtime writes "any" */
    default: return ORT_FLOAT;
    }
}
static OrtIoCharacteristic need_of(char letter) { return letter & 0x20 ? ORT_IO_REQUIRED : ORT_IO_OPTIONAL; }
size_t us_op_input_count(const OrtCustomOp *base) { return strlen(((const us_op *)base)->types); }
OrtElementType us_op_input_type(const OrtCustomOp *base, size_t index) { return type_of(((const us_op *)base)->types[index]); }
OrtIoCharacteristic us_op_input_need(const OrtCustomOp *base, size_t index) { return need_of(((const us_op *)base)->types[index]); }
size_t us_op_output_count(const OrtCustomOp *base) { return strlen(((const us_op *)base)->results); }
OrtElementType us_op_output_type(const OrtCustomOp *base, size_t index) { return type_of(((const us_op *)base)->results[index]); }
OrtIoCharacteristic us_op_output_need(const OrtCustomOp *base, size_t index) { return need_of(((const us_op *)base)->results[index]); }
int us_op_memory_type(const OrtCustomOp *base, size_t index) { return 0; }
int us_op_one(const OrtCustomOp *base) { return 1; }

static const us_op ops[] = {
    {US_OP_BASE, "PackedAttention", "fiFFF", "f", 0, compute_attention, prepare_attention, NULL},
    {US_OP_BASE, "PackedAttentionQ", "fiFFFf", "uF", 1, compute_attention, prepare_attention, NULL},
    {US_OP_BASE, "AddNorm", "fFFFfF", "f", 0, compute_norm, NULL, NULL},
    {US_OP_BASE, "AddNormQ", "fFFFfFf", "fuF", 1, compute_norm, NULL, NULL},
    {US_OP_BASE, "BiasGelu", "fFF", "f", 0, compute_gelu, NULL, NULL},
    {US_OP_BASE, "BiasGeluQ", "fFFf", "uF", 1, compute_gelu, NULL, NULL},
    {US_OP_BASE, "EmbedNorm", "llLffFfF", "f", 0, compute_embed, NULL, NULL},
    {US_OP_BASE, "EmbedNormQ", "llLffFfFf", "fuF", 1, compute_embed, NULL, NULL},
};

extern const us_op us_decoder_ops[];
extern const size_t us_decoder_op_count;

extern const us_op us_beam_ops[];
extern const size_t us_beam_op_count;

extern const us_op us_product_ops[];
extern const size_t us_product_op_count;

/* ONNX Runtime refers to the domain for as long as any session lives, so there is one for the process. */
static pthread_mutex_t domain_lock = PTHREAD_MUTEX_INITIALIZER;
static OrtCustomOpDomain *domain;

static OrtStatus *make_domain(const OrtApi *api) {
    OrtCustomOpDomain *made = NULL;
    OrtStatus *status = US_ORT(api, CreateCustomOpDomain)("understudy", &made);
    const us_op_list lists[] = {{ops, sizeof ops / sizeof *ops}, {us_product_ops, us_product_op_count}, {us_beam_ops, us_beam_op_count}, {us_decoder_ops, us_decoder_op_count}};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
        for (size_t j = 0; !status && j < lists[i].count; j++) status = US_ORT(api, CustomOpDomain_Add)(made, &lists[i].ops[j]);
    if (!status) domain = made;
    return status;
}

/* Found by ONNX Runtime under this very name. */
__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi *api = base->GetApi(US_ORT_API_VERSION);
    if (!api) {
        char text[200];
        snprintf(text, sizeof text, "understudy kernels need ONNX Runtime 1.%d or newer, this is %.40s", US_ORT_API_VERSION, base->GetVersionString());
        /* CreateStatus has had slot 0 since the first release. */
        const OrtApi *oldest = base->GetApi(1);
        return oldest ? US_ORT(oldest, CreateStatus)(ORT_FAIL, text) : NULL;
    }
    const char *why_not = NULL;
    if (!us_choose(&why_not)) return US_ORT(api, CreateStatus)(ORT_FAIL, why_not);
    pthread_mutex_lock(&domain_lock);
    OrtStatus *status = domain ? NULL : make_domain(api);
    pthread_mutex_unlock(&domain_lock);
    return status ? status : US_ORT(api, AddCustomOpDomain)(options, domain);
}
