# SPDX-License-Identifier: Apache-2.0
"""The CPU half of the native code: the operations in C++, over the same formats as the kernels."""

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int32_t, int64_t

from baracuda_cy._cuda cimport check
from baracuda_cy._native cimport (
    bcy_cpu_default_threads,
    bcy_cpu_gguf_dequantize,
    bcy_cpu_gguf_matmul,
    bcy_cpu_gguf_matvec,
    bcy_cpu_gguf_quantize,
    bcy_cpu_gguf_stage,
    bcy_cpu_gguf_workspace_size,
    bcy_cpu_isa,
    bcy_cpu_nf4_dequantize,
    bcy_cpu_nf4_matmul,
    bcy_cpu_nf4_nest,
    bcy_cpu_nf4_quantize,
    bcy_cpu_xla_handler,
    bcy_gguf_block_bytes,
    bcy_gguf_block_elements,
)


cdef int fail(int status, const char* what) except -1 with gil:
    return check(status, (<bytes>what).decode())


cdef int gguf_dequantize(const bcy_gguf_dequantize_args* args, int threads) except -1 nogil:
    cdef int status = bcy_cpu_gguf_dequantize(args, threads)
    return fail(status, b"dequantizing on the CPU") if status else 0


cdef int gguf_matvec(const bcy_gguf_matmul_args* args, int threads) except -1 nogil:
    cdef int status = bcy_cpu_gguf_matvec(args, threads)
    return fail(status, b"multiplying on the CPU") if status else 0


cdef int gguf_stage(const bcy_gguf_matmul_args* args, int threads) except -1 nogil:
    cdef int status = bcy_cpu_gguf_stage(args, threads)
    return fail(status, b"staging activations on the CPU") if status else 0


cdef int gguf_matmul(const bcy_gguf_matmul_args* args, int threads) except -1 nogil:
    cdef int status = bcy_cpu_gguf_matmul(args, threads)
    return fail(status, b"multiplying staged activations on the CPU") if status else 0


cdef int gguf_quantize(const bcy_gguf_quantize_args* args, int threads) except -1 nogil:
    cdef int status = bcy_cpu_gguf_quantize(args, threads)
    return fail(status, b"quantizing on the CPU") if status else 0


cdef int nf4_matmul(const bcy_nf4_matmul_args* args, int threads) except -1 nogil:
    cdef int status = bcy_cpu_nf4_matmul(args, threads)
    return fail(status, b"multiplying on the CPU") if status else 0


cdef int nf4_dequantize(const bcy_nf4_dequantize_args* args, int threads) except -1 nogil:
    cdef int status = bcy_cpu_nf4_dequantize(args, threads)
    return fail(status, b"dequantizing on the CPU") if status else 0


cdef int nf4_quantize(const bcy_nf4_quantize_args* args, int threads) except -1 nogil:
    cdef int status = bcy_cpu_nf4_quantize(args, threads)
    return fail(status, b"quantizing on the CPU") if status else 0


cdef int nf4_nest(const bcy_nf4_nest_args* args, int threads) except -1 nogil:
    cdef int status = bcy_cpu_nf4_nest(args, threads)
    return fail(status, b"quantizing absmax values on the CPU") if status else 0


cdef int64_t gguf_workspace_size(const bcy_gguf_matmul_args* args) noexcept nogil:
    return bcy_cpu_gguf_workspace_size(args.format, args.ncols, args.m)


def default_threads():
    """Threads the CPU backend uses unless told otherwise.

    ``BARACUDA_THREADS`` when it is set, else the CPUs this process may run on.

    Returns
    -------
    int

    Examples
    --------
    >>> from baracuda_cy import _cpu
    >>> _cpu.default_threads() >= 1
    True
    """
    return bcy_cpu_default_threads()


def isa():
    """Instruction set that the products run on here.

    Returns
    -------
    str
        ``"avx512_vnni"``, ``"avx2"`` or ``"baseline"``.
    """
    return (<bytes>bcy_cpu_isa()).decode()


def block_layout(int32_t format):
    """Elements and bytes of one block as the native code has them.

    Parameters
    ----------
    format : int
        ggml type id.

    Returns
    -------
    tuple of int
        ``(elements, bytes)``, zeros for a format the kernels do not know.

    Examples
    --------
    >>> from baracuda_cy import _cpu
    >>> _cpu.block_layout(8)
    (32, 34)
    """
    return bcy_gguf_block_elements(format), bcy_gguf_block_bytes(format)


def xla_handler(str operation):
    """What JAX calls for an operation: a capsule, or None where there is none.

    Parameters
    ----------
    operation : str
        ``"gguf_matmul"``, ``"gguf_matvec"``, ``"gguf_dequantize"``, ``"nf4_matmul"`` or
        ``"nf4_dequantize"``.
    """
    cdef void* handler = <void*>bcy_cpu_xla_handler(operation.encode())
    return None if handler == NULL else PyCapsule_New(handler, NULL, NULL)
