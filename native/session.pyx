# distutils: libraries = dl
"""ONNX Runtime sessions through its C API: one thread pool for all, threads that do not spin, no GIL while a graph is loaded or run.

The Python package offers a shared pool too, but not without spinning. OrtApi is a table of function pointers to which releases only
append, so a slot's number and signature stay; all used here are older than API version 16.
"""

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.stdint cimport int64_t, uint32_t

API_VERSION = 16
# ONNX element type -> (its name in ONNX Runtime's Python API, struct format, bytes); other types (text among them) have no buffer form.
TYPES = {
    1: ("tensor(float)", b"f", 4),
    2: ("tensor(uint8)", b"B", 1),
    3: ("tensor(int8)", b"b", 1),
    4: ("tensor(uint16)", b"H", 2),
    5: ("tensor(int16)", b"h", 2),
    6: ("tensor(int32)", b"i", 4),
    7: ("tensor(int64)", b"q", 8),
    9: ("tensor(bool)", b"?", 1),
    10: ("tensor(float16)", b"e", 2),
    11: ("tensor(double)", b"d", 8),
    12: ("tensor(uint32)", b"I", 4),
    13: ("tensor(uint64)", b"Q", 8),
}
_SAME = {b"l": b"q", b"L": b"Q"}  # C's long, as NumPy names 64-bit integers where it has that size


class OrtFailure(Exception):
    """What ONNX Runtime says went wrong; `code` is its OrtErrorCode (1 fail, 2 invalid argument, 3 no such file, ...)."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


cdef class Environment:
    """ONNX Runtime's library and its thread pool. Lives as long as the process: the library allows one environment."""

    cdef const ApiBase* base
    cdef void** api
    cdef void* env
    cdef void* memory
    cdef void* allocator

    def __init__(self, str library, int threads, bint spinning):
        """`threads` of the pool, the calling one included. Raises OSError without the library, OrtFailure when it is too old."""
        cdef void* handle
        cdef void* threading = NULL
        cdef bytes path = library.encode()
        cdef GetApiBase_t get_base
        if self.env != NULL:
            raise ValueError("an environment is made once")
        handle = dlopen(path, RTLD_NOW | RTLD_LOCAL)
        if handle == NULL:
            raise OSError(dlerror().decode())
        get_base = <GetApiBase_t>dlsym(handle, b"OrtGetApiBase")
        if get_base == NULL:
            raise OSError(f"{library} does not export OrtGetApiBase")
        self.base = get_base()
        self.api = self.base.GetApi(API_VERSION)
        if self.api == NULL:
            raise OrtFailure(1, f"{library} is older than API version {API_VERSION}")
        self.check((<Make_t>self.api[CREATE_THREADING])(&threading))
        try:
            self.check((<SetInt_t>self.api[SET_INTRA_THREADS])(threading, threads))
            self.check((<SetInt_t>self.api[SET_INTER_THREADS])(threading, 1))
            self.check((<SetInt_t>self.api[SET_SPIN])(threading, spinning))
            self.check((<CreateEnv_t>self.api[CREATE_ENV_WITH_POOLS])(FATAL, b"understudy", threading, &self.env))
        finally:
            (<Release_t>self.api[RELEASE_THREADING])(threading)
        self.check((<Memory_t>self.api[CPU_MEMORY_INFO])(0, 0, &self.memory))
        self.check((<Make_t>self.api[DEFAULT_ALLOCATOR])(&self.allocator))

    @property
    def version(self):
        return self.base.GetVersionString().decode()

    cdef int check(self, Status status) except -1:
        """Turns a status into OrtFailure and releases it."""
        if status == NULL:
            return 0
        code = (<Code_t>self.api[GET_CODE])(status)
        message = (<Text_t>self.api[GET_TEXT])(status).decode("utf-8", "replace")
        (<Release_t>self.api[RELEASE_STATUS])(status)
        raise OrtFailure(code, message)


