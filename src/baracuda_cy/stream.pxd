# SPDX-License-Identifier: Apache-2.0
cimport cython
from libc.stdint cimport uintptr_t


@cython.final
@cython.no_gc_clear
cdef class StreamHandle:
    # A cudaStream_t and what keeps it valid: itself when `owned`, else `owner`. Streams and buffers
    # share it, so that closing a Stream never pulls it from under memory to be freed on it.
    cdef void* raw
    cdef int device       # -1: a default stream, which runs on whichever device the work is on
    cdef bint owned
    cdef int pid
    cdef object owner


@cython.final
cdef class Stream:
    cdef StreamHandle native     # None once closed
    cdef object __weakref__
    cdef StreamHandle open_handle(self)


@cython.final
cdef class Event:
    cdef void* raw               # made when it is first recorded
    cdef int _device
    cdef bint timing
    cdef bint recorded
    cdef bint _closed
    cdef int pid
    cdef object __weakref__
    cdef int create(self, int device) except -1
    cdef int destroy(self) noexcept
    cdef int require_open(self) except -1


# The stream behind `stream`: a Stream, or anything with __cuda_stream__. None is not a stream;
# integers are refused. *device is -1 for a default stream that does not say where it is.
cdef int stream_of(object stream, void** handle, int* device) except -1
# The same, with the handle that keeps it alive. None gives the legacy default stream.
cdef StreamHandle handle_of(object stream)
# A device ordinal from None (the current device), an int, "cuda", "cuda:1", torch.device, a Stream
# or a CUDA array with __dlpack_device__. Raises unless there is such a device.
cdef bint is_number(object value)
cdef int cuda_ordinal(object device) except -1

# A NULL handle and cudaStreamLegacy name the same stream.
cdef inline bint same_stream(void* a, void* b) noexcept nogil:
    return a == b or (<uintptr_t>a <= 1 and <uintptr_t>b <= 1)

# Makes later work on `later` wait for what is on `earlier`; both are on `device`. Does nothing when
# they are one stream, or when `later` is capturing a graph and `earlier` is not: an event from
# outside cannot enter a capture, so there the caller orders the two before capturing.
cdef int order_after(void* later, void* earlier, int device) except -1
# The same in a destructor: whatever fails is dropped, and nothing is drawn into a capture.
cdef void order_quietly(void* later, void* earlier, int device) noexcept
# Events without timing, lent from a pool per device.
cdef void* take_event(int device) except NULL
cdef void give_event(int device, void* event) noexcept
