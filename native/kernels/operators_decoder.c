/* The operators between the products of a decoder graph, as ONNX Runtime sees them. */
#include "decoder.h"
#include "operators.h"

#include <stdlib.h>

/* Attributes that these operators do not share with the encoders'. */
typedef struct {
    int64_t layer, kv_heads, window, kv_dtype, page, rotary, kind;
    float softcap, multiplier;
} attributes;

static OrtStatus *prepare(us_kernel *self, const OrtKernelInfo *info) {
    const OrtApi *api = self->api;
    attributes *own = self->own = malloc(sizeof *own);
    if (!own) return us_refuse(self, "out of memory for a kernel");
    *own = (attributes){
        .layer = us_int_attribute(api, info, "layer", 0),
        .kv_heads = us_int_attribute(api, info, "kv_heads", self->heads),
        .window = us_int_attribute(api, info, "window", 0),
        .kv_dtype = us_int_attribute(api, info, "kv_dtype", 0),
        .page = us_int_attribute(api, info, "page", US_PAGE),
        .rotary = us_int_attribute(api, info, "rotary", 1),
        .kind = us_int_attribute(api, info, "kind", 0),
        .softcap = us_float_attribute(api, info, "softcap", 0.0f),
        .multiplier = us_float_attribute(api, info, "multiplier", 1.0f),
    };
    if (own->kind < US_SILU || own->kind > US_GELU_ERF) return us_refuse(self, "the attribute kind must be 0 (silu), 1 (gelu by tanh) or 2 (gelu by erf)");
    return NULL;
}

static OrtStatus *prepare_paged(us_kernel *self, const OrtKernelInfo *info) {
    OrtStatus *status = prepare(self, info);
    const attributes *own = self->own;
    if (status) return status;
    if (self->heads < 1 || own->kv_heads < 1 || self->heads % own->kv_heads)
        return us_refuse(self, "the attribute num_heads must be at least 1 and a multiple of kv_heads");
    if (own->page != US_PAGE) return us_refuse(self, "the attribute page must be 16");
    if (own->kv_dtype < US_KV_FLOAT32 || own->kv_dtype > US_KV_INT8) return us_refuse(self, "the attribute kv_dtype must be 0 (float32), 1 (bfloat16) or 2 (int8)");
    if (own->window < 0 || !(own->softcap >= 0)) return us_refuse(self, "the attributes window and softcap must be 0 (none) or more");
    return NULL;
}

static const char *compute_tokens(us_call *c, us_runner *runner) {
    const us_tensor *in = c->in;
    if (!us_fits(c, 0, "input_ids", 1, -1, 0) || !us_fits(c, 1, "table", 2, -1, -1) || !us_fits(c, 2, "extra_rows", 2, -1, in[1].dims[1])) return NULL;
    if (in[1].type != ORT_FLOAT && in[1].type != ORT_UINT16) return "table must be float32, or bfloat16 as uint16";
    us_tokens_args a = {.ids = in[0].data, .table = in[1].data, .extra = in[2].data, .rows = in[0].dims[0], .cols = in[1].dims[1],
                        .words = in[1].dims[0], .extra_rows = in[2].data ? in[2].dims[0] : 0,
                        .multiplier = ((const attributes *)c->self->own)->multiplier, .bfloat16 = in[1].type == ORT_UINT16};
    a.y = us_output(c, 0, 2, a.rows, a.cols);
    return c->status ? NULL : us_tokens(us_choose(NULL), &a, runner);
}

static const char *compute_skip(us_call *c, us_runner *runner) {
    const us_tensor *in = c->in;
    if (!us_fits(c, 0, "x", 2, -1, -1)) return NULL;
    const int64_t rows = in[0].dims[0], cols = in[0].dims[1];
    if (!us_fits(c, 1, "row_scale", 1, rows, 0) || !us_fits(c, 2, "bias", 1, cols, 0) || !us_fits(c, 3, "residual", 2, rows, cols) ||
        !us_fits(c, 4, "inner_gamma", 1, cols, 0) || !us_fits(c, 5, "gamma", 1, cols, 0))
        return NULL;
    us_skip_args a = {.x = in[0].data, .row_scale = in[1].data, .bias = in[2].data, .residual = in[3].data, .inner = in[4].data,
                      .gamma = in[5].data, .rows = rows, .cols = cols, .epsilon = c->self->epsilon};
    a.s = us_output(c, 0, 2, rows, cols);
    if (c->self->op->quantized)
        a.quant = us_quant_outputs(c, 6, 1, rows, cols);
    else
        a.y = us_output(c, 1, 2, rows, cols);
    return c->status ? NULL : us_skip(us_choose(NULL), &a, runner);
}