cdef class Stop:
    """Ends one run from another thread, between two nodes of its graph."""

    cdef Environment environment
    cdef void** api  # the collector may have cleared `environment` when __dealloc__ runs; here and below
    cdef void* options
    cdef readonly bint is_set

    def __init__(self, Environment environment not None):
        self.environment = environment
        self.api = environment.api
        environment.check((<Make_t>environment.api[CREATE_RUN_OPTIONS])(&self.options))
        environment.check((<SetInt_t>environment.api[SET_RUN_SEVERITY])(self.options, FATAL))

    def __dealloc__(self):
        if self.options != NULL:
            (<Release_t>self.api[RELEASE_RUN_OPTIONS])(self.options)

    def set(self):
        self.is_set = True
        self.environment.check((<On_t>self.environment.api[SET_TERMINATE])(self.options))


cdef class Value:
    """A tensor that ONNX Runtime allocated, as a buffer; freed with its last view."""

    cdef Environment environment
    cdef void** api
    cdef void* value
    cdef void* data
    cdef char format[2]
    cdef Py_ssize_t itemsize
    cdef Py_ssize_t size
    cdef int rank
    cdef Py_ssize_t shape[MAX_RANK]
    cdef Py_ssize_t strides[MAX_RANK]

    def __init__(self):
        raise TypeError("values come from runs")

    def __dealloc__(self):
        if self.value != NULL:
            (<Release_t>self.api[RELEASE_VALUE])(self.value)

    def __getbuffer__(self, Py_buffer* view, int flags):
        view.buf = self.data
        view.obj = self
        view.len = self.size * self.itemsize
        view.itemsize = self.itemsize
        view.readonly = 0
        view.format = NULL
        if flags & PyBUF_FORMAT:
            view.format = self.format
        view.ndim = self.rank
        view.shape = self.shape
        view.strides = self.strides
        view.suboffsets = NULL
        view.internal = NULL


cdef Value wrap(Environment environment, void* value):
    """Takes ownership of `value`."""
    cdef Value result = Value.__new__(Value)
    cdef void* info = NULL
    cdef int kind = 0, axis
    cdef size_t rank = 0
    cdef int64_t dims[MAX_RANK]
    cdef void** api = environment.api
    result.environment = environment
    result.api = api
    result.value = value
    environment.check((<Get_t>api[TENSOR_INFO])(value, &info))
    try:
        environment.check((<Kind_t>api[ELEMENT_TYPE])(info, &kind))
        environment.check((<Count_t>api[RANK])(info, &rank))
        if kind not in TYPES or rank > MAX_RANK:
            raise OrtFailure(9, "an output's type or rank is not supported")
        environment.check((<Dims_t>api[DIMS])(info, dims, rank))
    finally:
        (<Release_t>api[RELEASE_TENSOR_INFO])(info)
    _, letter, result.itemsize = TYPES[kind]
    result.format[0] = letter[0]
    result.format[1] = 0
    result.rank = <int>rank
    result.size = 1
    for axis in range(result.rank - 1, -1, -1):
        result.shape[axis] = dims[axis]
        result.strides[axis] = result.size * result.itemsize
        result.size *= dims[axis]
    environment.check((<Get_t>api[TENSOR_DATA])(value, &result.data))
    return result


