/* The operators as ONNX Runtime sees them: descriptions, reading of inputs, shape checks, and the registration. */
#include "ops.h"
#include "ort_abi.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

typedef enum { ATTENTION, NORM, GELU, EMBED, GEMM } op_kind;
enum { MOST_INPUTS = 9 };

typedef struct {
    OrtCustomOp base; /* first: ONNX Runtime hands back a pointer to it */
    const char *name;
    op_kind kind;
    int quantized;
    size_t inputs;
    const char *types; /* one letter an input: f float, i int32, l int64, u uint8, s int8; lower case required, upper case optional */
} op;

typedef struct {
    const OrtApi *api;
    const op *op;
    float scale, epsilon;
    int64_t heads, rms, approximate, zero_point, per_row;
    us_weights *weights; /* of a product */
} kernel;

/* One input: data is NULL when it is absent. Shapes beyond rank 2 keep their rank and lose their sizes. */
typedef struct { void *data; size_t rank; int64_t dims[2]; } tensor;

typedef struct {
    const kernel *self;
    OrtKernelContext *context;
    tensor in[MOST_INPUTS];
    OrtStatus *status; /* the first that a call returned */
} call;

static OrtStatus *refuse(const kernel *self, const char *why) {
    char text[400];
    snprintf(text, sizeof text, "%s: %s", self->op->name, why);
    return US_ORT(self->api, CreateStatus)(ORT_INVALID_ARGUMENT, text);
}

static void keep(call *c, OrtStatus *status) {
    if (!c->status)
        c->status = status;
    else if (status)
        US_ORT(c->self->api, ReleaseStatus)(status);
}

static void read_input(call *c, size_t index) {
    const OrtApi *api = c->self->api;
    const OrtValue *value = NULL;
    OrtTensorTypeAndShapeInfo *info = NULL;
    tensor *t = &c->in[index];
    keep(c, US_ORT(api, KernelContext_GetInput)(c->context, index, &value));
    if (c->status || !value) return;
    keep(c, US_ORT(api, GetTensorTypeAndShape)(value, &info));
    if (c->status) return;
    keep(c, US_ORT(api, GetDimensionsCount)(info, &t->rank));
    if (t->rank <= 2) keep(c, US_ORT(api, GetDimensions)(info, t->dims, t->rank));
    US_ORT(api, ReleaseTensorTypeAndShapeInfo)(info);
    keep(c, US_ORT(api, GetTensorMutableData)((OrtValue *)value, &t->data));
    /* An empty tensor may have no address, and NULL means absent here. */
    static float nothing[1];
    if (!t->data) t->data = nothing;
}

static void *output(call *c, size_t index, size_t rank, int64_t rows, int64_t cols) {
    const int64_t dims[2] = {rows, cols};
    OrtValue *value = NULL;
    void *data = NULL;
    size_t count = 0;
    keep(c, US_ORT(c->self->api, KernelContext_GetOutputCount)(c->context, &count));
    if (c->status || index >= count) return NULL;
    keep(c, US_ORT(c->self->api, KernelContext_GetOutput)(c->context, index, dims, rank, &value));
    if (c->status || !value) return NULL;
    keep(c, US_ORT(c->self->api, GetTensorMutableData)(value, &data));
    static float nothing[1];
    return data ? data : nothing;
}

/* The shapes that an input must have: rank 1 with `a` elements, or rank 2 with a x b. -1 takes any size. */
static int fits(call *c, size_t index, const char *name, size_t rank, int64_t a, int64_t b) {
    const tensor *t = &c->in[index];
    if (!t->data || c->status) return !c->status;
    if (t->rank == rank && (a < 0 || t->dims[0] == a) && (rank < 2 || b < 0 || t->dims[1] == b)) return 1;
    char seen[64];
    if (t->rank == 1)
        snprintf(seen, sizeof seen, "[%lld]", (long long)t->dims[0]);
    else if (t->rank == 2)
        snprintf(seen, sizeof seen, "[%lld, %lld]", (long long)t->dims[0], (long long)t->dims[1]);
    else
        snprintf(seen, sizeof seen, "rank %zu", t->rank);
    keep(c, refuse(c->self, us_message("%s has shape %s, expected rank %zu with [%lld, %lld] (-1: any, unused in rank 1)", name, seen, rank, (long long)a, (long long)b)));
    return 0;
}

