# SPDX-License-Identifier: Apache-2.0
"""Value objects: what is asked of a plan, and what a plan says about itself.

All are keyword-only, frozen and hashable, and their repr evaluates back. A field that holds an enum
accepts the member, its name or its value; the constructors are spelled out for type checkers, which
would take the type of the field for that of the argument.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from baracuda_cy.errors import InvalidProblem
from baracuda_cy.formats import ElementKind, GgufBlockFormat, Named, choose

__all__ = [
    "ArchSku",
    "BackendKind",
    "GgufDequantizeDescriptor",
    "GgufMmvqDescriptor",
    "GgufMmvqMultiMDescriptor",
    "KernelSku",
    "MathPrecision",
    "OpCategory",
    "PlanPreference",
    "PrecisionGuarantee",
    "QuantizeKind",
]


class OpCategory(Named):
    """Family that an operation belongs to."""

    QUANTIZATION = 16


class QuantizeKind(Named):
    """Operation within `OpCategory.QUANTIZATION`; not every one has a kernel in this version."""

    DEQUANTIZE_PER_GROUP = 23
    GGUF_DEQUANTIZE = 26
    GGUF_MMVQ = 27
    NF4_MMVQ = 28


class MathPrecision(Named):
    """What the multiply instructions multiply."""

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
        if known is not None or not isinstance(value, int) or value < 75:
            return known
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


def _integer(value: Any, argument: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidProblem(
            f"{argument}: expected an integer, got {value!r} of type {type(value).__name__}; "
            f"pass int({argument})"
        ) from None


def _flag(value: Any, argument: str) -> bool:
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
        multiplies them as they are. By default a plan takes its own path and `linear` the staged.
    threads : int, optional
        Threads of the CPU backend. By default the environment variable ``BARACUDA_THREADS``, else
        as many as the process may run on. The bits of a result do not depend on it.
    overlap : bool
        On CUDA, whether kernels may start while the kernel ahead of them in the stream still runs
        (programmatic dependent launch, compute capability 9.0 and up). They wait for it before they
        read activations or write anything, but fetch weights before that: set it where nothing
        still queued in the stream writes the weights, as is so for weights that were loaded once.
        The bits of a result do not depend on it. By default only the kernels of one call overlap.

    Raises
    ------
    InvalidProblem
        Another path, threads below 1 or above 1024, or an overlap that is no bool.

    Examples
    --------
    >>> from baracuda_cy import PlanPreference
    >>> PlanPreference(activations="float")
    PlanPreference(activations='float', threads=None, overlap=False)
    """

    activations: str | None = None
    threads: int | None = None
    overlap: bool = False

    def __post_init__(self) -> None:
        _flag(self.overlap, "overlap")
        if self.activations not in (None, "staged", "float"):
            raise InvalidProblem(
                f'activations: expected "staged", "float" or None, got {self.activations!r}; '
                "leave it out for the default"
            )
        if self.threads is not None:
            _set(self, "threads", _integer(self.threads, "threads"))
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
        What is multiplied.
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
            _flag(getattr(self, name), name)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelSku(_Value):
    """Which kernel a plan selected.

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
        Whether activations are quantized to int8 groups first or multiplied as they are; None where
        there are none.
    layout, epilogue : str, optional
        None: the kernels have one layout, and a bias is an argument of `run`.
    arch : ArchSku
        Machine that the kernel runs on.
    isa : str, optional
        CPU backend: instruction set that the products use.
    backend : BackendKind
        Whose kernel it is.
    precision_guarantee : PrecisionGuarantee
        What its bits promise.

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
            precision_guarantee: PrecisionGuarantee,
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
        if not isinstance(self.precision_guarantee, PrecisionGuarantee):
            raise InvalidProblem(
                "precision_guarantee: expected a PrecisionGuarantee, got "
                f"{self.precision_guarantee!r}"
            )


def _normalize(descriptor: Any, default_output: str | None = None) -> None:
    for name in ("nrows", "ncols", "m", "w_start_byte_offset"):
        if hasattr(descriptor, name):
            _set(descriptor, name, _integer(getattr(descriptor, name), name))
    _set(descriptor, "block_format", GgufBlockFormat.of(descriptor.block_format))
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
