# SPDX-License-Identifier: Apache-2.0
"""What the value objects share: descriptors, preferences and what a plan says of itself.

All are keyword-only, frozen and hashable, and their repr evaluates back. A field that holds an enum
accepts the member, its name or its value; the constructors are spelled out for type checkers, which
would take the type of the field for that of the argument.
"""

from __future__ import annotations

from dataclasses import fields
from enum import IntEnum
from typing import Any


def set_field(instance: Any, name: str, value: Any) -> None:
    object.__setattr__(instance, name, value)


def _plain(value: Any) -> Any:
    if isinstance(value, IntEnum):
        return value.name
    return value.to_dict() if hasattr(value, "to_dict") else value


class Value:
    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values, enum members by their names."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]
