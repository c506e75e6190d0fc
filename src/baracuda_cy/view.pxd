# SPDX-License-Identifier: Apache-2.0
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int32_t, int64_t

from baracuda_cy.elements cimport U8


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


# Idempotent; a zero-initialised view is fine. Needs the GIL.
cdef void release_view(ArrayView* view) noexcept
# Lets go of what a view kept, once it is the caller's: `keep_kind` and `keep` of it.
cdef void drop(int kind, void* keep) noexcept


# How this package's own types fill theirs.
cdef inline int keep_in_view(ArrayView* view, object owner) except -1:
    Py_INCREF(owner)
    view.keep = <void*>owner
    view.keep_kind = KEEP_OBJECT
    return 0


cdef inline int bytes_view(
    ArrayView* view, void* data, int64_t nbytes, int device_type, int device
) except -1:
    view.data = <char*>data
    view.ndim = 1
    view.shape[0] = nbytes
    view.strides[0] = 1
    view.element = U8
    view.device_type = device_type
    view.device_id = device
    return 0
