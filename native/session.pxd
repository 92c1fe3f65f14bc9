"""What `native.session` uses of ONNX Runtime's C API and of the loader: signatures, and numbers of slots in OrtApi."""

from libc.stdint cimport int64_t, uint32_t

cdef extern from "dlfcn.h" nogil:
    void* dlopen(const char*, int)
    void* dlsym(void*, const char*)
    char* dlerror()
    int RTLD_NOW
    int RTLD_LOCAL

ctypedef void* Status  # NULL: success

cdef struct ApiBase:
    void** (*GetApi)(uint32_t) noexcept nogil
    const char* (*GetVersionString)() noexcept nogil

ctypedef const ApiBase* (*GetApiBase_t)() noexcept nogil
ctypedef Status (*RegisterCustomOps_t)(void* options, const ApiBase* base) noexcept nogil
ctypedef int (*Code_t)(Status) noexcept nogil
ctypedef const char* (*Text_t)(Status) noexcept nogil
ctypedef void (*Release_t)(void*) noexcept nogil
ctypedef Status (*Make_t)(void** out) noexcept nogil
ctypedef Status (*On_t)(void*) noexcept nogil
ctypedef Status (*SetInt_t)(void*, int) noexcept nogil
ctypedef Status (*CreateEnv_t)(int severity, const char* id, const void* threading, void** out) noexcept nogil
ctypedef Status (*CreateSession_t)(void* env, const char* path, const void* options, void** out) noexcept nogil
ctypedef Status (*Run_t)(
    void* session, const void* options, const char** names, void** inputs, size_t count, const char** outputs, size_t wanted, void** out
) noexcept nogil
ctypedef Status (*Tensor_t)(void* memory, void* data, size_t size, const int64_t* dims, size_t rank, int kind, void** out) noexcept nogil
ctypedef Status (*Memory_t)(int allocator, int kind, void** out) noexcept nogil
ctypedef Status (*Count_t)(const void*, size_t* out) noexcept nogil
ctypedef Status (*Name_t)(const void*, size_t index, void* allocator, char** out) noexcept nogil
ctypedef Status (*Info_t)(const void*, size_t index, void** out) noexcept nogil
ctypedef Status (*Get_t)(const void*, void** out) noexcept nogil
ctypedef Status (*Kind_t)(const void*, int* out) noexcept nogil
ctypedef Status (*Dims_t)(const void*, int64_t* out, size_t count) noexcept nogil
ctypedef Status (*Symbols_t)(const void*, const char** out, size_t count) noexcept nogil
ctypedef Status (*Free_t)(void* allocator, void* pointer) noexcept nogil

cdef enum:
    GET_CODE = 1
    GET_TEXT = 2
    CREATE_SESSION = 7
    RUN = 9
    CREATE_OPTIONS = 10
    DISABLE_MEM_PATTERN = 17
    SET_SESSION_SEVERITY = 22
    SESSION_INPUTS = 30
    SESSION_OUTPUTS = 31
    INPUT_INFO = 33
    OUTPUT_INFO = 34
    INPUT_NAME = 36
    OUTPUT_NAME = 37
    CREATE_RUN_OPTIONS = 39
    SET_RUN_SEVERITY = 41
    SET_TERMINATE = 46
    CREATE_TENSOR_WITH_DATA = 49
    TENSOR_DATA = 51
    AS_TENSOR_INFO = 55
    ELEMENT_TYPE = 60
    RANK = 61
    DIMS = 62
    SYMBOLS = 63
    TENSOR_INFO = 65
    CPU_MEMORY_INFO = 69
    ALLOCATOR_FREE = 76
    DEFAULT_ALLOCATOR = 78
    RELEASE_STATUS = 93
    RELEASE_SESSION = 95
    RELEASE_VALUE = 96
    RELEASE_RUN_OPTIONS = 97
    RELEASE_TYPE_INFO = 98
    RELEASE_TENSOR_INFO = 99
    RELEASE_OPTIONS = 100
    CREATE_ENV_WITH_POOLS = 119
    DISABLE_SESSION_THREADS = 120
    CREATE_THREADING = 121
    RELEASE_THREADING = 122
    SET_INTRA_THREADS = 147
    SET_INTER_THREADS = 148
    SET_SPIN = 149

cdef enum:
    MAX_RANK = 32
    FATAL = 4
