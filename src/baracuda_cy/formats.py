# SPDX-License-Identifier: Apache-2.0
"""Element types, and how weights are packed: the tables that code, tests and documentation read."""

from __future__ import annotations

from enum import Enum
from typing import Any

from baracuda_cy.arguments import Named, as_index, choose, name_or_index
from baracuda_cy.errors import InvalidProblem, Unsupported

__all__ = ["Codebook", "ElementKind", "GgufBlockFormat", "Nf4Layout"]


class ElementKind(Named):
    """Type of one array element.

    Numbers are the package's own, because bfloat16 is no NumPy type. Accepted wherever a dtype is
    asked for: a member, a name (``"f16"``, ``"float16"``, ``"half"``), a ``numpy.dtype``, a
    ``torch.dtype`` or a JAX dtype.

    Examples
    --------
    >>> from baracuda_cy import ElementKind
    >>> ElementKind.of("float16"), ElementKind.BF16.dtype, ElementKind.F32.itemsize
    (ElementKind.F16, 'bfloat16', 4)
    """

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

    @classmethod
    def of(cls, dtype: Any, argument: str = "dtype") -> ElementKind:
        """Return the kind that `dtype` names.

        Parameters
        ----------
        dtype : ElementKind, str, int or a framework's dtype
            What to look up.
        argument : str, optional
            What a message calls it.

        Raises
        ------
        InvalidProblem
            `dtype` names none of the members.
        """
        if isinstance(dtype, cls):
            return dtype
        if not isinstance(dtype, str) and (isinstance(dtype, Enum) or as_index(dtype) is not None):
            return choose(cls, dtype, argument)
        if not getattr(dtype, "isnative", True):
            raise InvalidProblem(
                f"{argument}: expected native byte order, got {dtype!r}; "
                "convert the array, as in .astype(dtype.newbyteorder('='))"
            )
        # numpy.dtype has a name, scalar types of NumPy and JAX have a __name__, torch.float16
        # prints as that.
        name = "float64" if dtype is float else dtype
        if not isinstance(name, str):
            name = getattr(dtype, "name", None) or getattr(dtype, "__name__", dtype)
        kind = _KIND_OF_NAME.get(str(name).rpartition(".")[2].lower())
        if kind is None:
            raise InvalidProblem(
                f"{argument}: expected an ElementKind or a dtype, got {dtype!r}; "
                f"choose from {', '.join(_DTYPE)}"
            )
        return kind

    @property
    def dtype(self) -> str:
        """Name of the dtype in the frameworks, such as ``"float16"``."""
        return _DTYPE_OF_KIND[self]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _DTYPE[_DTYPE_OF_KIND[self]][1]


_DTYPE = {
    "float32": (ElementKind.F32, 4),
    "float16": (ElementKind.F16, 2),
    "bfloat16": (ElementKind.BF16, 2),
    "uint8": (ElementKind.U8, 1),
    "int8": (ElementKind.I8, 1),
    "int32": (ElementKind.I32, 4),
    "int64": (ElementKind.I64, 8),
    "float64": (ElementKind.F64, 8),
    "uint16": (ElementKind.U16, 2),
    "int16": (ElementKind.I16, 2),
    "uint32": (ElementKind.U32, 4),
    "uint64": (ElementKind.U64, 8),
    "bool": (ElementKind.BOOL, 1),
}
_DTYPE_OF_KIND = {kind: name for name, (kind, _) in _DTYPE.items()}
_KIND_OF_NAME = {
    **{name: kind for name, (kind, _) in _DTYPE.items()},
    **{kind.name.lower(): kind for kind in ElementKind},
    "fp32": ElementKind.F32,
    "float": ElementKind.F32,
    "single": ElementKind.F32,
    "fp16": ElementKind.F16,
    "half": ElementKind.F16,
    "double": ElementKind.F64,
    "bool_": ElementKind.BOOL,
}