/* Operators that compute at this moment, over all sessions: about the number of runs. */
static atomic_int computing;
static atomic_int pool_threads;

/* Sets how many threads the shared pool has; 0, as long as nobody says: not known, every operator may use all. */
__attribute__((visibility("default"))) void us_share_threads(int threads) { atomic_store(&pool_threads, threads); }

/* ParallelFor runs on the session's own pool; without one (a single thread) it runs in place. Runs that go on at the same time share the
   threads: where each has one or none, splitting would only add waiting. */
static void *run_in_session(void *pool, void (*task)(void *, size_t), size_t count, void *data) {
    const call *c = pool;
    const int threads = atomic_load_explicit(&pool_threads, memory_order_relaxed);
    const int runs = atomic_load_explicit(&computing, memory_order_relaxed);
    const int share = threads > 0 && runs > 1 ? threads / runs : 0;
    if (threads > 0 && runs > 1 && share < 2) {
        for (size_t i = 0; i < count; i++) task(data, i);
        return NULL;
    }
    return US_ORT(c->self->api, KernelContext_ParallelFor)(c->context, task, count, (size_t)share, data);
}

static us_quant quant_outputs(call *c, size_t mult, size_t first_output, int64_t rows, int64_t cols) {
    us_quant quant = {.zero_point = (int32_t)c->self->zero_point, .per_row = (int32_t)c->self->per_row};
    if (!c->self->op->quantized || !fits(c, mult, "mult", 1, cols, 0)) return quant;
    quant.mult = c->in[mult].data;
    quant.q = output(c, first_output, 2, rows, cols);
    if (quant.per_row) {
        quant.scale = output(c, first_output + 1, 1, rows, 0);
        if (!quant.scale && !c->status) keep(c, refuse(c->self, "per_row = 1 needs the output out_scale"));
    }
    return quant;
}

static const char *compute_attention(call *c, us_runner *runner) {
    const tensor *in = c->in;
    if (!fits(c, 0, "qkv", 2, -1, -1) || !fits(c, 1, "cu_seqlens", 1, -1, 0)) return NULL;
    const int64_t tokens = in[0].dims[0], columns = in[0].dims[1], heads = c->self->heads;
    if (columns < 3 || columns % 3) return us_message("qkv has %lld columns; expected Q | K | V of equal width", (long long)columns);
    if (in[1].dims[0] < 1) return "cu_seqlens is empty; expected one entry more than there are sequences";
    if (!fits(c, 2, "row_scale", 1, tokens, 0) || !fits(c, 3, "bias", 1, columns, 0) || !fits(c, 4, "rel_bias", 2, heads, -1)) return NULL;
    if (in[4].data && in[4].dims[1] % 2 == 0) return us_message("rel_bias has %lld columns; expected an odd number", (long long)in[4].dims[1]);
    us_attention_args a = {.qkv = in[0].data, .cu = in[1].data, .row_scale = in[2].data, .bias = in[3].data, .rel_bias = in[4].data,
                           .tokens = tokens, .sequences = in[1].dims[0] - 1, .hidden = columns / 3, .heads = heads,
                           .rel_span = in[4].data ? (in[4].dims[1] + 1) / 2 : 0, .scale = c->self->scale};
    if (c->self->op->quantized)
        a.quant = quant_outputs(c, 5, 0, tokens, a.hidden);
    else
        a.out = output(c, 0, 2, tokens, a.hidden);
    return c->status ? NULL : us_attention(us_choose(NULL), &a, runner);
}

