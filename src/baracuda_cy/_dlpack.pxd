# SPDX-License-Identifier: Apache-2.0
# The C layout of DLPack 1.x: versioned and legacy tensors, and the exchange table of types.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    kDLCPU = 1
    kDLCUDA = 2
    kDLCUDAHost = 3
    kDLCUDAManaged = 13

cdef enum:
    kDLInt = 0
    kDLUInt = 1
    kDLFloat = 2
    kDLBfloat = 4
    kDLBool = 6

cdef enum:
    DLPACK_FLAG_READ_ONLY = 1
    DLPACK_FLAG_IS_COPIED = 2

# What capsules are called: those with a tensor in them, and those whose tensor was taken.
cdef extern from *:
    """
    #define BCY_LEGACY_NAME "dltensor"
    #define BCY_LEGACY_USED "used_dltensor"
    #define BCY_VERSIONED_NAME "dltensor_versioned"
    #define BCY_VERSIONED_USED "used_dltensor_versioned"
    """
    const char* LEGACY_NAME "BCY_LEGACY_NAME"
    const char* LEGACY_USED "BCY_LEGACY_USED"
    const char* VERSIONED_NAME "BCY_VERSIONED_NAME"
    const char* VERSIONED_USED "BCY_VERSIONED_USED"

cdef struct DLPackVersion:
    uint32_t major
    uint32_t minor

cdef struct DLDevice:
    int32_t device_type
    int32_t device_id

cdef struct DLDataType:
    uint8_t code
    uint8_t bits
    uint16_t lanes

cdef struct DLTensor:
    void* data
    DLDevice device
    int32_t ndim
    DLDataType dtype
    int64_t* shape
    int64_t* strides
    uint64_t byte_offset

cdef struct DLManagedTensor:
    DLTensor dl_tensor
    void* manager_ctx
    void (*deleter)(DLManagedTensor*) noexcept

# Everything up to `flags` is stable across major versions: enough to delete what we cannot read.
cdef struct DLManagedTensorVersioned:
    DLPackVersion version
    void* manager_ctx
    void (*deleter)(DLManagedTensorVersioned*) noexcept
    uint64_t flags
    DLTensor dl_tensor

cdef struct DLPackExchangeAPIHeader:
    DLPackVersion version
    DLPackExchangeAPIHeader* prev_api

ctypedef void (*DLPackSetError)(void* context, const char* kind, const char* message) noexcept

cdef struct DLPackExchangeAPI:
    DLPackExchangeAPIHeader header
    int (*managed_tensor_allocator)(
        DLTensor* prototype,
        DLManagedTensorVersioned** out,
        void* context,
        DLPackSetError set_error,
    ) noexcept
    int (*managed_tensor_from_py_object_no_sync)(
        void* array, DLManagedTensorVersioned** out
    ) noexcept
    int (*managed_tensor_to_py_object_no_sync)(
        DLManagedTensorVersioned* tensor, void** array
    ) noexcept
    int (*dltensor_from_py_object_no_sync)(void* array, DLTensor* out) noexcept
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream) noexcept
