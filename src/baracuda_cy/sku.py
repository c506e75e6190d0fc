# SPDX-License-Identifier: Apache-2.0
"""What a plan says of itself: the path that it selected, and what the bits of that promise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baracuda_cy.arguments import Named, as_flag, choose
from baracuda_cy.errors import InvalidProblem
from baracuda_cy.formats import ElementKind, GgufBlockFormat
from baracuda_cy.values import Value, set_field

__all__ = [
    "ArchSku",
    "BackendKind",
    "KernelSku",
    "MathPrecision",
    "OpCategory",
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


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionGuarantee(Value):
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
        set_field(
            self, "math_precision", choose(MathPrecision, self.math_precision, "math_precision")
        )
        set_field(self, "accumulator", ElementKind.of(self.accumulator, "accumulator"))
        for name in (
            "deterministic",
            "bit_stable_on_same_hardware",
            "batch_invariant",
            "bit_stable_across_hardware",
        ):
            as_flag(getattr(self, name), name)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelSku(Value):
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
        set_field(self, "category", choose(OpCategory, self.category, "category"))
        set_field(self, "op", choose(QuantizeKind, self.op, "op"))
        set_field(self, "element", ElementKind.of(self.element, "element"))
        if self.aux_element is not None:
            set_field(self, "aux_element", ElementKind.of(self.aux_element, "aux_element"))
        set_field(self, "output_element", ElementKind.of(self.output_element, "output_element"))
        if self.block_format is not None:
            set_field(self, "block_format", GgufBlockFormat.of(self.block_format))
        set_field(self, "arch", choose(ArchSku, self.arch, "arch"))
        set_field(self, "backend", choose(BackendKind, self.backend, "backend"))
        if self.activations not in (None, "staged", "float"):
            raise InvalidProblem(
                f'activations: expected "staged", "float" or None, got {self.activations!r}'
            )
        for name in ("layout", "epilogue", "isa"):
            if not isinstance(getattr(self, name), str | None):
                raise InvalidProblem(f"{name}: expected a str or None, got {getattr(self, name)!r}")
        if isinstance(self.precision_guarantee, Mapping):
            set_field(self, "precision_guarantee", PrecisionGuarantee(**self.precision_guarantee))
        if not isinstance(self.precision_guarantee, PrecisionGuarantee):
            raise InvalidProblem(
                "precision_guarantee: expected a PrecisionGuarantee, got "
                f"{self.precision_guarantee!r}"
            )
