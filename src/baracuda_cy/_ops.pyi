# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baracuda_cy.descriptors import PlanPreference
from baracuda_cy.formats import Codebook, ElementKind, GgufBlockFormat
from baracuda_cy.tensor import PackedWeight

def multiply(
    x: Any, w: PackedWeight, bias: Any, out: Any, stream: Any, preference: PlanPreference | None
) -> Any: ...
def unpack(
    w: PackedWeight, dtype: Any, out: Any, stream: Any, preference: PlanPreference | None
) -> Any: ...
def pack(
    array: Any, block_format: GgufBlockFormat, threads: int
) -> tuple[Any, tuple[int, ...]]: ...
def encode(
    array: Any, codebook: Codebook, block_size: int, nested: bool, threads: int
) -> tuple[Any, Any, tuple[Any, Any, float] | None, tuple[int, ...], ElementKind]: ...
def require_values(array: Any, name: str) -> None: ...
def fetch(data: Any, stream: Any = None) -> NDArray[np.uint8]: ...
def move(data: Any, nbytes: int | None, device: Any, stream: Any) -> Any: ...
