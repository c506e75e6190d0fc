# SPDX-License-Identifier: Apache-2.0
cimport cython


@cython.final
@cython.no_gc_clear
cdef class StreamHandle:
    # A cudaStream_t and what keeps it valid: itself when `owned`, else `owner`. Streams, buffers and events share it,
    # so that closing a Stream never pulls it from under a buffer that will be freed on it.
    cdef void* raw
    cdef int device       # -1: a default stream, which belongs to whichever device the work is on
    cdef bint owned
    cdef int pid
    cdef object owner


@cython.final
cdef class Stream:
    cdef StreamHandle native     # None once closed
    cdef int _priority
    cdef object __weakref__


@cython.final
cdef class Event:
    cdef void* raw
    cdef int _device
    cdef bint timing
    cdef bint recorded
    cdef bint _closed
    cdef int pid
    cdef object __weakref__


# The stream behind `stream`: a Stream, or anything with __cuda_stream__. None is not a stream; refuses integers.
# *device is -1 for the default streams, which run on whichever device the work is on.
cdef int stream_of(object stream, void** handle, int* device) except -1
# The same, with the handle that keeps it alive. None gives the legacy default stream.
cdef StreamHandle handle_of(object stream)
# A device ordinal from None (the current device), an int, "cuda", "cuda:1", a Stream or anything with __dlpack_device__.
cdef int cuda_ordinal(object device) except -1
