# SPDX-License-Identifier: Apache-2.0
"""The C functions behind the plans, callable from Python on plain addresses, and kernels to compare
them with, launched as they are.

A benchmark needs the first to time the product without its staging, and to know what a launch costs
with no Python objects around it. Cython publishes what its modules share as capsules; ctypes makes
functions of them. It needs the second because CuPy launches no kernel that may overlap.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

ELEMENT = {"float32": 1, "float16": 2, "bfloat16": 3}


class MatmulArgs(ctypes.Structure):
    """`bcy_gguf_matmul_args` of api.h."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("nrows", ctypes.c_int64),
        ("ncols", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("x_type", ctypes.c_int32),
        ("y_type", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("overlap", ctypes.c_int32),
    ]


class Nf4QuantizeArgs(ctypes.Structure):
    """`bcy_nf4_quantize_args` of api.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("codebook", ctypes.c_int32),
        ("x_type", ctypes.c_int32),
        ("device", ctypes.c_int32),
    ]


def exported(module: Any, name: str, prototype: Any) -> Any:
    """Return the function `name` of a Cython module's C interface."""
    capsule = module.__pyx_capi__[name]
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.argtypes, get_name.restype = [ctypes.py_object], ctypes.c_char_p
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.argtypes, get_pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    return prototype(get_pointer(capsule, get_name(capsule)))


class Native:
    """Functions of one backend; a failing call raises what the package raises.

    `stage` and `matmul`, of GGUF, and `nf4_quantize` take the arguments' address and a stream, or a
    number of threads.
    `workspace_size` takes the arguments' address and returns the bytes that both take. On CUDA
    `matmul` stages too, unless x is NULL: then it multiplies what the workspace holds.

    Parameters
    ----------
    device : {"cuda", "cpu"}
        The backend.
    """

    def __init__(self, device: str) -> None:
        # PYFUNCTYPE keeps the GIL, as a plain C caller would not have one to give up.
        if device == "cuda":
            from baracuda_cy import _cuda as module

            prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        else:
            from baracuda_cy import _cpu as module

            prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
        size = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
        self.stage = exported(module, "gguf_stage", prototype)
        self.matmul = exported(module, "gguf_matmul", prototype)
        self.nf4_quantize = exported(module, "nf4_quantize", prototype)
        self.workspace_size = exported(module, "gguf_workspace_size", size)


def address(arguments: ctypes.Structure) -> int:
    """Return where the arguments are; they must outlive the call."""
    return ctypes.addressof(arguments)


class LaunchAttribute(ctypes.Structure):
    """`CUlaunchAttribute` of cuda.h."""

    _fields_ = [("id", ctypes.c_int), ("value", ctypes.c_uint64 * 8)]


class LaunchConfig(ctypes.Structure):
    """`CUlaunchConfig` of cuda.h."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    ]


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed.
OVERLAP = LaunchAttribute(6, (1,))


class Driver:
    """The CUDA driver, for launches that may overlap with the kernel ahead of them."""

    def __init__(self) -> None:
        self.launch_kernel = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        self.launch_kernel.argtypes = [ctypes.c_void_p] * 4
        self.launch_kernel.restype = ctypes.c_int

    def launch(
        self,
        function: int,
        blocks: int,
        threads: int,
        arguments: Sequence[Any],
        stream: int,
        overlap: bool,
    ) -> None:
        """Launch a kernel.

        Parameters
        ----------
        function : int
            The kernel's ``CUfunction``.
        blocks, threads : int
            The grid, and a block of it.
        arguments : sequence of ctypes values
            The kernel's arguments, each of its exact type.
        stream : int
            Handle of a stream.
        overlap : bool
            Whether the kernel may start before the one ahead of it is done.
        """
        config = LaunchConfig(
            grid=(blocks, 1, 1),
            block=(threads, 1, 1),
            stream=stream,
            attributes=ctypes.pointer(OVERLAP),
            attribute_count=int(overlap),
        )
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        status = self.launch_kernel(ctypes.addressof(config), function, pointers, None)
        if status:
            raise RuntimeError(f"cuLaunchKernelEx: CUDA error {status}")