cdef class NativeSession:
    """A loaded graph. `inputs` and `outputs` are (name, ONNX type, sizes: int, str or None) each; a type that is not in TYPES is "other"."""

    cdef Environment environment
    cdef void** api
    cdef void* session
    cdef const char** input_names
    cdef const char** output_names
    cdef list kept  # owns the bytes behind the names
    cdef list kinds
    cdef list output_kinds
    cdef readonly list inputs
    cdef readonly list outputs

    def __init__(self, Environment environment not None, str path, str kernels=""):
        """Loads the graph at `path`, with the operators of the library `kernels` if given. Raises OrtFailure."""
        cdef void* options = NULL
        cdef bytes raw = path.encode()
        cdef const char* raw_path = raw
        cdef Status status
        cdef void** api = environment.api
        cdef void* env = environment.env
        if self.environment is not None:
            raise ValueError("a session is loaded once")
        self.environment = environment
        self.api = api
        environment.check((<Make_t>api[CREATE_OPTIONS])(&options))
        try:
            environment.check((<On_t>api[DISABLE_SESSION_THREADS])(options))
            # A pattern is kept for every input shape ever seen, and packed batches hardly repeat one.
            environment.check((<On_t>api[DISABLE_MEM_PATTERN])(options))
            environment.check((<SetInt_t>api[SET_SESSION_SEVERITY])(options, FATAL))
            if kernels:
                self.register(options, kernels)
            with nogil:
                status = (<CreateSession_t>api[CREATE_SESSION])(env, raw_path, options, &self.session)
            environment.check(status)
        finally:
            (<Release_t>api[RELEASE_OPTIONS])(options)
        self.kept, self.kinds, self.output_kinds = [], [], []
        self.inputs = self.describe(SESSION_INPUTS, INPUT_NAME, INPUT_INFO, &self.input_names, self.kinds)
        self.outputs = self.describe(SESSION_OUTPUTS, OUTPUT_NAME, OUTPUT_INFO, &self.output_names, self.output_kinds)

    def __dealloc__(self):
        if self.session != NULL:
            (<Release_t>self.api[RELEASE_SESSION])(self.session)
        PyMem_Free(self.input_names)
        PyMem_Free(self.output_names)

    def close(self):
        """Frees the graph; no run may be in progress."""
        cdef void* session = self.session
        cdef void** api = self.api
        self.session = NULL
        if session != NULL:
            with nogil:
                (<Release_t>api[RELEASE_SESSION])(session)

    def run(self, list arrays, list wanted, Stop stop):
        """Runs with one contiguous array an input, in order; returns a Value for each output whose index is in `wanted`.

        Raises ValueError for arrays that are not of the input's type or not contiguous, OrtFailure for what ONNX Runtime refuses.
        """
        cdef Py_ssize_t count = len(self.inputs), asked = len(wanted), i, opened = 0
        cdef void** api = self.environment.api
        cdef void* session = self.session
        cdef const void* options = NULL if stop is None else stop.options
        cdef Py_buffer* views
        cdef void** values
        cdef const char** names
        cdef void* held
        cdef Status status
        if session == NULL:
            raise ValueError("the session is closed")
        if len(arrays) != count or not all(0 <= index < len(self.outputs) for index in wanted):
            raise ValueError(f"the graph has {count} inputs and {len(self.outputs)} outputs")
        views = <Py_buffer*>PyMem_Calloc(count + 1, sizeof(Py_buffer))
        values = <void**>PyMem_Calloc(count + asked + 1, sizeof(void*))
        names = <const char**>PyMem_Calloc(asked + 1, sizeof(char*))
        if views == NULL or values == NULL or names == NULL:
            PyMem_Free(views)
            PyMem_Free(values)
            PyMem_Free(names)
            raise MemoryError
        try:
            for i in range(count):
                PyObject_GetBuffer(arrays[i], &views[i], PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
                opened += 1
                self.bind(&views[i], self.kinds[i], &values[i])
            for i in range(asked):
                names[i] = self.output_names[<Py_ssize_t>wanted[i]]
            with nogil:
                status = (<Run_t>api[RUN])(session, options, self.input_names, values, count, names, asked, values + count)
            self.environment.check(status)
            results = []
            for i in range(count, count + asked):
                held, values[i] = values[i], NULL  # `wrap` owns it from its first line on
                results.append(wrap(self.environment, held))
            return results
        except BufferError as error:
            raise ValueError(f"an input is not a contiguous array: {error}") from error
        finally:
            for i in range(count + asked):
                if values[i] != NULL:
                    (<Release_t>api[RELEASE_VALUE])(values[i])
            for i in range(opened):
                PyBuffer_Release(&views[i])
            PyMem_Free(views)
            PyMem_Free(values)
            PyMem_Free(names)

    cdef int bind(self, Py_buffer* view, object kind, void** out) except -1:
        cdef int64_t dims[MAX_RANK]
        cdef int axis
        _, expected, size = TYPES[kind]
        found = view.format if view.format != NULL else b"B"
        if _SAME.get(found, found) != expected or view.itemsize != size or view.ndim > MAX_RANK:
            raise ValueError(f"an input has buffer format {found.decode()!r}, expected {expected.decode()!r}")
        for axis in range(view.ndim):
            dims[axis] = view.shape[axis]
        return self.environment.check(
            (<Tensor_t>self.environment.api[CREATE_TENSOR_WITH_DATA])(self.environment.memory, view.buf, view.len, dims, view.ndim, kind, out)
        )

    cdef int register(self, void* options, str kernels) except -1:
        cdef bytes path = kernels.encode()
        # Never closed: its operators are referred to for as long as any session lives.
        cdef void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL)
        if handle == NULL:
            raise OSError(dlerror().decode())
        cdef void* function = dlsym(handle, b"RegisterCustomOps")
        if function == NULL:
            raise OSError(f"{kernels} does not export RegisterCustomOps")
        return self.environment.check((<RegisterCustomOps_t>function)(options, self.environment.base))

    cdef list describe(self, int count_slot, int name_slot, int info_slot, const char*** names, list kinds):
        cdef size_t count = 0, i
        cdef char* name = NULL
        cdef void** api = self.environment.api
        cdef void* allocator = self.environment.allocator
        found = []
        self.environment.check((<Count_t>api[count_slot])(self.session, &count))
        names[0] = <const char**>PyMem_Calloc(count + 1, sizeof(char*))
        if names[0] == NULL:
            raise MemoryError
        for i in range(count):
            self.environment.check((<Name_t>api[name_slot])(self.session, i, allocator, &name))
            raw = <bytes>name
            self.environment.check((<Free_t>api[ALLOCATOR_FREE])(allocator, name))
            self.kept.append(raw)
            names[0][i] = raw
            kind, sizes = self.type_of(info_slot, i)
            kinds.append(kind)
            found.append((raw.decode("utf-8", "replace"), TYPES[kind][0] if kind in TYPES else "other", sizes))
        return found

    cdef tuple type_of(self, int info_slot, size_t index):
        cdef void* info = NULL
        cdef void* tensor = NULL
        cdef int kind = 0
        cdef size_t rank = 0, i
        cdef int64_t dims[MAX_RANK]
        cdef const char* symbols[MAX_RANK]
        cdef void** api = self.environment.api
        self.environment.check((<Info_t>api[info_slot])(self.session, index, &info))
        try:
            self.environment.check((<Get_t>api[AS_TENSOR_INFO])(info, &tensor))
            if tensor == NULL:
                return 0, ()
            self.environment.check((<Kind_t>api[ELEMENT_TYPE])(tensor, &kind))
            self.environment.check((<Count_t>api[RANK])(tensor, &rank))
            if rank > MAX_RANK:
                return 0, ()
            self.environment.check((<Dims_t>api[DIMS])(tensor, dims, rank))
            self.environment.check((<Symbols_t>api[SYMBOLS])(tensor, symbols, rank))
            sizes = [dims[i] if dims[i] >= 0 else (symbols[i].decode("utf-8", "replace") or None) for i in range(rank)]
            return kind, tuple(sizes)
        finally:
            (<Release_t>api[RELEASE_TYPE_INFO])(info)


