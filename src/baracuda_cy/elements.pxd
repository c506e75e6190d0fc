# SPDX-License-Identifier: Apache-2.0
from baracuda_cy._dlpack cimport DLDataType


# The numbers of ElementKind.
cdef enum:
    F32 = 1
    F16 = 2
    BF16 = 3
    U8 = 4
    I8 = 5
    I32 = 6
    I64 = 7
    F64 = 8
    U16 = 9
    I16 = 10
    U32 = 11
    U64 = 12
    BOOL = 13


# ElementKind value of a dtype: an ElementKind, a name, or a framework's dtype object.
cdef int element_of(object dtype, str name) except -1
cdef int element_bytes(int element) noexcept nogil   # 0 for 0
cdef str element_name(int element)                   # "float16"; "an unsupported type" for 0
cdef object numpy_dtype(int element, str name)       # bfloat16 from ml_dtypes, or Unsupported
cdef DLDataType dlpack_dtype(int element) noexcept nogil
