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
cdef class DeviceArray:
    cdef DeviceMemory memory
    cdef readonly DeviceBuffer buffer
    cdef ArrayView view           # borrowed from `memory`
    cdef object __weakref__
    cdef DeviceMemory require_made(self)
    cdef int64_t byte_size(self) noexcept


cdef enum:
    ALIGNMENT = 256    # of what is allocated

cdef DeviceMemory allocate_device(int64_t nbytes, int device, StreamHandle order)
cdef HostMemory allocate_host(int64_t nbytes)
# Bytes of page-locked memory, which live_bytes tells: its owners count them.
cdef int64_t live_pinned

# A size in bytes, as an argument.
cdef int64_t size_of(object value, str argument) except -1
# Bytes of a contiguous array; any other is refused.
cdef int64_t span_of(ArrayView* view, str name, object array) except -1
# The device of an allocation, from its stream and the device asked for.
cdef int place_of(StreamHandle order, object device) except -1