class GgufBlockFormat(Named):
    """Block format of a packed GGUF weight; the numbers are ggml's type ids.

    Examples
    --------
    >>> from baracuda_cy import GgufBlockFormat
    >>> q = GgufBlockFormat("Q4_K")
    >>> q.block_size, q.type_size, q.row_bytes(4096)
    (256, 144, 2304)
    """

    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ4_NL = 20
    IQ4_XS = 23
    MXFP4 = 39

    @classmethod
    def of(cls, value: Any, argument: str = "block_format") -> GgufBlockFormat:
        """Return the format that `value` (member, name or ggml type id) stands for.

        Raises
        ------
        Unsupported
            A GGUF type, but none of the supported block formats.
        InvalidProblem
            No GGUF type at all.
        """
        if isinstance(value, cls):
            return value
        # Another library's enum of the same types, such as gguf's, counts by name.
        known = getattr(value, "name", value)
        key = name_or_index(known)
        name = str(known).upper()
        if isinstance(key, int):
            name = OTHER_GGUF_TYPES.get(key, ("",))[0]
        if any(name == other for other, _, _ in OTHER_GGUF_TYPES.values()):
            raise Unsupported(
                f"{argument}: expected one of {', '.join(cls.__members__)}, got {name}; "
                "requantize the tensor to one of them"
            )
        return choose(cls, known, argument)

    @property
    def block_size(self) -> int:
        """Elements of one block."""
        return _BLOCK[self][0]

    @property
    def type_size(self) -> int:
        """Bytes of one block."""
        return _BLOCK[self][1]

    @property
    def alignment(self) -> int:
        """Bytes that a packed matrix's first byte must be aligned to."""
        return _BLOCK[self][2]

    @property
    def bits_per_weight(self) -> float:
        """Average bits that one weight takes, its share of the scales included."""
        elements, size, _ = _BLOCK[self]
        return 8 * size / elements

    def row_bytes(self, ncols: int) -> int:
        """Return the bytes of one weight row of `ncols` elements.

        Raises
        ------
        InvalidProblem
            `ncols` is no integer, negative or no multiple of the block size.
        """
        elements, size, _ = _BLOCK[self]
        count = as_index(ncols)
        if count is None:
            raise InvalidProblem(
                f"ncols: expected an integer, got {ncols!r}; pass the number of columns"
            )
        if count < 0 or count % elements:
            raise InvalidProblem(
                f"ncols: expected a multiple of {elements} (the block size of {self.name}), "
                f"got {count}; pad the rows or choose a format with smaller blocks"
            )
        return count // elements * size


# elements per block, bytes per block, alignment in bytes
_BLOCK = {
    GgufBlockFormat.Q4_0: (32, 18, 2),
    GgufBlockFormat.Q4_1: (32, 20, 2),
    GgufBlockFormat.Q5_0: (32, 22, 2),
    GgufBlockFormat.Q5_1: (32, 24, 2),
    GgufBlockFormat.Q8_0: (32, 34, 2),
    GgufBlockFormat.Q2_K: (256, 84, 2),
    GgufBlockFormat.Q3_K: (256, 110, 2),
    GgufBlockFormat.Q4_K: (256, 144, 2),
    GgufBlockFormat.Q5_K: (256, 176, 2),
    GgufBlockFormat.Q6_K: (256, 210, 2),
    GgufBlockFormat.Q8_K: (256, 292, 4),
    GgufBlockFormat.IQ4_NL: (32, 18, 2),
    GgufBlockFormat.IQ4_XS: (256, 136, 2),
    GgufBlockFormat.MXFP4: (32, 17, 1),
}

# GGUF types that pack blocks too, with their elements and bytes: known so that a message can say
# which one a file holds, and whether it holds all of it.
OTHER_GGUF_TYPES = {
    9: ("Q8_1", 32, 36),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}


class Codebook(Named):
    """The 16 values that 4-bit codes stand for."""

    NF4 = 0
    """Quantiles of the normal distribution (QLoRA)."""
    FP4 = 1
    """A float of one sign bit, two of exponent and one of mantissa."""


class Nf4Layout(Named):
    """How two 4-bit codes share a byte of a packed [N, K] matrix."""

    BITSANDBYTES = 0
    """The matrix as one row: elements 2 j (high nibble) and 2 j + 1 (low nibble) in byte j."""
    ROW_PAIR = 1
    """Rows 2 i (low nibble) and 2 i + 1 (high nibble) of column k in byte i * K + k."""


def nf4_sizes(n: int, k: int, block_size: int, layout: Nf4Layout) -> tuple[int, int]:
    """Return the bytes of the codes and the number of blocks of an [n, k] weight.

    Raises
    ------
    InvalidProblem
        Sizes that are negative, too large or not to be expressed in the layout.
    """
    for name, size in (("n", n), ("k", k)):
        if not 0 <= size < 2**63:
            raise InvalidProblem(
                f"{name}: expected 0 to 2**63 - 1, got {size}; give the size in elements"
            )
    if n * k >= 2**61:
        raise InvalidProblem(
            f"n: expected a matrix whose bytes an int64 counts, got {n} rows of {k} columns; "
            "split the problem"
        )
    if layout is Nf4Layout.BITSANDBYTES:
        if not 32 <= block_size <= 4096 or block_size & (block_size - 1):
            raise InvalidProblem(
                "block_size: expected a power of two from 32 to 4096 in the bitsandbytes layout, "
                f"got {block_size}; quantize with one of them, or use the row_pair layout"
            )
    else:
        if not 1 <= block_size < 2**31:
            raise InvalidProblem(
                f"block_size: expected 1 to 2**31 - 1, got {block_size}; give it in elements"
            )
        if n % 2:
            raise InvalidProblem(
                f"n: expected an even number of rows in the row_pair layout, got {n}; "
                "add a row of zeros, or use the bitsandbytes layout"
            )
        if k % block_size:
            raise InvalidProblem(
                f"k: expected a multiple of {block_size} (block_size) in the row_pair layout, "
                f"got {k}; use smaller blocks, or the bitsandbytes layout"
            )
    return (n * k + 1) // 2, -(-n * k // block_size)
