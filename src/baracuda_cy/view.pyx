# SPDX-License-Identifier: Apache-2.0
"""What is seen of an array: where its elements lie, and what keeps them there until released."""

from cpython.buffer cimport PyBuffer_Release
from cpython.exc cimport PyErr_Fetch, PyErr_Restore
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.stdlib cimport free

from baracuda_cy._dlpack cimport DLManagedTensor, DLManagedTensorVersioned


cdef void release_view(ArrayView* view) noexcept:
    cdef int kind = view.keep_kind
    cdef void* keep = view.keep
    view.keep_kind = KEEP_NOTHING
    view.keep = NULL
    if kind != KEEP_NOTHING:
        drop(kind, keep)


cdef void drop(int kind, void* keep) noexcept:
    """Let go of what a view kept. An error that is on its way to the caller stays as it is."""
    cdef PyObject* error_type = NULL
    cdef PyObject* error = NULL
    cdef PyObject* traceback = NULL
    cdef DLManagedTensorVersioned* versioned
    cdef DLManagedTensor* legacy
    PyErr_Fetch(&error_type, &error, &traceback)
    if kind == KEEP_VERSIONED:
        versioned = <DLManagedTensorVersioned*>keep
        if versioned.deleter != NULL:
            versioned.deleter(versioned)
    elif kind == KEEP_LEGACY:
        legacy = <DLManagedTensor*>keep
        if legacy.deleter != NULL:
            legacy.deleter(legacy)
    elif kind == KEEP_OBJECT:
        Py_DECREF(<object>keep)
    elif kind == KEEP_BUFFER:
        PyBuffer_Release(<Py_buffer*>keep)
        free(keep)
    PyErr_Restore(error_type, error, traceback)