static const char *compute_norm(call *c, us_runner *runner) {
    const tensor *in = c->in;
    if (!fits(c, 0, "x", 2, -1, -1)) return NULL;
    const int64_t rows = in[0].dims[0], cols = in[0].dims[1];
    if (!fits(c, 1, "row_scale", 1, rows, 0) || !fits(c, 2, "bias", 1, cols, 0) || !fits(c, 3, "residual", 2, rows, cols) ||
        !fits(c, 4, "gamma", 1, cols, 0) || !fits(c, 5, "beta", 1, cols, 0))
        return NULL;
    us_norm_args a = {.x = in[0].data, .row_scale = in[1].data, .bias = in[2].data, .residual = in[3].data, .gamma = in[4].data,
                      .beta = in[5].data, .rows = rows, .cols = cols, .epsilon = c->self->epsilon, .rms = (int32_t)c->self->rms};
    a.y = output(c, 0, 2, rows, cols);
    a.quant = quant_outputs(c, 6, 1, rows, cols);
    return c->status ? NULL : us_norm(us_choose(NULL), &a, runner);
}

static const char *compute_gelu(call *c, us_runner *runner) {
    const tensor *in = c->in;
    if (!fits(c, 0, "x", 2, -1, -1)) return NULL;
    const int64_t rows = in[0].dims[0], cols = in[0].dims[1];
    if (!fits(c, 1, "row_scale", 1, rows, 0) || !fits(c, 2, "bias", 1, cols, 0)) return NULL;
    us_gelu_args a = {.x = in[0].data, .row_scale = in[1].data, .bias = in[2].data, .rows = rows, .cols = cols,
                      .approximate = (int32_t)c->self->approximate};
    if (c->self->op->quantized)
        a.quant = quant_outputs(c, 3, 0, rows, cols);
    else
        a.y = output(c, 0, 2, rows, cols);
    return c->status ? NULL : us_gelu(us_choose(NULL), &a, runner);
}

static const char *compute_embed(call *c, us_runner *runner) {
    const tensor *in = c->in;
    if (!fits(c, 0, "input_ids", 1, -1, 0) || !fits(c, 3, "word", 2, -1, -1)) return NULL;
    const int64_t rows = in[0].dims[0], cols = in[3].dims[1];
    if (!fits(c, 1, "position_ids", 1, rows, 0) || !fits(c, 2, "token_type_ids", 1, rows, 0) || !fits(c, 4, "position", 2, -1, cols) ||
        !fits(c, 5, "token_type", 2, -1, cols) || !fits(c, 6, "gamma", 1, cols, 0) || !fits(c, 7, "beta", 1, cols, 0))
        return NULL;
    us_embed_args a = {.ids = in[0].data, .positions = in[1].data, .types = in[2].data, .word = in[3].data, .position = in[4].data,
                       .type = in[5].data, .gamma = in[6].data, .beta = in[7].data, .rows = rows, .cols = cols, .words = in[3].dims[0],
                       .max_positions = in[4].dims[0], .type_count = in[5].data ? in[5].dims[0] : 0, .epsilon = c->self->epsilon};
    a.y = output(c, 0, 2, rows, cols);
    a.quant = quant_outputs(c, 8, 1, rows, cols);
    return c->status ? NULL : us_embed(us_choose(NULL), &a, runner);
}

static const char *compute_gemm(call *c, us_runner *runner) {
    const tensor *in = c->in;
    const us_weights *w = c->self->weights;
    if (!fits(c, 0, "a", 2, -1, w->depth) || !fits(c, 3, "b_scale", 1, w->cols, 0)) return NULL;
    if (in[2].rank > 1 || in[4].rank > 1 || (in[2].rank && in[2].dims[0] != 1) || (in[4].rank && in[4].dims[0] != 1))
        return "a_scale and a_zero_point must be scalars";
    us_gemm_args a = {.a = in[0].data, .weights = w, .b_scale = in[3].data, .rows = in[0].dims[0], .depth = w->depth, .cols = w->cols,
                      .a_scale = *(const float *)in[2].data, .a_zero = *(const uint8_t *)in[4].data};
    a.y = output(c, 0, 2, a.rows, a.cols);
    return c->status ? NULL : us_gemm(us_choose(NULL), &a, runner);
}

