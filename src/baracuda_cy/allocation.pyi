# SPDX-License-Identifier: Apache-2.0
from typing import Any, final

__all__ = ["empty_like"]

@final
class Allocation: ...

def empty_like(
    prototype: Any, shape: tuple[int, ...], dtype: Any = None, *, stream: Any = None
) -> Any: ...
