# SPDX-License-Identifier: Apache-2.0
"""What files of tensors share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from baracuda_cy.errors import InvalidProblem
from baracuda_cy.files import name_of


class TensorFile(Mapping[str, Any]):
    """Tensors by name, each made when it is asked for. Subclasses fill `_entries` and the rest."""

    path: str
    metadata: Mapping[str, Any]
    types: Mapping[str, str]
    _entries: dict[str, Any]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = name_of(path)
        self._where = os.path.abspath(self.path)  # wherever the process goes
        self._closed = False

    def __getitem__(self, name: str) -> Any:
        if self._closed:
            raise InvalidProblem(
                f"{self.path}: expected an open file, got a closed one; open it again"
            )
        return self._tensor(name, self._entries[name])

    def _tensor(self, name: str, entry: Any) -> Any:
        raise NotImplementedError

    def __contains__(self, name: object) -> bool:
        return name in self.types

    def __iter__(self) -> Iterator[str]:
        return iter(self.types)

    def __len__(self) -> int:
        return len(self.types)

    def __reduce__(self) -> tuple[Any, ...]:
        # As its path, opened anew: what is mapped does not travel.
        return type(self), (self._where,)

    # A file equals itself alone: comparing its tensors, as mappings do, would read them all.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"{type(self).__name__}({self.path!r}, {len(self)} tensors{state})"

    def close(self) -> None:
        """Give no more tensors out; those given keep the file mapped."""
        self._closed, self._entries = True, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
