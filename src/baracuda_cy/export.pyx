# SPDX-License-Identifier: Apache-2.0
"""This package's own memory, given to other libraries as DLPack capsules."""

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from baracuda_cy._dlpack cimport (
    LEGACY_NAME,
    VERSIONED_NAME,
    DLManagedTensor,
    DLManagedTensorVersioned,
    DLTensor,
)
from baracuda_cy.elements cimport dlpack_dtype
from baracuda_cy.view cimport MAX_NDIM, ArrayView

cdef extern from *:
    int Py_IsInitialized() nogil


cdef struct Export:
    DLManagedTensorVersioned versioned
    DLManagedTensor legacy
    int64_t shape[MAX_NDIM]
    int64_t strides[MAX_NDIM]


cdef void release_export(void* owner, Export* export) noexcept with gil:
    Py_DECREF(<object>owner)
    free(export)


cdef void delete_versioned(DLManagedTensorVersioned* tensor) noexcept nogil:
    # After the interpreter is gone nothing can be released, and nothing needs to be.
    if Py_IsInitialized():
        release_export(tensor.manager_ctx, <Export*>tensor)


cdef void delete_legacy(DLManagedTensor* tensor) noexcept nogil:
    cdef Export* export = NULL
    if Py_IsInitialized():
        # `legacy` lies at a fixed distance from the beginning of its Export.
        export = <Export*>(<char*>tensor - <uintptr_t>&export.legacy)
        release_export(tensor.manager_ctx, export)


cdef void destroy_capsule(object capsule) noexcept:
    # A capsule that was consumed has another name, and its tensor belongs to the consumer.
    cdef DLManagedTensorVersioned* versioned
    cdef DLManagedTensor* legacy
    if PyCapsule_IsValid(capsule, VERSIONED_NAME):
        versioned = <DLManagedTensorVersioned*>PyCapsule_GetPointer(capsule, VERSIONED_NAME)
        versioned.deleter(versioned)
    elif PyCapsule_IsValid(capsule, LEGACY_NAME):
        legacy = <DLManagedTensor*>PyCapsule_GetPointer(capsule, LEGACY_NAME)
        legacy.deleter(legacy)


cdef void fill_tensor(DLTensor* tensor, Export* export, ArrayView* view) noexcept:
    cdef int i
    for i in range(view.ndim):
        export.shape[i] = view.shape[i]
        export.strides[i] = view.strides[i]
    tensor.data = view.data
    tensor.device.device_type = view.device_type
    tensor.device.device_id = view.device_id
    tensor.ndim = view.ndim
    tensor.dtype = dlpack_dtype(view.element)
    tensor.shape = export.shape
    tensor.strides = export.strides
    tensor.byte_offset = 0


cdef object make_capsule(object owner, ArrayView* view, uint64_t flags, object max_version):
    cdef Export* export
    cdef bint versioned = max_version is not None and max_version[0] >= 1
    export = <Export*>calloc(1, sizeof(Export))
    if export == NULL:
        raise MemoryError()
    # From here on nothing may fail but making the capsule.
    if versioned:
        fill_tensor(&export.versioned.dl_tensor, export, view)
        export.versioned.version.major = 1
        export.versioned.version.minor = 1
        export.versioned.flags = flags
        export.versioned.manager_ctx = <void*>owner
        export.versioned.deleter = delete_versioned
    else:
        fill_tensor(&export.legacy.dl_tensor, export, view)
        export.legacy.manager_ctx = <void*>owner
        export.legacy.deleter = delete_legacy
    Py_INCREF(owner)
    try:
        if versioned:
            return PyCapsule_New(&export.versioned, VERSIONED_NAME, destroy_capsule)
        return PyCapsule_New(&export.legacy, LEGACY_NAME, destroy_capsule)
    except BaseException:
        release_export(<void*>owner, export)
        raise