cdef class Binding:
    """Arrays that stay bound to a session's inputs and outputs from run to run; each may be used in part, with a shape of its own.

    One thread uses it at a time. It keeps the arrays and the session's object alive, and must not run after the session's `close`.
    """

    cdef NativeSession session
    cdef void** api
    cdef Py_buffer* views
    cdef void** values
    cdef const char** outputs
    cdef Py_ssize_t inputs  # places 0..inputs-1 are inputs, those behind are outputs
    cdef Py_ssize_t count
    cdef list kinds

    def __init__(self, NativeSession session not None, list inputs, list outputs):
        """`inputs`: an array for each input, in order; `outputs`: (index of the output, array) each. Raises as `NativeSession.run`."""
        cdef Py_ssize_t i
        if self.session is not None:
            raise ValueError("a binding is made once")
        if len(inputs) != len(session.inputs) or not all(0 <= index < len(session.outputs) for index, _ in outputs):
            raise ValueError(f"the graph has {len(session.inputs)} inputs and {len(session.outputs)} outputs")
        self.session = session
        self.api = session.api
        self.inputs = len(inputs)
        self.views = <Py_buffer*>PyMem_Calloc(self.inputs + len(outputs) + 1, sizeof(Py_buffer))
        self.values = <void**>PyMem_Calloc(self.inputs + len(outputs) + 1, sizeof(void*))
        self.outputs = <const char**>PyMem_Calloc(len(outputs) + 1, sizeof(char*))
        if self.views == NULL or self.values == NULL or self.outputs == NULL:
            raise MemoryError
        self.count = self.inputs + len(outputs)
        self.kinds = list(session.kinds) + [session.output_kinds[index] for index, _ in outputs]
        for i in range(self.inputs):
            self.put(i, inputs[i])
        for i, (index, array) in enumerate(outputs):
            self.outputs[i] = session.output_names[<Py_ssize_t>index]
            self.put(self.inputs + i, array)

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.count):
            if self.values[i] != NULL:
                (<Release_t>self.api[RELEASE_VALUE])(self.values[i])
            PyBuffer_Release(&self.views[i])
        PyMem_Free(self.views)
        PyMem_Free(self.values)
        PyMem_Free(self.outputs)

    def put(self, Py_ssize_t place, array):
        """Binds another array to a place, in full."""
        cdef Py_buffer view
        cdef void* value = NULL
        if not 0 <= place < self.count:
            raise ValueError(f"there are {self.count} places")
        try:
            PyObject_GetBuffer(array, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
        except BufferError as error:
            raise ValueError(f"not a contiguous array: {error}") from error
        try:
            self.session.bind(&view, self.kinds[place], &value)
        except BaseException:
            PyBuffer_Release(&view)
            raise
        if self.values[place] != NULL:
            (<Release_t>self.api[RELEASE_VALUE])(self.values[place])
        PyBuffer_Release(&self.views[place])
        self.values[place] = value
        self.views[place] = view

    def shape(self, Py_ssize_t place, tuple sizes):
        """From now on the first elements of the place's array, with this shape."""
        cdef int64_t dims[MAX_RANK]
        cdef int64_t total = 1
        cdef Py_ssize_t axis, rank = len(sizes)
        cdef void* value = NULL
        if not 0 <= place < self.count or rank > MAX_RANK:
            raise ValueError(f"there are {self.count} places")
        for axis in range(rank):
            dims[axis] = sizes[axis]
            if dims[axis] < 0 or (dims[axis] > 0 and total > (<int64_t>1 << 62) // dims[axis]):
                raise ValueError("a size is negative or far too large")
            total *= dims[axis]
        if total * self.views[place].itemsize > self.views[place].len:
            raise ValueError(f"{sizes} is more than the array holds")
        self.session.environment.check(
            (<Tensor_t>self.api[CREATE_TENSOR_WITH_DATA])(
                self.session.environment.memory, self.views[place].buf, total * self.views[place].itemsize, dims, rank, self.kinds[place], &value
            )
        )
        (<Release_t>self.api[RELEASE_VALUE])(self.values[place])
        self.values[place] = value

    def run(self, Stop stop=None):
        """Runs the graph; the outputs' arrays hold what it gave. Raises ValueError when the session is closed, OrtFailure."""
        cdef void* session = self.session.session
        cdef const void* options = NULL if stop is None else stop.options
        cdef Status status
        if session == NULL:
            raise ValueError("the session is closed")
        with nogil:
            status = (<Run_t>self.api[RUN])(
                session, options, self.session.input_names, self.values, self.inputs, self.outputs, self.count - self.inputs,
                self.values + self.inputs
            )
        self.session.environment.check(status)