static const char *compute_gated(us_call *c, us_runner *runner) {
    const us_tensor *in = c->in;
    if (!us_fits(c, 0, "x", 2, -1, -1)) return NULL;
    const int64_t rows = in[0].dims[0], wide = in[0].dims[1];
    if (wide % 2) return us_message("x has %lld columns; expected gate | up of equal width", (long long)wide);
    if (!us_fits(c, 1, "row_scale", 1, rows, 0) || !us_fits(c, 2, "bias", 1, wide, 0)) return NULL;
    us_gated_args a = {.x = in[0].data, .row_scale = in[1].data, .bias = in[2].data, .rows = rows, .cols = wide / 2,
                       .kind = (int32_t)((const attributes *)c->self->own)->kind};
    if (c->self->op->quantized)
        a.quant = us_quant_outputs(c, 3, 0, rows, a.cols);
    else
        a.y = us_output(c, 0, 2, rows, a.cols);
    return c->status ? NULL : us_gated(us_choose(NULL), &a, runner);
}

static int paged_shapes_fit(us_call *c, int64_t tokens, int64_t columns, int64_t dim) {
    const us_tensor *in = c->in;
    const attributes *own = c->self->own;
    if (!us_fits(c, 1, "cu_seqlens", 1, -1, 0)) return 0;
    if (in[1].dims[0] < 1) {
        us_keep(c, us_refuse(c->self, "cu_seqlens is empty; expected one entry more than there are sequences"));
        return 0;
    }
    if (own->rotary && (!in[5].data || !in[6].data)) {
        us_keep(c, us_refuse(c->self, "rotary = 1 needs the inputs cos and sin"));
        return 0;
    }
    const int64_t sequences = in[1].dims[0] - 1;
    return us_fits(c, 2, "past_lens", 1, sequences, 0) && us_fits(c, 3, "block_table", 2, sequences, -1) && us_fits(c, 4, "kv_pool", 3, -1, -1) &&
           us_fits(c, 5, "cos", 2, -1, -1) && us_fits(c, 6, "sin", 2, in[5].dims[0], in[5].dims[1]) && us_fits(c, 7, "row_scale", 1, tokens, 0) &&
           us_fits(c, 8, "bias", 1, columns, 0) && us_fits(c, 9, "q_gamma", 1, dim, 0) && us_fits(c, 10, "k_gamma", 1, dim, 0);
}

static const char *compute_paged(us_call *c, us_runner *runner) {
    const us_tensor *in = c->in;
    const attributes *own = c->self->own;
    const int64_t heads = c->self->heads, all_heads = heads + 2 * own->kv_heads;
    if (!us_fits(c, 0, "qkv", 2, -1, -1)) return NULL;
    const int64_t tokens = in[0].dims[0], columns = in[0].dims[1], dim = columns / all_heads;
    if (columns < 1 || columns % all_heads)
        return us_message("qkv has %lld columns; expected a multiple of the %lld heads of Q, K and V", (long long)columns, (long long)all_heads);
    if (!paged_shapes_fit(c, tokens, columns, dim)) return NULL;
    us_paged_args a = {.qkv = in[0].data, .cu = in[1].data, .past = in[2].data, .table = in[3].data, .pool = in[4].data,
                       .cos = own->rotary ? in[5].data : NULL, .sin = own->rotary ? in[6].data : NULL, .row_scale = in[7].data, .bias = in[8].data,
                       .q_gamma = in[9].data, .k_gamma = in[10].data, .tokens = tokens, .sequences = in[1].dims[0] - 1, .width = in[3].dims[1],
                       .layers = in[4].dims[0], .pages = in[4].dims[1], .page_bytes = in[4].dims[2], .positions = in[5].dims[0], .half = in[5].dims[1],
                       .heads = heads, .kv_heads = own->kv_heads, .dim = dim, .layer = own->layer, .window = own->window, .scale = c->self->scale,
                       .softcap = own->softcap, .epsilon = c->self->epsilon, .kv_dtype = (int32_t)own->kv_dtype};
    if (c->self->op->quantized)
        a.quant = us_quant_outputs(c, 11, 0, tokens, heads * dim);
    else
        a.out = us_output(c, 0, 2, tokens, heads * dim);
    return c->status ? NULL : us_paged(us_choose(NULL), &a, runner);
}

const us_op us_decoder_ops[] = {
    {US_OP_BASE, "EmbedTokens", "ltF", "f", 0, compute_tokens, prepare, NULL},
    {US_OP_BASE, "SkipNorm", "fFFFFf", "FF", 0, compute_skip, prepare, NULL},
    {US_OP_BASE, "SkipNormQ", "fFFFFff", "FuF", 1, compute_skip, prepare, NULL},
    {US_OP_BASE, "GatedAct", "fFF", "f", 0, compute_gated, prepare, NULL},
    {US_OP_BASE, "GatedActQ", "fFFf", "uF", 1, compute_gated, prepare, NULL},
    {US_OP_BASE, "PagedAttention", "fiiiuFFFFFF", "f", 0, compute_paged, prepare_paged, NULL},
    {US_OP_BASE, "PagedAttentionQ", "fiiiuFFFFFFf", "uF", 1, compute_paged, prepare_paged, NULL},
};

const size_t us_decoder_op_count = sizeof us_decoder_ops / sizeof *us_decoder_ops;
