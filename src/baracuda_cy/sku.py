# SPDX-License-Identifier: Apache-2.0
"""Value objects: what is asked of a plan, and what a plan says about itself.

All are keyword-only, frozen and hashable, and their repr evaluates back. A field that holds an enum
accepts the member, its name or its value; the constructors are spelled out for type checkers, which
would take the type of the field for that of the argument.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from baracuda_cy.errors import InvalidProblem
from baracuda_cy.formats import ElementKind, GgufBlockFormat, Named, as_index, choose

__all__ = [
    "ArchSku",
    "BackendKind",
    "Codebook",
    "GgufDequantizeDescriptor",
    "GgufMmvqDescriptor",
    "GgufMmvqMultiMDescriptor",
    "KernelSku",
    "MathPrecision",
    "Nf4Descriptor",
    "Nf4Layout",
    "Nf4MmvqMultiMDescriptor",
    "OpCategory",
    "PlanPreference",
    "PrecisionGuarantee",
    "QuantizeKind",
]


class OpCategory(Named):
    """Family that an operation belongs to."""

    QUANTIZATION = 16


class QuantizeKind(Named):
    """Operation within `OpCategory.QUANTIZATION`."""

    DEQUANTIZE_PER_GROUP = 23
    GGUF_DEQUANTIZE = 26
    GGUF_MMVQ = 27
    NF4_MMVQ = 28


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


class MathPrecision(Named):
    """Precision of the multiplications; F32 is 24-bit integers with float activations of GGUF."""

    F16 = 0
    BF16 = 1
    TF32 = 2
    F32 = 3
    F64 = 4
    INT8 = 5


class BackendKind(Named):
    """Whose kernels run."""

    BESPOKE = 0
    """The CUDA kernels of this package."""
    CPU = 1
    """The C++ kernels of this package."""


class ArchSku(Named):
    """Machine that the kernel runs on: the CPU, or a CUDA compute capability times ten."""

    CPU = 0
    SM75 = 75
    SM80 = 80
    SM86 = 86
    SM87 = 87
    SM89 = 89
    SM90 = 90
    SM100 = 100
    SM103 = 103
    SM110 = 110
    SM120 = 120
    SM121 = 121

    @classmethod
    def _missing_(cls, value: object) -> Named | None:
        known = super()._missing_(value)
        if isinstance(value, str) and re.fullmatch(r"SM[1-9]\d{1,3}", value.upper()):
            value = int(value[2:])
        if known is not None or not isinstance(value, int) or value < 75:
            return known
        if value in cls._value2member_map_:
            return cls(value)
        # A GPU that came after this list runs the build's PTX, so it gets a member all the same.
        member = int.__new__(cls, value)
        member._name_ = f"SM{value}"
        member._value_ = value
        cls._value2member_map_[value] = member
        return member

    def __reduce_ex__(self, protocol: Any) -> tuple[type[ArchSku], tuple[int]]:
        # By value: early releases of Python 3.11 pickle by name, and find no such member.
        return ArchSku, (int(self),)

    def __repr__(self) -> str:
        return super().__repr__() if self.name in ArchSku.__members__ else f"ArchSku({int(self)})"


# More are clamped to it by the pool.
MOST_THREADS = 1024


def _set(instance: Any, name: str, value: Any) -> None:
    object.__setattr__(instance, name, value)


def as_integer(value: Any, argument: str) -> int:
    number = as_index(value)
    if number is None:
        raise InvalidProblem(
            f"{argument}: expected an integer, got {value!r} of type {type(value).__name__}; "
            f"pass int({argument})"
        )
    return number


def as_shape(shape: Any, itemsize: int) -> tuple[int, ...]:
    """Return the sizes of an array that can be, of which NumPy counts the empty ones as 1."""
    given = list(map(as_index, shape)) if hasattr(shape, "__iter__") else [None]
    sizes = tuple(size for size in given if size is not None)
    if len(sizes) < len(given):
        raise InvalidProblem(
            f"shape: expected a tuple of integers, got {shape!r}; pass sizes, as in (8, 4096)"
        )
    if min(sizes, default=0) < 0:
        raise InvalidProblem(
            f"shape: expected sizes of 0 or more, got {sizes}; pass sizes, as in (8, 4096)"
        )
    if math.prod(size or 1 for size in sizes) * itemsize >= 2**63:
        raise InvalidProblem(
            f"shape: expected an array of fewer than 2**63 bytes, got {sizes}, {itemsize} bytes "
            "an element; split it"
        )
    return sizes


def as_float32(value: Any, argument: str) -> float:
    """Return a number rounded to float32; beyond that it is infinite."""
    import numpy as np

    try:
        if isinstance(value, str | bytes | bytearray):
            raise TypeError
        with np.errstate(over="ignore"):
            return float(np.float32(float(value)))
    except (TypeError, ValueError, OverflowError):
        raise InvalidProblem(
            f"{argument}: expected a number, got {value!r}; pass one float"
        ) from None


def as_flag(value: Any, argument: str) -> bool:
    if value is not True and value is not False:
        raise InvalidProblem(
            f"{argument}: expected True or False, got {value!r}; pass bool({argument})"
        )
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, IntEnum):
        return value.name
    return value.to_dict() if hasattr(value, "to_dict") else value


class _Value:
    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values, enum members by their names."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanPreference(_Value):
    """Wishes that guide `select` and `linear`.

    Parameters
    ----------
    activations : {"staged", "float"}, optional
        Path of a product: ``"staged"`` quantizes the activations to int8 groups first, ``"float"``
        takes 24 bits of them with a GGUF weight, all of them with NF4 and FP4. By default a plan
        takes its own path and `linear` the staged.
    threads : int, optional
        Threads of the CPU backend. By default the environment variable ``BARACUDA_THREADS``, else
        as many as the process may run on. The bits of a result do not depend on it.
    overlap : bool
        On CUDA, whether kernels may start while the kernel ahead of them in the stream still runs
        (programmatic dependent launch, compute capability 9.0 and up). They wait for it before they
        read activations or write anything, but fetch weights before that: set it where nothing
        still queued in the stream writes the weights, as is so for weights that were loaded once.
        The bits of a result do not depend on it. By default only the kernels of one call overlap.
    bit_stable_across_hardware : bool
        Whether to ask for the kernel that has the same bits on every GPU and on the CPU where it is
        not the fastest one: NF4 and FP4 products on CUDA, which otherwise may multiply on tensor
        cores. All others have them anyway.

    Raises
    ------
    InvalidProblem
        Another path, threads below 1 or above 1024, or a flag that is no bool.

    Examples
    --------
    >>> from baracuda_cy import PlanPreference
    >>> PlanPreference(activations="float")
    PlanPreference(activations='float', threads=None, overlap=False, \
bit_stable_across_hardware=False)
    """

    activations: str | None = None
    threads: int | None = None
    overlap: bool = False
    bit_stable_across_hardware: bool = False

    def __post_init__(self) -> None:
        as_flag(self.overlap, "overlap")
        as_flag(self.bit_stable_across_hardware, "bit_stable_across_hardware")
        if self.activations not in (None, "staged", "float"):
            raise InvalidProblem(
                f'activations: expected "staged", "float" or None, got {self.activations!r}; '
                "leave it out for the default"
            )
        if self.threads is not None:
            _set(self, "threads", as_integer(self.threads, "threads"))
            if not 1 <= self.threads <= MOST_THREADS:
                raise InvalidProblem(
                    f"threads: expected 1 to {MOST_THREADS}, got {self.threads}; "
                    "leave it out for the default"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionGuarantee(_Value):
    """What the bits of a plan's results promise. A flag is set only where a test proves it.

    Parameters
    ----------
    math_precision : MathPrecision
        Precision of the multiplications.
    accumulator : ElementKind
        What products are added up in across a row.
    deterministic : bool
        The same call gives the same bits.
    bit_stable_on_same_hardware : bool
        So it does in another process, on another stream, in a graph's replay, at another alignment.
    batch_invariant : bool
        Token `m` of any batch has the bits it has alone.
    bit_stable_across_hardware : bool
        Every backend and GPU gives the bits of the CPU backend.

    Examples
    --------
    >>> from baracuda_cy import PrecisionGuarantee
    >>> PrecisionGuarantee(math_precision="F32", accumulator="float32").batch_invariant
    False
    """

    math_precision: MathPrecision
    accumulator: ElementKind
    deterministic: bool = False
    bit_stable_on_same_hardware: bool = False
    batch_invariant: bool = False
    bit_stable_across_hardware: bool = False

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            math_precision: MathPrecision | str | int,
            accumulator: Any,
            deterministic: bool = False,
            bit_stable_on_same_hardware: bool = False,
            batch_invariant: bool = False,
            bit_stable_across_hardware: bool = False,
        ) -> None: ...

    def __post_init__(self) -> None:
        _set(self, "math_precision", choose(MathPrecision, self.math_precision, "math_precision"))
        _set(self, "accumulator", ElementKind.of(self.accumulator, "accumulator"))
        for name in (
            "deterministic",
            "bit_stable_on_same_hardware",
            "batch_invariant",
            "bit_stable_across_hardware",
        ):
            as_flag(getattr(self, name), name)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelSku(_Value):
    """The path that a plan selected; kernels that give the same bits share one.

    Parameters
    ----------
    category : OpCategory
        Family of the operation.
    op : QuantizeKind
        The operation within it.
    element : ElementKind
        Type of the activations; of the output where there are none.
    aux_element : ElementKind, optional
        Type of the packed weight's storage.
    output_element : ElementKind
        Type of the output.
    block_format : GgufBlockFormat, optional
        How the weight is packed.
    activations : {"staged", "float"}, optional
        Whether activations are quantized to int8 groups first or not; None where there are none.
    layout : str, optional
        How the codes of an NF4 or FP4 weight lie: ``"bitsandbytes"`` or ``"row_pair"``.
    epilogue : str, optional
        ``"bias"`` where the descriptor asks for one; GGUF plans take one in any call.
    arch : ArchSku
        Machine that the kernel runs on.
    isa : str, optional
        CPU backend: instruction set that the products use.
    backend : BackendKind
        Whose kernel it is.
    precision_guarantee : PrecisionGuarantee
        What its bits promise; made of a mapping, as `to_dict` gives one.

    Examples
    --------
    >>> import numpy as np
    >>> import baracuda_cy as bcy
    >>> sku = bcy.quantize(np.eye(32, dtype=np.float32), "Q8_0").plan(m=4).sku
    >>> sku.activations, sku.backend, sku.to_dict()["block_format"]
    ('staged', BackendKind.CPU, 'Q8_0')
    """

    category: OpCategory
    op: QuantizeKind
    element: ElementKind
    aux_element: ElementKind | None = None
    output_element: ElementKind
    block_format: GgufBlockFormat | None = None
    activations: str | None = None
    layout: str | None = None
    epilogue: str | None = None
    arch: ArchSku
    isa: str | None = None
    backend: BackendKind
    precision_guarantee: PrecisionGuarantee

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            category: OpCategory | str | int,
            op: QuantizeKind | str | int,
            element: Any,
            aux_element: Any = None,
            output_element: Any,
            block_format: GgufBlockFormat | str | int | None = None,
            activations: str | None = None,
            layout: str | None = None,
            epilogue: str | None = None,
            arch: ArchSku | str | int,
            isa: str | None = None,
            backend: BackendKind | str | int,
            precision_guarantee: PrecisionGuarantee | Mapping[str, Any],
        ) -> None: ...

    def __post_init__(self) -> None:
        _set(self, "category", choose(OpCategory, self.category, "category"))
        _set(self, "op", choose(QuantizeKind, self.op, "op"))
        _set(self, "element", ElementKind.of(self.element, "element"))
        if self.aux_element is not None:
            _set(self, "aux_element", ElementKind.of(self.aux_element, "aux_element"))
        _set(self, "output_element", ElementKind.of(self.output_element, "output_element"))
        if self.block_format is not None:
            _set(self, "block_format", GgufBlockFormat.of(self.block_format))
        _set(self, "arch", choose(ArchSku, self.arch, "arch"))
        _set(self, "backend", choose(BackendKind, self.backend, "backend"))
        if self.activations not in (None, "staged", "float"):
            raise InvalidProblem(
                f'activations: expected "staged", "float" or None, got {self.activations!r}'
            )
        for name in ("layout", "epilogue", "isa"):
            if not isinstance(getattr(self, name), str | None):
                raise InvalidProblem(f"{name}: expected a str or None, got {getattr(self, name)!r}")
        if isinstance(self.precision_guarantee, Mapping):
            _set(self, "precision_guarantee", PrecisionGuarantee(**self.precision_guarantee))
        if not isinstance(self.precision_guarantee, PrecisionGuarantee):
            raise InvalidProblem(
                "precision_guarantee: expected a PrecisionGuarantee, got "
                f"{self.precision_guarantee!r}"
            )


def _normalize(descriptor: Any, default_output: str | None = None) -> None:
    for name in ("nrows", "ncols", "m", "w_start_byte_offset"):
        if hasattr(descriptor, name):
            _set(descriptor, name, as_integer(getattr(descriptor, name), name))
    _set(descriptor, "block_format", GgufBlockFormat.of(descriptor.block_format))
    _set_types(descriptor, default_output)


def _set_types(descriptor: Any, default_output: str | None) -> None:
    if hasattr(descriptor, "activation"):
        _set(descriptor, "activation", ElementKind.of(descriptor.activation, "activation"))
    output = descriptor.output
    if output is None:
        output = default_output or descriptor.activation
    _set(descriptor, "output", ElementKind.of(output, "output"))


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufMmvqDescriptor(_Value):
    """A packed weight times float activations: the problem of `GgufMmvqPlan`.

    Parameters
    ----------
    nrows, ncols : int
        Shape of the weight: N output features, K input features.
    m : int
        Number of activation vectors.
    block_format : GgufBlockFormat
        How the weight is packed.
    activation : ElementKind
        Type of the activations: float32, float16 or bfloat16.
    output : ElementKind, optional
        Type of the output: the activation's (default) or float32.
    w_start_byte_offset : int
        Byte of the weight buffer that the matrix starts at.

    Raises
    ------
    InvalidProblem, Unsupported
        A field of another type. Sizes are judged by ``select``.

    Examples
    --------
    >>> from baracuda_cy import GgufMmvqDescriptor
    >>> GgufMmvqDescriptor(nrows=8, ncols=256, block_format="Q4_K", activation="float16").output
    ElementKind.F16
    """

    nrows: int = 0
    ncols: int = 0
    m: int = 1
    block_format: GgufBlockFormat = GgufBlockFormat.Q8_0
    activation: ElementKind = ElementKind.F32
    output: ElementKind = None  # type: ignore[assignment]
    w_start_byte_offset: int = 0

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            nrows: int = 0,
            ncols: int = 0,
            m: int = 1,
            block_format: GgufBlockFormat | str | int = GgufBlockFormat.Q8_0,
            activation: Any = ElementKind.F32,
            output: Any = None,
            w_start_byte_offset: int = 0,
        ) -> None: ...

    def __post_init__(self) -> None:
        _normalize(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufMmvqMultiMDescriptor(_Value):
    """A packed weight times int8-staged activations: the problem of `GgufMmvqMultiMPlan`.

    Parameters
    ----------
    nrows, ncols : int
        Shape of the weight: N output features, K input features.
    m : int
        Number of activation vectors.
    block_format : GgufBlockFormat
        How the weight is packed.
    activation : ElementKind
        Type of the activations: float32, float16 or bfloat16.
    output : ElementKind
        Type of the output: float32 (default), float16 or bfloat16.
    w_start_byte_offset : int
        Byte of the weight buffer that the matrix starts at.

    Raises
    ------
    InvalidProblem, Unsupported
        A field of another type. Sizes are judged by ``select``.

    Examples
    --------
    >>> from baracuda_cy import GgufMmvqMultiMDescriptor
    >>> GgufMmvqMultiMDescriptor(nrows=8, ncols=256, m=4, block_format="Q4_K").output
    ElementKind.F32
    """

    nrows: int = 0
    ncols: int = 0
    m: int = 1
    block_format: GgufBlockFormat = GgufBlockFormat.Q8_0
    activation: ElementKind = ElementKind.F32
    output: ElementKind = ElementKind.F32
    w_start_byte_offset: int = 0

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            nrows: int = 0,
            ncols: int = 0,
            m: int = 1,
            block_format: GgufBlockFormat | str | int = GgufBlockFormat.Q8_0,
            activation: Any = ElementKind.F32,
            output: Any = ElementKind.F32,
            w_start_byte_offset: int = 0,
        ) -> None: ...

    def __post_init__(self) -> None:
        _normalize(self, "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufDequantizeDescriptor(_Value):
    """A packed weight to be unpacked: the problem of `GgufDequantizePlan`.

    Parameters
    ----------
    nrows, ncols : int
        Shape of the weight.
    block_format : GgufBlockFormat
        How the weight is packed.
    output : ElementKind
        Type of the output: float32 (default), float16 or bfloat16.
    w_start_byte_offset : int
        Byte of the weight buffer that the matrix starts at.

    Raises
    ------
    InvalidProblem, Unsupported
        A field of another type. Sizes are judged by ``select``.

    Examples
    --------
    >>> from baracuda_cy import GgufDequantizeDescriptor
    >>> GgufDequantizeDescriptor(nrows=8, ncols=256, block_format="Q4_K").output
    ElementKind.F32
    """

    nrows: int = 0
    ncols: int = 0
    block_format: GgufBlockFormat = GgufBlockFormat.Q8_0
    output: ElementKind = ElementKind.F32
    w_start_byte_offset: int = 0

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            nrows: int = 0,
            ncols: int = 0,
            block_format: GgufBlockFormat | str | int = GgufBlockFormat.Q8_0,
            output: Any = ElementKind.F32,
            w_start_byte_offset: int = 0,
        ) -> None: ...

    def __post_init__(self) -> None:
        _normalize(self, "float32")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Nf4Descriptor(_Value):
    """A weight in NF4 or FP4: the problem of `Nf4MmvqPlan` and `Nf4DequantizePlan`.

    Parameters
    ----------
    n, k : int
        Shape of the weight: N output features, K input features.
    block_size : int
        Elements that share an absmax: of the matrix as one row, so that blocks may run across the
        ends of its rows.
    codebook : Codebook
        What the codes stand for: NF4 (default) or FP4.
    layout : Nf4Layout
        How the codes lie: as in bitsandbytes (default), block sizes being powers of two from 32 to
        4096; or in pairs of rows, N being even and K a multiple of the block size.
    nested : bool
        Whether absmax is quantized itself, to 8 bits: bitsandbytes' double quantization.
    bias : bool
        Whether a product adds a bias.
    activation : ElementKind
        Type of the activations of a product: float16 (default), bfloat16 or float32.
    output : ElementKind, optional
        Type of the output: of a product the activation's (default) or float32, of a
        `Nf4DequantizePlan` any of the three.

    Raises
    ------
    InvalidProblem
        A field of another type. Sizes are judged by ``select``.

    Examples
    --------
    >>> from baracuda_cy import Nf4Descriptor
    >>> Nf4Descriptor(n=8, k=256, codebook="fp4", activation="bfloat16").output
    ElementKind.BF16
    """

    n: int = 0
    k: int = 0
    block_size: int = 64
    codebook: Codebook = Codebook.NF4
    layout: Nf4Layout = Nf4Layout.BITSANDBYTES
    nested: bool = False
    bias: bool = False
    activation: ElementKind = ElementKind.F16
    output: ElementKind = None  # type: ignore[assignment]

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            n: int = 0,
            k: int = 0,
            block_size: int = 64,
            codebook: Codebook | str | int = Codebook.NF4,
            layout: Nf4Layout | str | int = Nf4Layout.BITSANDBYTES,
            nested: bool = False,
            bias: bool = False,
            activation: Any = ElementKind.F16,
            output: Any = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        for name in ("n", "k", "block_size"):
            _set(self, name, as_integer(getattr(self, name), name))
        _set(self, "codebook", choose(Codebook, self.codebook, "codebook"))
        _set(self, "layout", choose(Nf4Layout, self.layout, "layout"))
        for name in ("nested", "bias"):
            as_flag(getattr(self, name), name)
        _set_types(self, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Nf4MmvqMultiMDescriptor(_Value):
    """A weight in NF4 or FP4 times any number of tokens: the problem of `Nf4MmvqMultiMPlan`.

    Parameters
    ----------
    base : Nf4Descriptor
        The weight, and the types of activations and output; made of a mapping, as `to_dict` gives
        one.
    m : int
        Number of activation vectors.

    Raises
    ------
    InvalidProblem
        A field of another type. Sizes are judged by ``select``.

    Examples
    --------
    >>> from baracuda_cy import Nf4Descriptor, Nf4MmvqMultiMDescriptor
    >>> Nf4MmvqMultiMDescriptor(base=Nf4Descriptor(n=8, k=256), m=4).base.block_size
    64
    """

    base: Nf4Descriptor = Nf4Descriptor()
    m: int = 1

    if TYPE_CHECKING:

        def __init__(
            self, *, base: Nf4Descriptor | Mapping[str, Any] = ..., m: int = 1
        ) -> None: ...

    def __post_init__(self) -> None:
        if isinstance(self.base, Mapping):
            _set(self, "base", Nf4Descriptor(**self.base))
        if not isinstance(self.base, Nf4Descriptor):
            raise InvalidProblem(
                f"base: expected an Nf4Descriptor, got {type(self.base).__name__}; "
                "pass Nf4Descriptor(n=..., k=..., ...)"
            )
        _set(self, "m", as_integer(self.m, "m"))
