# SPDX-License-Identifier: Apache-2.0
cimport cython
from libc.stdint cimport int32_t, int64_t, uint64_t


# The numbers of ElementKind.
cdef enum:
    F32 = 1
    F16 = 2
    BF16 = 3
    U8 = 4
    I8 = 5
    I32 = 6
    I64 = 7
    F64 = 8
    U16 = 9
    I16 = 10
    U32 = 11
    U64 = 12
    BOOL = 13

cdef enum:
    MAX_NDIM = 8

cdef struct ArrayView:
    char* data                # first element, byte_offset applied; may be NULL when the size is 0
    int64_t shape[MAX_NDIM]
    # In elements, always filled (also when the producer gave NULL).
    int64_t strides[MAX_NDIM]
    int32_t ndim
    int32_t element           # ElementKind value, 0 when the dtype is none of ours
    int32_t device_type       # 1 = host (kDLCPU, kDLCUDAHost), 2 = CUDA (kDLCUDA, kDLCUDAManaged)
    int32_t device_id
    bint readonly             # read-only buffers and flags, copies by the producer, every JAX array
    bint foreign_order        # what keeps the memory alive is not ordered with the stream given
    # Private: what keeps the memory alive, for release_view.
    int32_t keep_kind
    void* keep


cdef enum:
    KEEP_NOTHING = 0
    KEEP_VERSIONED = 1        # DLManagedTensorVersioned*
    KEEP_LEGACY = 2           # DLManagedTensor*
    KEEP_OBJECT = 3           # PyObject*, one reference
    KEEP_BUFFER = 4           # Py_buffer*, ours


# `name` = argument's name for messages. stream: the CUDA stream the work will run on (NULL = legacy
# default); on_cuda_stream False: no CUDA work follows, nothing is ordered. The view must be
# released, also when it is borrowed (it is valid only as long as the caller holds `array`). On
# failure it keeps nothing.
cdef int acquire_view(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name) except -1
# The same, but never borrowed.
cdef int hold_view(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name) except -1
# The two halves of acquire_view, for calls of several arrays: whatever runs code of others, as the
# first half may, can take the memory from a borrowed view, so that all of those are acquired last.
# The first, which may check_no_grad as well, gives False where the view is to be borrowed; the
# second runs no code but the array's own library's.
cdef bint acquire_unless_borrowed(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name, bint no_grad
) except -1
cdef int borrow_view(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name) except -1
cdef bint is_borrowed(object array) except -1
# Idempotent; a zero-initialised view is fine. Needs the GIL.
cdef void release_view(ArrayView* view) noexcept
# Refuses torch tensors with requires_grad=True; costs a look at the type for all others.
cdef int check_no_grad(object array, str name) except -1
# Refuses those with a tangent, which there are in torch's forward mode only: asked once a call.
cdef bint in_forward_mode() except -1
cdef int check_no_tangent(object array, str name) except -1
# Refuses those with the negative bit, whose memory has the opposite sign. Asking takes longer than
# the other checks of an argument together, and torch sets the bit for imaginary parts of conjugates
# alone: elements of those lie two apart but for what as_strided makes of them, so that a call asks
# where rows have one element each.
cdef int check_sign(object array, str name) except -1
# All of it, for what is looked at once.
cdef int check_plain(object array, str name) except -1
# 1 when the array's framework says on which CUDA stream it works now (exchange API, torch, CuPy,
# our buffers), else 0.
cdef int current_stream(object array, void** stream) except -1
# The same for an array that is expected on CUDA device `device_id`: torch tensors need not be read.
cdef int current_stream_on(object array, int32_t device_id, void** stream) except -1
# 1 if it is an array (device_type as in ArrayView), 0 if not.
cdef int device_of(
    object array, int32_t* device_type, int32_t* device_id, str name
) except -1
# Moves what the views keep alive, and a reference to `owners` (the arrays), into a list that is
# released once the work now on `stream` is done. Leaves the views zeroed. While `stream` is
# capturing a graph nothing is held: events cannot be queried then, and a replay needs the arrays as
# long as the graph lives, which only the caller knows.
cdef int hold_until_done(
    ArrayView* views, int count, tuple owners, int device, void* stream) except -1
# Short text "float16[8, 4096] on cuda:0" for messages; the type's name for no array. Never raises.
cpdef object describe(object array)


@cython.final
cdef class Allocation:
    # Memory for a result, in two steps because a JAX array cannot be written once it is one:
    # `target` is what the kernel writes (pass it to acquire_view); after the launch, finish() gives
    # the array of the prototype's own framework. Scratch is settled instead.
    cdef object target
    cdef object prototype
    cdef int kind
    cdef object finish(self)
    cdef int settle(self) except -1


cdef Allocation allocate_like(
    object prototype, tuple shape, int element, int device_type, int device_id, void* stream)

# ElementKind value of a dtype: an ElementKind, a name, or a framework's dtype object.
cdef int element_of(object dtype, str name) except -1
cdef int element_bytes(int element) noexcept nogil   # 0 for 0
cdef str element_name(int element)                   # "float16"; "an unsupported type" for 0

# For this package's own types: `fill` fills all of the view, keep included (which must outlive
# close()), and *stream, the stream its memory is ordered on, when it is on CUDA.
ctypedef int (*fill_function)(object array, ArrayView* view, void** stream) except -1
cdef int register_type(object type_, fill_function fill) except -1
# A capsule over memory that `owner` keeps alive. `flags` are those of DLManagedTensorVersioned.
cdef object make_capsule(object owner, ArrayView* view, uint64_t flags, object max_version)
# Whether this is asked from inside Allocation.finish(), while JAX takes the result over.
cdef bint exporting_to_jax() noexcept
cdef object numpy_dtype(int element, str name)   # bfloat16 from ml_dtypes, or Unsupported
