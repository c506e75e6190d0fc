# SPDX-License-Identifier: Apache-2.0
cimport cython

from baracuda_cy._native cimport bcy_nf4_dequantize_args, bcy_nf4_matmul_args, bcy_nf4_weight
from baracuda_cy.plan cimport Call, Plan


cdef class Nf4Plan(Plan):
    cdef object weight        # Nf4Tensor._problem of the weights it is for
    cdef bint nested

    cdef int bind_weight(self, object descriptor, bcy_nf4_weight* weight) except -1
    cdef str weight_problem(self, object descriptor)
    # Note the arrays of an Nf4Tensor, or of a weight given in parts; what they give is to be held.
    cdef object take(self, Call* call, object weight, object absmax, object nested)
    cdef object take_nested(self, Call* call, object nested)


cdef class Nf4ProductPlan(Nf4Plan):
    cdef bint has_bias
    cdef bcy_nf4_matmul_args args      # what does not change from call to call

    cdef int prepare(
        self, object device, object descriptor, object base, object m, object preference
    ) except -1
    cdef int apply(
        self, object weight, object activations, object output, object absmax, object nested,
        object bias, object workspace, object stream, bint start) except -1


@cython.final
cdef class Nf4MmvqPlan(Nf4ProductPlan):
    pass


@cython.final
cdef class Nf4MmvqMultiMPlan(Nf4ProductPlan):
    pass


@cython.final
cdef class Nf4DequantizePlan(Nf4Plan):
    cdef bcy_nf4_dequantize_args args

    cdef int fill(
        self, object weight, object output, object absmax, object nested, object stream,
        bint start) except -1
