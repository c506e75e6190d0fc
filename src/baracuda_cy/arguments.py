# SPDX-License-Identifier: Apache-2.0
"""Checks of one argument: each gives the value in one type, or says what was expected."""

from __future__ import annotations

import math
import operator
from enum import Enum, IntEnum
from typing import Any, TypeVar

from baracuda_cy.errors import InvalidProblem


class Named(IntEnum):
    """An `IntEnum` looked up by number or by name, in any case, whose repr evaluates back."""

    @classmethod
    def _missing_(cls, value: object) -> Named | None:
        return cls.__members__.get(value.upper()) if isinstance(value, str) else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


_Member = TypeVar("_Member", bound=Named)


def choose(enum: type[_Member], value: Any, argument: str) -> _Member:
    """Return the member of `enum` that `value` (member, name or number) stands for."""
    try:
        return enum(value if isinstance(value, enum) else name_or_index(value))
    except ValueError:
        members = ", ".join(enum.__members__)
        kind = f"{'an' if enum.__name__[0] in 'AEIOU' else 'a'} {enum.__name__}"
        raise InvalidProblem(
            f"{argument}: expected {kind}, its name or its value, got {value!r}; "
            f"choose from {members}"
        ) from None


def as_index(value: Any) -> int | None:
    """Return an integer of any library; nobody's bool is one."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def name_or_index(value: Any) -> Any:
    """Return a name or an integer; another enum's member is at most a name."""
    if isinstance(value, str):
        return value
    return None if isinstance(value, Enum) else as_index(value)


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
