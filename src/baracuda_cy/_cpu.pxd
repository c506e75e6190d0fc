# SPDX-License-Identifier: Apache-2.0
# The CPU half of the native code. Functions raise on failure; threads <= 0 takes default_threads().
from libc.stdint cimport int64_t

from baracuda_cy._native cimport (
    bcy_gguf_dequantize_args,
    bcy_gguf_matmul_args,
    bcy_gguf_quantize_args,
    bcy_nf4_dequantize_args,
    bcy_nf4_matmul_args,
    bcy_nf4_nest_args,
    bcy_nf4_quantize_args,
)

cdef int gguf_dequantize(const bcy_gguf_dequantize_args* args, int threads) except -1 nogil
cdef int gguf_matvec(const bcy_gguf_matmul_args* args, int threads) except -1 nogil
cdef int gguf_stage(const bcy_gguf_matmul_args* args, int threads) except -1 nogil
cdef int gguf_matmul(const bcy_gguf_matmul_args* args, int threads) except -1 nogil
cdef int gguf_quantize(const bcy_gguf_quantize_args* args, int threads) except -1 nogil
cdef int nf4_matmul(const bcy_nf4_matmul_args* args, int threads) except -1 nogil
cdef int nf4_dequantize(const bcy_nf4_dequantize_args* args, int threads) except -1 nogil
cdef int nf4_quantize(const bcy_nf4_quantize_args* args, int threads) except -1 nogil
cdef int nf4_nest(const bcy_nf4_nest_args* args, int threads) except -1 nogil
# -1 beyond int64
cdef int64_t gguf_workspace_size(const bcy_gguf_matmul_args* args) noexcept nogil
