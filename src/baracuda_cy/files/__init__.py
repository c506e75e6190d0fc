# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as they are on disk."""

from __future__ import annotations

import os
from typing import Any

from baracuda_cy.errors import InvalidProblem


def name_of(path: Any) -> str:
    """Return the name of a file that the user gave."""
    if not isinstance(path, str | os.PathLike):
        raise InvalidProblem(
            f"path: expected a str or a path-like, got {type(path).__name__}; pass the file's name"
        )
    name = os.fsdecode(path)
    try:
        if b"\0" in os.fsencode(name):
            raise ValueError
    except ValueError:
        raise InvalidProblem(
            f"path: expected a name that a file can have, got {name!r:.100}; correct it"
        ) from None
    return name
