# SPDX-License-Identifier: Apache-2.0
"""NF4 and FP4 checkpoints as bitsandbytes and transformers write them, memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from baracuda_cy.errors import InvalidProblem
from baracuda_cy.files import name_of
from baracuda_cy.files.tensor_file import TensorFile
from baracuda_cy.formats import ElementKind
from baracuda_cy.tensor import Nf4Tensor

if TYPE_CHECKING:
    from baracuda_cy.files.quant_state import Weight
    from baracuda_cy.files.safetensors import Entry, Output

__all__ = ["BitsandbytesFile", "open_bitsandbytes", "save_bitsandbytes"]


class BitsandbytesFile(TensorFile):
    """The tensors of a checkpoint by name, memory-mapped; made by `open_bitsandbytes`.

    A weight in NF4 or FP4 is one `Nf4Tensor` under its own name, such as ``"layer.weight"``, and
    the tensors that belong to it (``"layer.weight.absmax"`` and so on) are not listed; all others
    are read-only NumPy arrays, bfloat16 and float8 ones of the types of ml_dtypes. The bytes of a
    tensor are not read before it is used. Tensors stay valid after `close`. Pickled it is a path,
    which is opened anew.

    While tensors are in use, replace their file by renaming another over it, as `save_bitsandbytes`
    does, and never write it in place: values would change, and a file that becomes shorter kills
    the process (SIGBUS). Or copy them first, as ``.to("cuda")`` does.

    Attributes
    ----------
    path : str
        The file or folder.
    metadata : Mapping
        What the file says of itself, strings by name, such as ``{"format": "pt"}``.
    types : Mapping
        ``"NF4"`` or ``"FP4"``, and safetensors' type names of the other tensors, such as ``"F16"``.
    dtypes : Mapping
        Of the weights in NF4 and FP4: the type that they were quantized from, such as
        ``"bfloat16"``, which bitsandbytes dequantizes them to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from baracuda_cy.files.quant_state import weights_of
        from baracuda_cy.files.safetensors import checkpoint_in, read, read_index

        super().__init__(path)
        file = checkpoint_in(self.path) if os.path.isdir(self.path) else self.path
        metadata, entries = read_index(file) if file.endswith(".json") else read(file)
        weights, parts = weights_of(file, entries)
        self._entries = {
            name: weights.get(name, entry) for name, entry in entries.items() if name not in parts
        }
        self.metadata = MappingProxyType(metadata)
        self.dtypes = MappingProxyType({name: it.dtype for name, it in weights.items()})
        self.types = MappingProxyType(
            {
                name: weights[name].codebook.name if name in weights else entries[name].dtype
                for name in self._entries
            }
        )

    def _tensor(self, name: str, entry: Weight | Entry) -> Any:
        from baracuda_cy.files.quant_state import Weight
        from baracuda_cy.files.safetensors import as_array

        return entry.tensor(name) if isinstance(entry, Weight) else as_array(name, entry)


def open_bitsandbytes(path: str | os.PathLike[str]) -> BitsandbytesFile:
    """Open a checkpoint with weights in NF4 or FP4: tensors by name, memory-mapped.

    It is read as transformers' ``save_pretrained`` and safetensors of a bitsandbytes ``state_dict``
    write it, with NumPy alone; tensors in bfloat16 or float8 that are no 4-bit weights need
    ml_dtypes when they are asked for.

    Parameters
    ----------
    path : str or path-like
        A ``.safetensors`` file, the ``.safetensors.index.json`` of a checkpoint in several files,
        or the folder of either.

    Returns
    -------
    BitsandbytesFile
        A mapping, and a context manager.

    Raises
    ------
    FileFormatError
        The file is no safetensors file, is truncated or is corrupt, or what belongs to a weight is
        missing or does not fit; the message names file and key.
    OSError
        The file cannot be read.
    InvalidProblem
        `path` is no path, or a folder with several checkpoints.

    Examples
    --------
    >>> import baracuda_cy as bcy
    >>> with bcy.open_bitsandbytes("llama-bnb-4bit") as model:
    ...     w = model["model.layers.0.mlp.up_proj.weight"]
    >>> w.device
    'cpu'
    >>> w = w.to("cuda")  # doctest: +SKIP
    """
    return BitsandbytesFile(path)


