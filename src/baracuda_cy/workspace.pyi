# SPDX-License-Identifier: Apache-2.0
from types import TracebackType
from typing import Any, final

__all__ = ["Workspace"]

@final
class Workspace:
    def __init__(
        self,
        nbytes: int | None = None,
        *,
        device: Any = None,
        stream: Any = None,
        buffer: Any = None,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def ptr(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def closed(self) -> bool: ...
    def close(self) -> None: ...
    def __enter__(self) -> Workspace: ...
    def __exit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
