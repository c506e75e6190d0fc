# SPDX-License-Identifier: Apache-2.0
"""GGUF files, memory-mapped."""

from __future__ import annotations

import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from baracuda_cy.errors import Unsupported
from baracuda_cy.files.tensor_file import TensorFile
from baracuda_cy.formats import ElementKind, GgufBlockFormat
from baracuda_cy.tensor import GgufTensor

if TYPE_CHECKING:
    from baracuda_cy.files.gguf_header import Entry

__all__ = ["GgufFile", "open_gguf"]


class GgufFile(TensorFile):
    """The tensors of a GGUF file by name, memory-mapped; made by `open_gguf`.

    A tensor in a supported block format is a `GgufTensor`; float and integer tensors are read-only
    NumPy arrays, bfloat16 ones of the type of ml_dtypes. Nothing is read before it is used. Tensors
    stay valid after `close`. Pickled it is a path, which is opened anew.

    While tensors are in use, replace their file by renaming another over it, and never write it in
    place: values would change, and a file that becomes shorter kills the process (SIGBUS). Or copy
    them first, as ``.to("cuda")`` does.

    Attributes
    ----------
    path : str
        The file, the first one of a model in several.
    metadata : Mapping
        Its key-value pairs.
    types : Mapping
        GGUF type names of the tensors, such as ``"Q4_K"``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        try:
            from baracuda_cy.files.gguf_header import read
        except ImportError as error:
            raise Unsupported(
                "open_gguf: expected the gguf package, got no such module; install it, as in "
                "pip install baracuda-cy[gguf]"
            ) from error
        metadata, entries = read(self.path)
        self._entries = entries
        self.metadata = MappingProxyType(metadata)
        self.types = MappingProxyType({name: it.type_name for name, it in entries.items()})

    def _tensor(self, name: str, entry: Entry) -> Any:
        if entry.type_name in ElementKind.__members__:
            kind = ElementKind[entry.type_name]
            dtype = _bfloat16(name) if kind is ElementKind.BF16 else kind.dtype
            return entry.data.view(dtype).reshape(entry.shape)
        if entry.type_name not in GgufBlockFormat.__members__:
            supported = ", ".join(GgufBlockFormat.__members__)
            raise Unsupported(
                f"{name}: expected one of {supported} or a plain type, got {entry.type_name}; "
                "requantize the tensor to one of them"
            )
        return GgufTensor(entry.data, entry.type_name, entry.shape)


def _bfloat16(name: str) -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise Unsupported(
            f"{name}: NumPy has no bfloat16; install it, as in pip install ml_dtypes"
        ) from None
    return bfloat16


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Open a GGUF file: tensors by name, memory-mapped.

    The gguf package reads it: ``pip install "baracuda-cy[gguf]"``.

    Parameters
    ----------
    path : str or path-like
        The file. Of a model in several, such as ``model-00001-of-00003.gguf``, the first one; the
        others lie beside it.

    Returns
    -------
    GgufFile
        A mapping, and a context manager.

    Raises
    ------
    FileFormatError
        The file is no GGUF file, is truncated or is corrupt, the message names the tensor; or it is
        not the first one of a model in several, or another of those is missing.
    OSError
        The file cannot be read.
    InvalidProblem
        `path` is no path.
    Unsupported
        The gguf package is not installed.

    Examples
    --------
    >>> import baracuda_cy as bcy
    >>> with bcy.open_gguf("model.gguf") as model:
    ...     w = model["blk.0.ffn_up.weight"]
    >>> w.device
    'cpu'
    >>> w = w.to("cuda")  # doctest: +SKIP
    """
    return GgufFile(path)