static OrtStatus *compute(void *state, OrtKernelContext *context) {
    call c = {.self = state, .context = context};
    us_runner runner = {.run = run_in_session, .pool = &c};
    size_t present = 0;
    keep(&c, US_ORT(c.self->api, KernelContext_GetInputCount)(context, &present));
    for (size_t i = 0; i < c.self->op->inputs && i < present && !c.status; i++) read_input(&c, i);
    if (c.status) return c.status;
    const char *wrong = NULL;
    atomic_fetch_add_explicit(&computing, 1, memory_order_relaxed);
    switch (c.self->op->kind) {
    case ATTENTION: wrong = compute_attention(&c, &runner); break;
    case NORM: wrong = compute_norm(&c, &runner); break;
    case GELU: wrong = compute_gelu(&c, &runner); break;
    case EMBED: wrong = compute_embed(&c, &runner); break;
    case GEMM: wrong = compute_gemm(&c, &runner); break;
    }
    atomic_fetch_sub_explicit(&computing, 1, memory_order_relaxed);
    keep(&c, runner.failure);
    if (wrong) keep(&c, refuse(c.self, wrong));
    return c.status;
}

/* A missing attribute is a status too: it is dropped and the default stays. */
static int64_t int_attribute(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t value) {
    int64_t found = 0;
    OrtStatus *status = US_ORT(api, KernelInfoGetAttribute_int64)(info, name, &found);
    if (!status) return found;
    US_ORT(api, ReleaseStatus)(status);
    return value;
}

static float float_attribute(const OrtApi *api, const OrtKernelInfo *info, const char *name, float value) {
    float found = 0;
    OrtStatus *status = US_ORT(api, KernelInfoGetAttribute_float)(info, name, &found);
    if (!status) return found;
    US_ORT(api, ReleaseStatus)(status);
    return value;
}

/* The weights are packed once, here; that is why they must be constant. */
static OrtStatus *pack_weights(kernel *self, const OrtKernelInfo *info) {
    const OrtApi *api = self->api;
    const OrtValue *value = NULL;
    OrtTensorTypeAndShapeInfo *shape = NULL;
    int constant = 0;
    size_t rank = 0;
    int64_t dims[2] = {0};
    void *data = NULL;
    OrtStatus *status = US_ORT(api, KernelInfoGetConstantInput_tensor)(info, 1, &constant, &value);
    if (status) return status;
    if (!constant || !value) return refuse(self, "b must be an initializer");
    status = US_ORT(api, GetTensorTypeAndShape)(value, &shape);
    if (status) return status;
    status = US_ORT(api, GetDimensionsCount)(shape, &rank);
    if (!status && rank == 2) status = US_ORT(api, GetDimensions)(shape, dims, 2);
    US_ORT(api, ReleaseTensorTypeAndShapeInfo)(shape);
    if (!status) status = US_ORT(api, GetTensorMutableData)((OrtValue *)value, &data);
    if (status) return status;
    if (rank != 2 || dims[0] < 1 || dims[1] < 1) return refuse(self, "b must be a matrix with at least one element");
    self->weights = us_choose(NULL)->pack(data, dims[0], dims[1]);
    return self->weights ? NULL : refuse(self, "out of memory for the packed weights");
}

static void destroy(void *state) {
    kernel *self = state;
    us_free_weights(self->weights);
    free(self);
}

static OrtStatus *create(const OrtCustomOp *base, const OrtApi *api, const OrtKernelInfo *info, void **state) {
    kernel *self = calloc(1, sizeof *self);
    if (!self) return US_ORT(api, CreateStatus)(ORT_FAIL, "out of memory for a kernel");
    self->api = api;
    self->op = (const op *)base;
    self->heads = int_attribute(api, info, "num_heads", 0);
    self->scale = float_attribute(api, info, "scale", 0.0f);
    self->epsilon = float_attribute(api, info, "epsilon", 1e-12f);
    self->rms = int_attribute(api, info, "rms", 0);
    self->approximate = int_attribute(api, info, "approximate", 0);
    self->zero_point = int_attribute(api, info, "zero_point", 128);
    self->per_row = int_attribute(api, info, "per_row", 0);
    OrtStatus *status = NULL;
    if (self->op->kind == ATTENTION && self->heads < 1) status = refuse(self, "the attribute num_heads must be at least 1");
    if (self->zero_point < 0 || self->zero_point > 255) status = refuse(self, "the attribute zero_point must be within 0..255");
    if (!status && self->op->kind == GEMM) status = pack_weights(self, info);
    if (status) {
        destroy(self);
        return status;
    }
    *state = self;
    return NULL;
}

