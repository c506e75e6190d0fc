# SPDX-License-Identifier: Apache-2.0
"""Packed weights in PyTorch: a layer that compiles, and that gradients go through.

`baracuda_cy.linear` takes tensors like any other arrays and needs nothing of this.

>>> import torch
>>> from baracuda_cy.torch import Linear
>>> layer = Linear.from_linear(torch.nn.Linear(256, 64), "Q4_K")
>>> layer(torch.ones(2, 3, 256)).shape
torch.Size([2, 3, 64])
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from baracuda_cy.descriptors import PlanPreference
from baracuda_cy.errors import InvalidProblem
from baracuda_cy.formats import Codebook, GgufBlockFormat, Nf4Layout
from baracuda_cy.ops import dequantize, linear, quantize
from baracuda_cy.tensor import GgufTensor, NestedAbsmax, Nf4Tensor

__all__ = ["Linear"]


# ---- weights as PyTorch's operators take them ----------------------------------------------------


class _How(NamedTuple):
    """What makes a weight of its arrays, and how it is multiplied."""

    options: dict[str, Any]
    preference: PlanPreference | None


def _text(weight: GgufTensor | Nf4Tensor, preference: PlanPreference | None) -> str:
    """Return a `_How` as text, which graphs hold, and files of exported programs.

    Layers that differ in what is not in it, such as the offset of nested absmax, share a graph.
    """
    options: dict[str, Any] = {"shape": weight.shape}
    if isinstance(weight, GgufTensor):
        options["format"] = weight.format.name
    else:
        options["codebook"] = weight.codebook.name
        options["layout"] = weight.layout.name
        options["block_size"] = weight.block_size
        options["dtype"] = weight.dtype and weight.dtype.dtype
        options["nested"] = weight.nested and weight.nested.block_size
    wishes = None if preference is None else asdict(preference)
    return json.dumps({"weight": options, "preference": wishes})


@lru_cache(256)
def _how(text: str) -> _How:
    parts = json.loads(text)
    options, wishes = parts["weight"], parts["preference"]
    if "format" in options:
        options["format"] = GgufBlockFormat[options["format"]]
    else:
        options["codebook"] = Codebook[options["codebook"]]
        options["layout"] = Nf4Layout[options["layout"]]
    options["shape"] = tuple(options["shape"])
    return _How(options, None if wishes is None else PlanPreference(**wishes))


def _arrays(weight: GgufTensor | Nf4Tensor) -> dict[str, torch.Tensor]:
    """Return the arrays of a weight by name, all as bytes: `Module.half` leaves those alone."""
    if isinstance(weight, GgufTensor):
        return {"data": _bytes(weight.data, weight.nbytes)}
    arrays = {"data": _bytes(weight.data), "absmax": _bytes(weight.absmax)}
    if weight.nested is not None:
        arrays["nested_code"] = _bytes(weight.nested.code)
        arrays["nested_absmax"] = _bytes(weight.nested.absmax)
    return arrays


def _bytes(array: Any, nbytes: int | None = None) -> torch.Tensor:
    if isinstance(array, np.ndarray):
        # Tensors can be written to: memory that cannot is copied.
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    elif isinstance(array, torch.Tensor):
        tensor = array.detach()
    else:
        tensor = torch.from_dlpack(array)
    return tensor.reshape(-1).view(torch.uint8)[:nbytes]


def _weight(arrays: list[torch.Tensor], offset: float, text: str) -> GgufTensor | Nf4Tensor:
    """Return the weight over its arrays."""
    options = dict(_how(text).options)
    if "format" in options:
        return GgufTensor(arrays[0], **options)
    data, absmax, *tables = arrays
    block_size = options.pop("nested")
    if block_size is None:
        return Nf4Tensor(data, absmax.view(torch.float32), **options)
    code, scales = (table.view(torch.float32) for table in tables)
    nested = NestedAbsmax(code, scales, offset, block_size)
    return Nf4Tensor(data, absmax, nested=nested, **options)


# ---- operators -----------------------------------------------------------------------------------


def _linear(
    x: torch.Tensor,
    arrays: list[torch.Tensor],
    offset: float,
    how: str,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    weight, preference = _weight_of(arrays, offset, how), _how(how).preference
    return linear(_plain(x).contiguous(), weight, _plain(bias), preference=preference)


def _plain(tensor: Any) -> Any:
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


# Weights of operators by the tensor of their codes, over another of the same memory, or they would
# keep each other alive. To make one anew takes as long as all the rest of a call.
_WEIGHTS = WeakIdKeyDictionary()


def _weight_of(arrays: list[torch.Tensor], offset: float, how: str) -> GgufTensor | Nf4Tensor:
    data, *others = arrays
    what = data.data_ptr(), data.numel(), offset, how
    known = _WEIGHTS.get(data)
    if known is None or known[0] != what or not all(map(is_, others, known[1])):
        known = what, others, _weight([data.detach(), *others], offset, how)
        _WEIGHTS[data] = known
    return known[2]  # type: ignore[no-any-return]


def _dequantize(
    arrays: list[torch.Tensor], offset: float, how: str, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty(_how(how).options["shape"], dtype=dtype, device=arrays[0].device)
    return dequantize(_weight_of(arrays, offset, how), out=out)


# Less than half of what torch.library.custom_op adds to each call. A Scalar may stay a symbol in a
# graph, where a float becomes a constant.
_LIBRARY = torch.library.Library("baracuda_cy", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor[] arrays, Scalar offset, str how, Tensor? bias) -> Tensor")
_LIBRARY.define("dequantize(Tensor[] arrays, Scalar offset, str how, ScalarType dtype) -> Tensor")
_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_linear_op = torch.ops.baracuda_cy.linear.default
_dequantize_op = torch.ops.baracuda_cy.dequantize.default


def _fake_linear(
    x: torch.Tensor,
    arrays: list[torch.Tensor],
    offset: float,
    how: str,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], _how(how).options["shape"][0]))


def _fake_dequantize(
    arrays: list[torch.Tensor], offset: float, how: str, dtype: torch.dtype
) -> torch.Tensor:
    return arrays[0].new_empty(_how(how).options["shape"], dtype=dtype)


torch.library.register_fake(_linear_op, _fake_linear, lib=_LIBRARY)
torch.library.register_fake(_dequantize_op, _fake_dequantize, lib=_LIBRARY)


class _Followed(torch.autograd.Function):  # type: ignore[misc]
    """The product where gradients are asked for: without, the operator alone is faster."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        offset: float,
        how: str,
        *arrays: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(*arrays)
        ctx.offset, ctx.how = offset, how
        return _linear_op(x, list(arrays), offset, how, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        of_x = of_bias = None
        arrays = list(ctx.saved_tensors)
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _dequantize_op(arrays, ctx.offset, ctx.how, gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return of_x, of_bias, None, None, *[None] * len(arrays)


# ---- the layer -----------------------------------------------------------------------------------


class Linear(torch.nn.Module):  # type: ignore[misc]
    """A linear layer over a packed weight, in place of `torch.nn.Linear`.

    It computes what `baracuda_cy.linear` does, with the same bits, eagerly, in ``torch.compile``
    and ``torch.export``. Gradients reach `x` and `bias`, not the weight: that of `x` is the
    gradient times the unpacked weight, which takes its memory for that long. So adapters such as
    LoRA's are trained beside it.

    The packed bytes are buffers: ``to(device)`` moves them and ``state_dict`` holds them, and a
    change of the module's dtype leaves them alone.

    Parameters
    ----------
    weight : GgufTensor or Nf4Tensor
        [out_features, in_features], over arrays that stay where they are; those that cannot be
        written to, as of a file that is open, are copied.
    bias : torch.Tensor, optional
        [out_features]; a parameter stays one. It is rounded to the dtype of `x`.
    preference : PlanPreference, optional
        As for `baracuda_cy.linear`.

    Attributes
    ----------
    in_features, out_features : int
    weight : GgufTensor or Nf4Tensor
        Over the buffers.
    bias : torch.nn.Parameter or None
    preference : PlanPreference or None

    Raises
    ------
    InvalidProblem
        No packed weight, or one that is no matrix, or a bias of another shape.

    Examples
    --------
    >>> import torch
    >>> import baracuda_cy as bcy
    >>> from baracuda_cy.torch import Linear
    >>> layer = Linear(bcy.quantize(torch.eye(64), "nf4"), bias=torch.ones(64))
    >>> layer
    Linear(in_features=64, out_features=64, bias=True, NF4)
    >>> bool((layer(torch.ones(64)) == 2).all())
    True
    """

    def __init__(
        self,
        weight: GgufTensor | Nf4Tensor,
        bias: torch.Tensor | None = None,
        *,
        preference: PlanPreference | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(weight, (GgufTensor, Nf4Tensor)) or not hasattr(weight, "device"):
            raise InvalidProblem(
                f"weight: expected a GgufTensor or an Nf4Tensor, got {type(weight).__name__}; "
                "quantize it, or use Linear.from_linear"
            )
        if len(weight.shape) != 2:
            raise InvalidProblem(
                f"weight: expected shape (out_features, in_features), got {weight!r}; "
                "take one of its matrices, as in weight[0]"
            )
        self.out_features, self.in_features = weight.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise InvalidProblem(
                f"bias: expected shape ({self.out_features},), got {tuple(bias.shape)}; reshape it"
            )
        self.preference = preference
        self._how = _text(weight, preference)
        nested = weight.nested if isinstance(weight, Nf4Tensor) else None
        self._offset = 0.0 if nested is None else nested.offset
        self._names = tuple(arrays := _arrays(weight))
        for name, array in arrays.items():
            self.register_buffer(name, array)
        if bias is not None and not isinstance(bias, torch.nn.Parameter):
            bias = torch.nn.Parameter(bias, requires_grad=bias.requires_grad)
        self.register_parameter("bias", bias)
        # What _current() gave, after what it was made of.
        self._made: tuple[list[Any], tuple[GgufTensor | Nf4Tensor, Any]] | None = None

    @classmethod
    def from_linear(
        cls,
        layer: torch.nn.Linear,
        format: GgufBlockFormat | Codebook | str,
        *,
        preference: PlanPreference | None = None,
        **options: Any,
    ) -> Linear:
        """Pack the weight of a `torch.nn.Linear`; the bias is shared.

        Parameters
        ----------
        layer : torch.nn.Linear
            float32, float16 or bfloat16, on the CPU or on CUDA, where the packed layer is as well.
        format : GgufBlockFormat, Codebook or str
            As of `baracuda_cy.quantize`.
        preference : PlanPreference, optional
            As for `baracuda_cy.linear`.
        **options
            ``block_size``, ``nested`` and ``threads`` of `baracuda_cy.quantize`.

        Returns
        -------
        Linear

        Raises
        ------
        InvalidProblem
            As `baracuda_cy.quantize` does.

        Examples
        --------
        >>> import torch
        >>> from baracuda_cy.torch import Linear
        >>> Linear.from_linear(torch.nn.Linear(64, 32, bias=False), "nf4", nested=True)
        Linear(in_features=64, out_features=32, bias=False, NF4)
        """
        weight = layer.weight.detach().contiguous()
        device = str(weight.device)
        # What bitsandbytes packs is packed where it is.
        kind = format.upper() if isinstance(format, str) else format
        if not (isinstance(kind, Codebook) or kind in Codebook.__members__):
            weight = weight.cpu()
        packed = quantize(weight, format, **options).to(device)
        return cls(packed, layer.bias, preference=preference)

    @property
    def weight(self) -> GgufTensor | Nf4Tensor:
        """The packed weight, over the buffers."""
        return self._current()[0]

    def _current(self) -> tuple[GgufTensor | Nf4Tensor, torch.Tensor | None]:
        """Return the weight, and the bias without its gradient, over what the module has now."""
        bias = self.bias
        has = [*self._arrays(), bias]
        # Modules that move have other tensors then.
        if self._made is None or not all(map(is_, has, self._made[0])):
            weight = _weight(has[:-1], self._offset, self._how)
            self._made = has, (weight, None if bias is None else bias.detach())
        return self._made[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ dequantize(weight).T + bias``.

        Parameters
        ----------
        x : torch.Tensor
            [..., in_features], float32, float16 or bfloat16, on the device of the layer; rounded to
            autocast's dtype where that is on.

        Returns
        -------
        torch.Tensor
            [..., out_features], of the dtype of `x`.
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        bias = self.bias
        followed = torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        )
        if followed or torch.compiler.is_compiling():
            bias = None if bias is None else bias.to(x.dtype)
            if followed:
                return _Followed.apply(x, bias, self._offset, self._how, *self._arrays())
            return _linear_op(x, self._arrays(), self._offset, self._how, bias)
        weight, bias = self._current()
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return linear(x.contiguous(), weight, bias, preference=self.preference)

    def extra_repr(self) -> str:
        """Return what the repr of a module shows."""
        options = _how(self._how).options
        kind = options["format"] if "format" in options else options["codebook"]
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {kind.name}"

    def _arrays(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in self._names]

    def get_extra_state(self) -> torch.Tensor:
        """Return what makes a weight of the buffers, for `state_dict`: JSON as bytes."""
        state = {**json.loads(self._how)["weight"], "offset": self._offset}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take what another layer's buffers are, which has to be what this one's are."""
        given = json.loads(bytes(state.tolist()))
        offset = given.pop("offset")
        own = json.loads(self._how)["weight"]
        if given != own:
            raise InvalidProblem(
                f"state_dict: expected a weight of {own}, got one of {given}; "
                "load it into a layer like the one that was saved"
            )
        self._offset, self._made = offset, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}
