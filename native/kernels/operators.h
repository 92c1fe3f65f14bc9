/* What the files of operators share: how one is described to ONNX Runtime, and how its inputs, outputs and attributes are read. */
#ifndef UNDERSTUDY_OPERATORS_H
#define UNDERSTUDY_OPERATORS_H

#include "ops.h"
#include "ort_abi.h"

enum { MOST_INPUTS = 12, MOST_RANK = 3 };

typedef struct us_op us_op;

/* One node of a graph. */
typedef struct {
    const OrtApi *api;
    const us_op *op;
    float scale, epsilon;
    int64_t heads, rms, approximate, zero_point, per_row;
    us_weights *weights; /* of a product */
    void *own;           /* what the operator's prepare made; freed by its dismiss, or by free */
} us_kernel;

/* One input: data is NULL when it is absent. Shapes beyond MOST_RANK keep their rank and lose their sizes; a scalar has rank 0. */
typedef struct { void *data; size_t rank; int64_t dims[MOST_RANK]; OrtElementType type; } us_tensor;

/* One run of a node. */
typedef struct {
    const us_kernel *self;
    OrtKernelContext *context;
    us_tensor in[MOST_INPUTS];
    OrtStatus *status; /* the first that a call returned */
} us_call;

/* types, results: one letter an input or output: f float, i int32, l int64, u uint8, s int8, w uint16, t any; lower case required, upper
 * case optional. */
struct us_op {
    OrtCustomOp base; /* first: ONNX Runtime hands back a pointer to it */
    const char *name;
    const char *types, *results;
    int quantized; /* has mult, q and out_scale */
    const char *(*compute)(us_call *, us_runner *);               /* NULL, or what is wrong; c->status says it too */
    OrtStatus *(*prepare)(us_kernel *, const OrtKernelInfo *); /* may be NULL; after the attributes that all share were read */
    void (*dismiss)(us_kernel *);                              /* may be NULL: `own` is freed */
};

typedef struct { const us_op *ops; size_t count; } us_op_list;

/* Fills `base`; every table of operators begins its entries with it. */
#define US_OP_BASE                                                                                                                  \
    {.version = US_ORT_CUSTOM_OP_VERSION, .GetName = us_op_name, .GetExecutionProviderType = us_op_provider,                        \
     .GetInputType = us_op_input_type, .GetInputTypeCount = us_op_input_count, .GetOutputType = us_op_output_type,                  \
     .GetOutputTypeCount = us_op_output_count, .KernelDestroy = us_op_destroy, .GetInputCharacteristic = us_op_input_need,          \
     .GetOutputCharacteristic = us_op_output_need, .GetInputMemoryType = us_op_memory_type, .GetVariadicInputMinArity = us_op_one,  \
     .GetVariadicInputHomogeneity = us_op_one, .GetVariadicOutputMinArity = us_op_one, .GetVariadicOutputHomogeneity = us_op_one,   \
     .CreateKernelV2 = us_op_create, .KernelComputeV2 = us_op_compute}

const char *us_op_name(const OrtCustomOp *);
const char *us_op_provider(const OrtCustomOp *);
size_t us_op_input_count(const OrtCustomOp *);
OrtElementType us_op_input_type(const OrtCustomOp *, size_t);
OrtIoCharacteristic us_op_input_need(const OrtCustomOp *, size_t);
size_t us_op_output_count(const OrtCustomOp *);
OrtElementType us_op_output_type(const OrtCustomOp *, size_t);
OrtIoCharacteristic us_op_output_need(const OrtCustomOp *, size_t);
int us_op_memory_type(const OrtCustomOp *, size_t);
int us_op_one(const OrtCustomOp *);
void us_op_destroy(void *);
OrtStatus *us_op_create(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
OrtStatus *us_op_compute(void *, OrtKernelContext *);

/* An INVALID_ARGUMENT with the operator's name before `why`. */
OrtStatus *us_refuse(const us_kernel *, const char *why);
/* Keeps the first status of a call, drops the others. */
void us_keep(us_call *, OrtStatus *);
/* The shapes that an input must have: rank 1 with `a` elements, or rank 2 or more that begins a x b. -1 takes any size. 0 and a status
 * where they differ; an absent input fits. */
int us_fits(us_call *, size_t index, const char *name, size_t rank, int64_t a, int64_t b);
/* The output's data, NULL where the graph does not want it. Rank 1 or 2. */
void *us_output(us_call *, size_t index, size_t rank, int64_t rows, int64_t cols);
/* Of an operator with `quantized`: input `mult`, outputs q and out_scale from `first_output` on. */
us_quant us_quant_outputs(us_call *, size_t mult, size_t first_output, int64_t rows, int64_t cols);
int64_t us_int_attribute(const OrtApi *, const OrtKernelInfo *, const char *name, int64_t missing);
float us_float_attribute(const OrtApi *, const OrtKernelInfo *, const char *name, float missing);

#endif
