# SPDX-License-Identifier: Apache-2.0
cimport cython
from libc.stdint cimport int64_t

from baracuda_cy.view cimport ArrayView


@cython.final
cdef class LentMemory:
    cdef object source            # viewed anew for each use
    cdef ArrayView view           # held: a bytearray, for one, is not resized meanwhile


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
