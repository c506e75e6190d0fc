# SPDX-License-Identifier: Apache-2.0
cimport cython
from libc.stdint cimport int64_t

from baracuda_cy.stream cimport StreamHandle
from baracuda_cy.view cimport ArrayView

# What owns memory is apart from what Python closes: an exported array or a running call keeps the
# owner, and close() only lets go of it.


cdef enum:
    CONSUMERS = 4


@cython.final
@cython.no_gc_clear
cdef class DeviceMemory:
    cdef void* raw
    cdef int64_t size
    cdef int device
    cdef int pid
    cdef StreamHandle order       # allocated and freed in this stream's order; outlives the memory
    # Streams of those it was exported to: freed after what they hold by then.
    cdef void* consumers[CONSUMERS]
    cdef int consumer_count
    cdef int add_consumer(self, void* stream) except -1


@cython.final
cdef class HostMemory:
    cdef void* raw                # 256-byte aligned
    cdef int64_t size


@cython.final
cdef class LentMemory:
    cdef object source            # viewed anew for each use
    cdef ArrayView view           # held: a bytearray, for one, is not resized meanwhile


@cython.final
cdef class DeviceBuffer:
    cdef DeviceMemory memory      # None once closed
    cdef void* raw                # NULL when empty or closed
    cdef int64_t size
    cdef StreamHandle order
    cdef object _stream
    cdef object __weakref__
    cdef DeviceMemory require_open(self)
    cdef int adopt(self, DeviceMemory memory, object stream) except -1


@cython.final
cdef class PinnedBuffer:
    cdef void* raw
    cdef int64_t size
    cdef Py_ssize_t length        # what Py_buffer.shape points to
    cdef Py_ssize_t step
    cdef int pid
    cdef int exports              # a buffer that is in use is not closed, as in bytearray and mmap
    cdef bint _closed
    cdef object __weakref__
    cdef int require_open(self) except -1
    cdef int destroy(self) noexcept


@cython.final
cdef class DeviceArray:
    cdef DeviceMemory memory
    cdef readonly DeviceBuffer buffer
    cdef ArrayView view           # borrowed from `memory`
    cdef object __weakref__
    cdef DeviceMemory require_made(self)
    cdef int64_t byte_size(self) noexcept


# Passes through acquire_view as a uint8 array, so plans take it where they take any array.
@cython.final
cdef class Workspace:
    cdef object memory            # HostMemory, DeviceMemory or LentMemory; None once closed
    # Of its own memory; what is lent is asked.
    cdef char* raw                # 256-byte aligned
    cdef int64_t size
    cdef int device_type
    cdef int device_id
    cdef object __weakref__
    cdef int require_open(self) except -1
    cdef int lend(self, object buffer) except -1
    cdef int fill(self, ArrayView* view) except -1
    cdef tuple look(self)
