# SPDX-License-Identifier: Apache-2.0
"""What a plan runs, as XLA is told: the operation's name, and its arguments as bytes (xla.h)."""

from libc.stdint cimport int64_t

from baracuda_cy._native cimport (
    bcy_gguf_dequantize_args,
    bcy_gguf_matmul_args,
    bcy_nf4_dequantize_args,
    bcy_nf4_matmul_args,
    bcy_nf4_weight,
)
from baracuda_cy.gguf cimport GgufDequantizePlan, GgufProductPlan
from baracuda_cy.nf4 cimport Nf4DequantizePlan, Nf4ProductPlan
from baracuda_cy.plan cimport Plan

# Stands for a buffer that the call has.
cdef void* GIVEN = <void*>1


cdef bytes packed(Plan plan, const void* args, size_t size):
    cdef int64_t threads = plan.threads
    return (<const char*>&threads)[:sizeof(threads)] + (<const char*>args)[:size]


cdef void fill_weight(bcy_nf4_weight* weight):
    weight.codes = GIVEN
    weight.absmax = GIVEN


cdef tuple gguf_product(GgufProductPlan plan, bint bias):
    cdef bcy_gguf_matmul_args args = plan.args
    args.weight = GIVEN
    args.x = GIVEN
    args.y = GIVEN
    args.bias = GIVEN if bias else NULL
    args.workspace = GIVEN if plan.workspace_size else NULL
    args.x_stride = args.ncols
    args.y_stride = args.nrows
    return "gguf_matmul" if plan.staged else "gguf_matvec", packed(plan, &args, sizeof(args))


cdef tuple nf4_product(Nf4ProductPlan plan, bint bias):
    cdef bcy_nf4_matmul_args args = plan.args
    fill_weight(&args.weight)
    args.x = GIVEN
    args.y = GIVEN
    args.bias = GIVEN if bias else NULL
    args.workspace = GIVEN if plan.workspace_size else NULL
    args.x_stride = args.weight.ncols
    args.y_stride = args.weight.nrows
    return "nf4_matmul", packed(plan, &args, sizeof(args))


cdef tuple gguf_dequantize(GgufDequantizePlan plan):
    cdef bcy_gguf_dequantize_args args = plan.args
    args.weight = GIVEN
    args.y = GIVEN
    args.y_stride = args.ncols
    return "gguf_dequantize", packed(plan, &args, sizeof(args))


cdef tuple nf4_dequantize(Nf4DequantizePlan plan):
    cdef bcy_nf4_dequantize_args args = plan.args
    fill_weight(&args.weight)
    args.y = GIVEN
    args.y_stride = args.weight.ncols
    return "nf4_dequantize", packed(plan, &args, sizeof(args))


def call_of(Plan plan, bint bias):
    """The operation of a plan and its arguments, for contiguous arrays and absmax not nested.

    Parameters
    ----------
    plan : Plan
    bias : bool
        Whether the product adds a bias.

    Returns
    -------
    tuple of str and bytes
    """
    plan.require_selected()
    if isinstance(plan, GgufProductPlan):
        return gguf_product(plan, bias)
    if isinstance(plan, Nf4ProductPlan):
        return nf4_product(plan, bias)
    if isinstance(plan, GgufDequantizePlan):
        return gguf_dequantize(plan)
    return nf4_dequantize(plan)
