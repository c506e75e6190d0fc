# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport int32_t, int64_t


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
