# SPDX-License-Identifier: Apache-2.0
"""The C functions behind the plans, callable from Python on plain addresses.

A benchmark needs them to time the product without its staging, and to know what a launch costs
with no Python objects around it. Cython publishes what its modules share as capsules; ctypes makes
functions of them.
"""

import ctypes
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


def exported(module: Any, name: str, prototype: Any) -> Any:
    """Return the function `name` of a Cython module's C interface."""
    capsule = module.__pyx_capi__[name]
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.argtypes, get_name.restype = [ctypes.py_object], ctypes.c_char_p
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.argtypes, get_pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    return prototype(get_pointer(capsule, get_name(capsule)))


class Native:
    """Staging and product of one backend; a failing call raises what the package raises.

    Parameters
    ----------
    device : {"cuda", "cpu"}
        The backend. Its functions take the arguments' address and a stream, or a number of threads.
    """

    def __init__(self, device: str) -> None:
        # PYFUNCTYPE keeps the GIL, as a plain C caller would not have one to give up.
        if device == "cuda":
            from baracuda_cy import _cuda as module

            prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        else:
            from baracuda_cy import _cpu as module

            prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
        self.stage = exported(module, "gguf_stage", prototype)
        self.matmul = exported(module, "gguf_matmul", prototype)


def address(arguments: MatmulArgs) -> int:
    """Return where the arguments are; they must outlive the call."""
    return ctypes.addressof(arguments)
