# SPDX-License-Identifier: Apache-2.0
cimport cython
from libc.stdint cimport int32_t, int64_t


cdef struct ArrayView:
    char* data                # first element, byte_offset applied; may be NULL when the array has size 0
    int64_t shape[8]
    int64_t strides[8]        # in elements, always filled (also when the producer gave NULL)
    int32_t ndim
    int32_t element           # ElementKind value, 0 when the dtype is none of ours
    int32_t device_type       # 1 = host (kDLCPU, kDLCUDAHost), 2 = CUDA (kDLCUDA, kDLCUDAManaged)
    int32_t device_id
    bint readonly             # read-only buffers and flags, copies made by the producer, and every JAX array
    bint foreign_order        # what keeps the memory alive is not ordered with the stream given: hold_until_done
    # Private: what keeps the memory alive, for release_view.
    int32_t keep_kind
    void* keep


# `name` = argument's name for messages. stream: the CUDA stream the work will run on (NULL = legacy default);
# on_cuda_stream False: no CUDA work follows, nothing is ordered. The view must be released, also when it is borrowed
# (it is valid only as long as the caller holds `array`). On failure the view is left zeroed.
cdef int acquire_view(object array, ArrayView* view, void* stream, bint on_cuda_stream, str name) except -1
# Idempotent; a zero-initialised view is fine. Needs the GIL.
cdef void release_view(ArrayView* view) noexcept
# Refuses torch tensors with requires_grad=True; costs one pointer comparison for other types.
cdef int check_no_grad(object array, str name) except -1
# 1 when the array's framework says on which CUDA stream it works now (exchange API, CuPy, our buffers), else 0.
cdef int current_stream(object array, void** stream) except -1
# 1 if it is an array (device_type as in ArrayView), 0 if not.
cdef int device_of(object array, int32_t* device_type, int32_t* device_id) except -1
# Moves what the views keep alive, and a reference to `owners` (the arrays), into a list that is released once the work
# now on `stream` is done. Leaves the views zeroed. While `stream` is capturing a graph nothing is held (events cannot
# be queried, and a replay needs the arrays as long as the graph lives): the views are just released.
cdef int hold_until_done(ArrayView* views, int count, tuple owners, int device, void* stream) except -1
# Short text "float16[8, 4096] on cuda:0" for messages; the type's name for what is no array. Never raises.
cpdef object describe(object array)


@cython.final
cdef class Allocation:
    # Memory for a result, in two steps because JAX arrays are immutable once made: `target` is written by us (pass it
    # to acquire_view), then, after the launch, finish() gives the array of the prototype's own framework.
    cdef object target
    cdef object framework
    cdef int kind
    cdef object finish(self)


cdef Allocation allocate_like(
    object prototype, tuple shape, int element, int device_type, int device_id, void* stream)

# ElementKind value of a dtype: an ElementKind, a name ("float16", "f16", "bf16"), or a framework's dtype object.
cdef int element_of(object dtype, str name) except -1
cdef int element_bytes(int element) noexcept nogil   # 0 for 0
cdef str element_name(int element)                   # "float16"; "an unknown type" for 0

# For the types of this package: a type that fills its own view. `fill` sets data .. readonly and *stream (the stream
# its memory is ordered on); the view borrows. device_type 1 leaves *stream alone.
ctypedef int (*fill_function)(object array, ArrayView* view, void** stream) except -1
cdef int register_type(object type_, fill_function fill) except -1
# A DLPack capsule over `owner`'s memory. Orders `stream_` (the protocol's stream argument) after `ready`.
cdef object export_dlpack(
    object owner, ArrayView* view, void* ready, object stream_, object max_version, object dl_device, object copy)
