# SPDX-License-Identifier: Apache-2.0
"""Element types by the numbers of `ElementKind`: their names, their sizes, their dtypes."""

from baracuda_cy._dlpack cimport DLDataType, kDLBfloat, kDLBool, kDLFloat, kDLInt, kDLUInt

from baracuda_cy.errors import Unsupported
from baracuda_cy.formats import ElementKind

cdef const char* ELEMENT_NAMES[14]
ELEMENT_NAMES[:] = [
    b"an unsupported type", b"float32", b"float16", b"bfloat16", b"uint8", b"int8", b"int32",
    b"int64", b"float64", b"uint16", b"int16", b"uint32", b"uint64", b"bool",
]
cdef int ELEMENT_BYTES[14]
ELEMENT_BYTES[:] = [0, 4, 2, 2, 1, 1, 4, 8, 8, 2, 2, 4, 8, 1]


cdef int element_of(object dtype, str name) except -1:
    return ElementKind.of(dtype, name)


cdef int element_bytes(int element) noexcept nogil:
    return ELEMENT_BYTES[element] if 0 < element < 14 else 0


cdef str element_name(int element):
    return (<bytes>ELEMENT_NAMES[element if 0 < element < 14 else 0]).decode()


cdef DLDataType dlpack_dtype(int element) noexcept nogil:
    cdef DLDataType dtype
    dtype.bits = ELEMENT_BYTES[element] * 8
    dtype.lanes = 1
    if element == F32 or element == F16 or element == F64:
        dtype.code = kDLFloat
    elif element == BF16:
        dtype.code = kDLBfloat
    elif element == BOOL:
        dtype.code = kDLBool
    elif element == U8 or element == U16 or element == U32 or element == U64:
        dtype.code = kDLUInt
    else:
        dtype.code = kDLInt
    return dtype


cdef object numpy_dtype(int element, str name):
    import numpy as np

    if element != BF16:
        return np.dtype(element_name(element))
    try:
        import ml_dtypes
    except ImportError:
        raise Unsupported(
            f"{name}: NumPy has no bfloat16; install ml_dtypes, or ask for float32 or float16"
        ) from None
    return np.dtype(ml_dtypes.bfloat16)