static const char *op_name(const OrtCustomOp *base) { return ((const op *)base)->name; }
static const char *provider(const OrtCustomOp *base) { return "CPUExecutionProvider"; }
static size_t input_count(const OrtCustomOp *base) { return ((const op *)base)->inputs; }
static OrtElementType input_type(const OrtCustomOp *base, size_t index) {
    switch (((const op *)base)->types[index] | 0x20) {
    case 'i': return ORT_INT32;
    case 'l': return ORT_INT64;
    case 'u': return ORT_UINT8;
    case 's': return ORT_INT8;
    default: return ORT_FLOAT;
    }
}
static OrtIoCharacteristic input_need(const OrtCustomOp *base, size_t index) {
    return ((const op *)base)->types[index] & 0x20 ? ORT_IO_REQUIRED : ORT_IO_OPTIONAL;
}
/* Outputs: [y float unless the op's only product is quantized], q, out_scale */
static size_t floats_first(const op *o) { return !o->quantized || o->kind == NORM || o->kind == EMBED; }
static size_t output_count(const OrtCustomOp *base) {
    const op *o = (const op *)base;
    return floats_first(o) + (o->quantized ? 2 : 0);
}
static OrtElementType output_type(const OrtCustomOp *base, size_t index) {
    return index == floats_first((const op *)base) ? ORT_UINT8 : ORT_FLOAT;
}
static OrtIoCharacteristic output_need(const OrtCustomOp *base, size_t index) {
    return index > floats_first((const op *)base) ? ORT_IO_OPTIONAL : ORT_IO_REQUIRED;
}
static int memory_type(const OrtCustomOp *base, size_t index) { return 0; }
static int one(const OrtCustomOp *base) { return 1; }

#define BASE                                                                                                                     \
    {.version = US_ORT_CUSTOM_OP_VERSION, .GetName = op_name, .GetExecutionProviderType = provider, .GetInputType = input_type,  \
     .GetInputTypeCount = input_count, .GetOutputType = output_type, .GetOutputTypeCount = output_count, .KernelDestroy = destroy,  \
     .GetInputCharacteristic = input_need, .GetOutputCharacteristic = output_need, .GetInputMemoryType = memory_type,            \
     .GetVariadicInputMinArity = one, .GetVariadicInputHomogeneity = one, .GetVariadicOutputMinArity = one,                      \
     .GetVariadicOutputHomogeneity = one, .CreateKernelV2 = create, .KernelComputeV2 = compute}

static const op ops[] = {
    {BASE, "PackedAttention", ATTENTION, 0, 5, "fiFFF"},
    {BASE, "PackedAttentionQ", ATTENTION, 1, 6, "fiFFFf"},
    {BASE, "AddNorm", NORM, 0, 6, "fFFFfF"},
    {BASE, "AddNormQ", NORM, 1, 7, "fFFFfFf"},
    {BASE, "BiasGelu", GELU, 0, 3, "fFF"},
    {BASE, "BiasGeluQ", GELU, 1, 4, "fFFf"},
    {BASE, "EmbedNorm", EMBED, 0, 8, "llLffFfF"},
    {BASE, "EmbedNormQ", EMBED, 1, 9, "llLffFfFf"},
    {BASE, "Int8Gemm", GEMM, 0, 5, "usffu"},
};

/* ONNX Runtime refers to the domain for as long as any session lives, so there is one for the process. */
static pthread_mutex_t domain_lock = PTHREAD_MUTEX_INITIALIZER;
static OrtCustomOpDomain *domain;

static OrtStatus *make_domain(const OrtApi *api) {
    OrtCustomOpDomain *made = NULL;
    OrtStatus *status = US_ORT(api, CreateCustomOpDomain)("understudy", &made);
    for (size_t i = 0; !status && i < sizeof ops / sizeof *ops; i++) status = US_ORT(api, CustomOpDomain_Add)(made, &ops[i]);
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
