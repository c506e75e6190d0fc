# SPDX-License-Identifier: Apache-2.0
from typing import Any, TypedDict, final

from baracuda_cy.formats import ElementKind

__all__ = ["describe", "empty_like", "inspect", "pending"]

class _Seen(TypedDict):
    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element: ElementKind | None
    device: str
    readonly: bool
    foreign_order: bool
    protocol: str

@final
class Allocation: ...

def describe(array: Any) -> str: ...
def empty_like(
    prototype: Any, shape: tuple[int, ...], dtype: Any = None, *, stream: Any = None
) -> Any: ...
def inspect(array: Any, stream: Any = None) -> _Seen: ...
def pending() -> int: ...
