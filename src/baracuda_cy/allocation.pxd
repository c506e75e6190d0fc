# SPDX-License-Identifier: Apache-2.0
cimport cython


@cython.final
cdef class Allocation:
    # Memory for a result, in two steps because a JAX array cannot be written once it is one:
    # `target` is what the kernel writes (pass it to acquire_view); after the launch, finish() gives
    # the array of the prototype's own framework. Scratch is settled instead.
    cdef object target
    cdef object prototype
    cdef int kind
    cdef object finish(self)
    cdef int settle(self) except -1


cdef Allocation allocate_like(
    object prototype, tuple shape, int element, int device_type, int device_id, void* stream)
# Whether this is asked from inside Allocation.finish(), while JAX takes the result over.
cdef bint exporting_to_jax() noexcept