def save_bitsandbytes(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: Any = None,
    quant_storage: Any = "uint8",
) -> None:
    """Write a safetensors file that bitsandbytes and transformers load to the same values.

    The file is written beside `path` and renamed when it is complete, so that `path` may be the
    file that the tensors are mapped from. It keeps the permissions of a file that was there; a
    symbolic link stays, and the file that it leads to is replaced. What transformers wants besides,
    ``config.json`` with its ``quantization_config``, is left to the caller.

    Parameters
    ----------
    path : str or path-like
        The file to write.
    tensors : mapping of str to Nf4Tensor or array
        Weights in the row_pair layout are converted, arrays on CUDA copied to the host.
    metadata : mapping of str to str, optional
        For the header, beside ``{"format": "pt"}``, which transformers asks for. By default that of
        `tensors`, where they are a `BitsandbytesFile`.
    dtype : ElementKind or dtype, or mapping of str to them, optional
        Type that bitsandbytes dequantizes the weights in NF4 and FP4 to, float16, bfloat16 or
        float32, for all of them or by name. By default the `dtype` of each, and float16 where that
        is None.
    quant_storage : ElementKind or dtype, optional
        Type that the codes are stored as: uint8 (default), float16, bfloat16 or float32. The bytes
        are the same.

    Raises
    ------
    InvalidProblem
        Names that collide or that would read back as something else, an array of a type that
        safetensors has no name for or that is not contiguous, or a weight that the bitsandbytes
        layout cannot express.
    OSError
        The file cannot be written, or `path` is a folder, a pipe or a device; it is as it was.

    Examples
    --------
    >>> import numpy as np
    >>> import baracuda_cy as bcy
    >>> w = bcy.quantize(np.eye(64, dtype=np.float32), "nf4")
    >>> bcy.save_bitsandbytes("model.safetensors", {"layer.weight": w})
    """
    from baracuda_cy.files.quant_state import STORAGE, outputs_of, parts_of
    from baracuda_cy.files.safetensors import output_of, write

    path = name_of(path)
    if not isinstance(tensors, Mapping):
        raise InvalidProblem(
            f"tensors: expected a mapping of names, got {type(tensors).__name__}; "
            'pass {"layer.weight": weight}'
        )
    if isinstance(tensors, BitsandbytesFile):
        metadata = tensors.metadata if metadata is None else metadata
    storage = ElementKind.of(quant_storage, "quant_storage")
    if storage not in STORAGE:
        raise InvalidProblem(
            f"quant_storage: expected {', '.join(it.dtype for it in STORAGE)}, "
            f"got {storage.dtype}; choose one of them"
        )
    outputs: dict[str, Output] = {}
    parts: set[str] = set()
    for name, tensor in tensors.items():
        _check_name(name)
        if isinstance(tensor, Nf4Tensor):
            more = outputs_of(name, tensor, _dtype_of(name, tensor, dtype), storage)
            parts |= more.keys() - {name}
        else:
            more = {name: output_of(name, tensor)}
        for key, output in more.items():
            if key in outputs:
                raise InvalidProblem(f"{key}: expected one tensor of this name, got two; rename it")
            outputs[key] = output
    claimed = {part for found in parts_of(outputs).values() for part in found.values()}
    if strange := sorted(claimed - parts):
        raise InvalidProblem(
            f"{strange[0]}: expected a name that is not that of a part of an Nf4Tensor; rename it"
        )
    write(path, outputs, _metadata_of(metadata))


def _check_name(name: Any) -> None:
    try:
        if name == "__metadata__":
            raise ValueError
        name.encode()
    except (AttributeError, ValueError):
        raise InvalidProblem(
            f"tensors: expected names as str other than __metadata__, got {name!r}; rename it"
        ) from None


def _metadata_of(metadata: Any) -> dict[str, str]:
    if metadata is None:
        metadata = {}
    try:
        pairs = {"format": "pt", **metadata}
        for text in (*pairs, *pairs.values()):
            text.encode()
    except (TypeError, AttributeError, ValueError):
        raise InvalidProblem(
            f"metadata: expected a mapping of str to str, got {metadata!r:.100}; convert it"
        ) from None
    return pairs


def _dtype_of(name: str, weight: Nf4Tensor, dtype: Any) -> str:
    from baracuda_cy.files.quant_state import DTYPES

    if dtype is None:
        return "float16" if weight.dtype is None else weight.dtype.dtype
    if isinstance(dtype, Mapping):
        if name not in dtype:
            raise InvalidProblem(
                f"dtype: expected the type of {name!r} in the mapping, got none; add it"
            )
        dtype = dtype[name]
    kind = ElementKind.of(dtype)
    if kind.dtype not in DTYPES:
        raise InvalidProblem(
            f"dtype: expected {', '.join(DTYPES)}, got {kind.dtype} for {name!r}; "
            "choose one of them"
        )
    return kind.dtype
