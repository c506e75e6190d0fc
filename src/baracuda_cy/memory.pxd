# SPDX-License-Identifier: Apache-2.0
cimport cython
from libc.stdint cimport int64_t

from baracuda_cy.dlpack cimport ArrayView
from baracuda_cy.stream cimport StreamHandle


@cython.final
@cython.no_gc_clear
cdef class DeviceBuffer:
    cdef void* raw                # NULL when empty or closed
    cdef int64_t size
    cdef StreamHandle order       # allocated, copied and freed in this stream's order; outlives the memory
    cdef object _stream
    cdef int _device
    cdef int pid
    cdef int exports              # DLPack capsules that still point here
    cdef bint _closed
    cdef object __weakref__


@cython.final
cdef class PinnedBuffer:
    cdef void* raw
    cdef int64_t size
    cdef Py_ssize_t length        # what Py_buffer.shape points to
    cdef Py_ssize_t step
    cdef int pid
    cdef int exports
    cdef bint _closed
    cdef object __weakref__


@cython.final
@cython.no_gc_clear
cdef class DeviceArray:
    cdef readonly DeviceBuffer buffer
    cdef ArrayView view           # borrowed from `buffer`
    cdef object __weakref__


# Passes through acquire_view as a uint8 array of `nbytes`, so plans take it where they take any array.
@cython.final
@cython.no_gc_clear
cdef class Workspace:
    cdef char* raw                # 256-byte aligned
    cdef int64_t size
    cdef int device_type
    cdef int device_id
    cdef void* host               # memory of our own
    cdef object source            # the DeviceBuffer, or the array that lends
    cdef ArrayView lent
    cdef bint _closed
    cdef object __weakref__
