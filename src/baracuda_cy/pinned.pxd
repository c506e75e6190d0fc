# SPDX-License-Identifier: Apache-2.0
cimport cython
from libc.stdint cimport int64_t


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
