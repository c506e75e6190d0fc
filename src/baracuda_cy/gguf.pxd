# SPDX-License-Identifier: Apache-2.0
cimport cython
from libc.stdint cimport int32_t, int64_t

from baracuda_cy._native cimport bcy_gguf_dequantize_args, bcy_gguf_matmul_args
from baracuda_cy.plan cimport Plan


cdef class GgufProductPlan(Plan):
    cdef tuple weight         # GgufTensor._problem of the weights it is for
    cdef bint staged
    cdef bcy_gguf_matmul_args args     # what does not change from call to call

    cdef int prepare(self, object device, object descriptor, object preference) except -1
    cdef int64_t staged_bytes(self) except -1
    cdef int apply(
        self, object weight, object activations, object output, object bias, object workspace,
        object stream, bint start) except -1


@cython.final
cdef class GgufMmvqPlan(GgufProductPlan):
    pass


@cython.final
cdef class GgufMmvqMultiMPlan(GgufProductPlan):
    pass


@cython.final
cdef class GgufDequantizePlan(Plan):
    cdef tuple weight
    cdef bcy_gguf_dequantize_args args

    cdef int fill(self, object weight, object output, object stream, bint start) except -1
