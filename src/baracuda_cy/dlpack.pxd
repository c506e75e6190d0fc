# SPDX-License-Identifier: Apache-2.0
from cpython.object cimport PyObject
from libc.stdint cimport int32_t, int64_t

from baracuda_cy._dlpack cimport DLPackExchangeAPI
from baracuda_cy.view cimport ArrayView


# `name` = argument's name for messages. stream: the CUDA stream the work will run on (NULL = legacy
# default); on_cuda_stream False: no CUDA work follows, nothing is ordered. The view must be
# released, also when it is borrowed (it is valid only as long as the caller holds `array`). On
# failure it keeps nothing.
cdef int acquire_view(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name) except -1
# The same, but never borrowed.
cdef int hold_view(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name) except -1
# The two halves of acquire_view, for calls of several arrays: whatever runs code of others, as the
# first half may, can take the memory from a borrowed view, so that all of those are acquired last.
# The first, which may check_no_grad as well, gives False where the view is to be borrowed; the
# second runs no code but the array's own library's.
cdef bint acquire_unless_borrowed(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name, bint no_grad
) except -1
cdef int borrow_view(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name) except -1
cdef bint is_borrowed(object array) except -1
# Refuses torch tensors with requires_grad=True; costs a look at the type for all others.
cdef int check_no_grad(object array, str name) except -1
# Refuses those with a tangent, which there are in torch's forward mode only: asked once a call.
cdef bint in_forward_mode() except -1
cdef int check_no_tangent(object array, str name) except -1
# Refuses those with the negative bit, whose memory has the opposite sign. Asking takes longer than
# the other checks of an argument together, and torch sets the bit for imaginary parts of conjugates
# alone: elements of those lie two apart but for what as_strided makes of them, so that a call asks
# where rows have one element each.
cdef int check_sign(object array, str name) except -1
# All of it, for what is looked at once.
cdef int check_plain(object array, str name) except -1
# 1 when the array's framework says on which CUDA stream it works now (exchange API, torch, CuPy,
# our buffers), else 0.
cdef int current_stream(object array, void** stream) except -1
# The same for an array that is expected on CUDA device `device_id`: torch tensors need not be read.
cdef int current_stream_on(object array, int32_t device_id, void** stream) except -1
# 1 if it is an array (device_type as in ArrayView), 0 if not.
cdef int device_of(
    object array, int32_t* device_type, int32_t* device_id, str name
) except -1
# Short text "float16[8, 4096] on cuda:0" for messages; the type's name for no array. Never raises.
cpdef object describe(object array)

# For this package's own types: `fill` fills all of the view, keep included (which must outlive
# close()), and *stream, the stream its memory is ordered on, when it is on CUDA.
ctypedef int (*fill_function)(object array, ArrayView* view, void** stream) except -1
cdef int register_type(object type_, fill_function fill) except -1

# How the arrays of a type are read, and whose they are.
cdef enum Route:
    NOT_AN_ARRAY
    OWN
    EXCHANGE
    DLPACK
    CUDA_INTERFACE
    BUFFER

cdef enum Framework:
    OTHER
    NUMPY
    MASKED
    TORCH
    CUPY
    JAX

cdef struct Kind:
    PyObject* type           # a reference: an address that is freed could become another type
    DLPackExchangeAPI* api
    fill_function fill
    Route route
    Framework framework
    bint unversioned         # its __dlpack__ knows no max_version

# Copies what is known about the type of an array.
cdef int copy_kind(object array, Kind* kind) except -1

# The error that a C function of the producer has set.
cdef int raised() except -1
cdef int too_many_dimensions(int64_t ndim, str name) except -1
