# SPDX-License-Identifier: Apache-2.0
"""What is asked of a plan: the problem it is for, and preferences; all are `Value` objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baracuda_cy.arguments import as_flag, as_integer, choose
from baracuda_cy.errors import InvalidProblem
from baracuda_cy.formats import Codebook, ElementKind, GgufBlockFormat, Nf4Layout
from baracuda_cy.values import Value, set_field

__all__ = [
    "GgufDequantizeDescriptor",
    "GgufMmvqDescriptor",
    "GgufMmvqMultiMDescriptor",
    "Nf4Descriptor",
    "Nf4MmvqMultiMDescriptor",
    "PlanPreference",
]

# More are clamped to it by the pool.
MOST_THREADS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanPreference(Value):
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
            set_field(self, "threads", as_integer(self.threads, "threads"))
            if not 1 <= self.threads <= MOST_THREADS:
                raise InvalidProblem(
                    f"threads: expected 1 to {MOST_THREADS}, got {self.threads}; "
                    "leave it out for the default"
                )


def _normalize(descriptor: Any, default_output: str | None = None) -> None:
    for name in ("nrows", "ncols", "m", "w_start_byte_offset"):
        if hasattr(descriptor, name):
            set_field(descriptor, name, as_integer(getattr(descriptor, name), name))
    set_field(descriptor, "block_format", GgufBlockFormat.of(descriptor.block_format))
    _set_types(descriptor, default_output)


def _set_types(descriptor: Any, default_output: str | None) -> None:
    if hasattr(descriptor, "activation"):
        set_field(descriptor, "activation", ElementKind.of(descriptor.activation, "activation"))
    output = descriptor.output
    if output is None:
        output = default_output or descriptor.activation
    set_field(descriptor, "output", ElementKind.of(output, "output"))


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufMmvqDescriptor(Value):
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
class GgufMmvqMultiMDescriptor(Value):
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
class GgufDequantizeDescriptor(Value):
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Nf4Descriptor(Value):
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
            set_field(self, name, as_integer(getattr(self, name), name))
        set_field(self, "codebook", choose(Codebook, self.codebook, "codebook"))
        set_field(self, "layout", choose(Nf4Layout, self.layout, "layout"))
        for name in ("nested", "bias"):
            as_flag(getattr(self, name), name)
        _set_types(self, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Nf4MmvqMultiMDescriptor(Value):
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
            set_field(self, "base", Nf4Descriptor(**self.base))
        if not isinstance(self.base, Nf4Descriptor):
            raise InvalidProblem(
                f"base: expected an Nf4Descriptor, got {type(self.base).__name__}; "
                "pass Nf4Descriptor(n=..., k=..., ...)"
            )
        set_field(self, "m", as_integer(self.m, "m"))
