/* The part of ONNX Runtime's C ABI that a custom operator needs.
 *
 * OrtApi is a table of function pointers to which releases only ever append, so a slot keeps its number and its signature for good. The
 * header itself is in no package, hence this file: slots are named by number and called through US_ORT(api, slot). Asking for API version
 * 17 (ONNX Runtime 1.17, the first with KernelContext_ParallelFor) makes GetApi return NULL on anything older.
 */
#ifndef UNDERSTUDY_ORT_ABI_H
#define UNDERSTUDY_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

enum { US_ORT_API_VERSION = 17, US_ORT_CUSTOM_OP_VERSION = 16 };

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef void (*OrtSlot)(void);
typedef OrtSlot OrtApi;  /* an OrtApi* is the address of slot 0 */

typedef struct {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

typedef enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 } OrtErrorCode;
typedef enum { ORT_UNDEFINED = 0, ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_UINT16 = 4, ORT_INT32 = 6, ORT_INT64 = 7 } OrtElementType;
typedef enum { ORT_IO_REQUIRED = 0, ORT_IO_OPTIONAL = 1 } OrtIoCharacteristic;

/* slot number, return type, arguments */
#define US_ORT_SLOTS(X)                                                                                        \
    X(CreateStatus, 0, OrtStatus *, (OrtErrorCode, const char *))                                              \
    X(CreateCustomOpDomain, 26, OrtStatus *, (const char *, OrtCustomOpDomain **))                             \
    X(CustomOpDomain_Add, 27, OrtStatus *, (OrtCustomOpDomain *, const void *))                                \
    X(AddCustomOpDomain, 28, OrtStatus *, (OrtSessionOptions *, OrtCustomOpDomain *))                          \
    X(GetTensorMutableData, 51, OrtStatus *, (OrtValue *, void **))                                            \
    X(GetTensorElementType, 60, OrtStatus *, (const OrtTensorTypeAndShapeInfo *, OrtElementType *))            \
    X(GetDimensionsCount, 61, OrtStatus *, (const OrtTensorTypeAndShapeInfo *, size_t *))                      \
    X(GetDimensions, 62, OrtStatus *, (const OrtTensorTypeAndShapeInfo *, int64_t *, size_t))                  \
    X(GetTensorTypeAndShape, 65, OrtStatus *, (const OrtValue *, OrtTensorTypeAndShapeInfo **))                \
    X(KernelInfoGetAttribute_float, 85, OrtStatus *, (const OrtKernelInfo *, const char *, float *))           \
    X(KernelInfoGetAttribute_int64, 86, OrtStatus *, (const OrtKernelInfo *, const char *, int64_t *))         \
    X(KernelContext_GetInputCount, 88, OrtStatus *, (const OrtKernelContext *, size_t *))                      \
    X(KernelContext_GetOutputCount, 89, OrtStatus *, (const OrtKernelContext *, size_t *))                     \
    X(KernelContext_GetInput, 90, OrtStatus *, (const OrtKernelContext *, size_t, const OrtValue **))          \
    X(KernelContext_GetOutput, 91, OrtStatus *,                                                                \
      (OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **))                                      \
    X(ReleaseStatus, 93, void, (OrtStatus *))                                                                  \
    X(ReleaseTensorTypeAndShapeInfo, 99, void, (OrtTensorTypeAndShapeInfo *))                                  \
    X(KernelInfoGetConstantInput_tensor, 249, OrtStatus *, (const OrtKernelInfo *, size_t, int *, const OrtValue **)) \
    X(KernelContext_ParallelFor, 274, OrtStatus *,                                                             \
      (const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, void *))

enum {
#define X(name, slot, result, args) US_SLOT_##name = slot,
    US_ORT_SLOTS(X)
#undef X
};
#define X(name, slot, result, args) typedef result(*us_fn_##name) args;
US_ORT_SLOTS(X)
#undef X
#define US_ORT(api, name) ((us_fn_##name)(api)[US_SLOT_##name])

/* As of version 16. Members after the four variadic getters may be NULL when `version` says that they exist. */
typedef struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const struct OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
    const char *(*GetName)(const struct OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const struct OrtCustomOp *);
    OrtElementType (*GetInputType)(const struct OrtCustomOp *, size_t);
    size_t (*GetInputTypeCount)(const struct OrtCustomOp *);
    OrtElementType (*GetOutputType)(const struct OrtCustomOp *, size_t);
    size_t (*GetOutputTypeCount)(const struct OrtCustomOp *);
    void (*KernelCompute)(void *, OrtKernelContext *);
    void (*KernelDestroy)(void *);
    OrtIoCharacteristic (*GetInputCharacteristic)(const struct OrtCustomOp *, size_t);
    OrtIoCharacteristic (*GetOutputCharacteristic)(const struct OrtCustomOp *, size_t);
    int (*GetInputMemoryType)(const struct OrtCustomOp *, size_t);
    int (*GetVariadicInputMinArity)(const struct OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const struct OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const struct OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const struct OrtCustomOp *);
    OrtStatus *(*CreateKernelV2)(const struct OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
    OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
    void *later[8];  /* InferOutputShapeFn and what follows it: read only for a higher `version` */
} OrtCustomOp;

#endif
