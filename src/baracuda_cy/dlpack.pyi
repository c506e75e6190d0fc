# SPDX-License-Identifier: Apache-2.0
from typing import Any, TypedDict

from baracuda_cy.formats import ElementKind

__all__ = ["describe", "inspect"]

class _Seen(TypedDict):
    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element: ElementKind | None
    device: str
    readonly: bool
    foreign_order: bool
    protocol: str

def describe(array: Any) -> str: ...
def inspect(array: Any, stream: Any = None) -> _Seen: ...
