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
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from baracuda_cy.descriptors import PlanPreference
from baracuda_cy.dlpack import inspect
from baracuda_cy.errors import InvalidProblem
from baracuda_cy.formats import Codebook, GgufBlockFormat, Nf4Layout
from baracuda_cy.ops import check_packed, dequantize, linear, quantize
from baracuda_cy.tensor import GgufTensor, NestedAbsmax, Nf4Tensor

__all__ = ["Linear"]

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---- weights as PyTorch's operators take them ----------------------------------------------------


class _Spec(NamedTuple):
    """What makes a weight of its arrays, and how it is multiplied."""

    options: dict[str, Any]
    preference: PlanPreference | None


def _serialize(weight: GgufTensor | Nf4Tensor, preference: PlanPreference | None) -> str:
    """Return a `_Spec` as text, which graphs hold, and files of exported programs.

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
def _spec_of(text: str) -> _Spec:
    parts = json.loads(text)
    options, wishes = parts["weight"], parts["preference"]
    if "format" in options:
        options["format"] = GgufBlockFormat[options["format"]]
    else:
        options["codebook"] = Codebook[options["codebook"]]
        options["layout"] = Nf4Layout[options["layout"]]
    options["shape"] = tuple(options["shape"])
    return _Spec(options, None if wishes is None else PlanPreference(**wishes))


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
    # Tensors can be written to: what cannot, such as files and JAX's arrays, is copied.
    if isinstance(array, np.ndarray):
        array = array.reshape(-1).view(np.uint8)  # torch does not know all of NumPy's types
        return torch.from_numpy(array if array.flags.writeable else array.copy())[:nbytes]
    if isinstance(array, torch.Tensor):
        tensor = array.detach()
    else:
        tensor = torch.from_dlpack(array)
        if inspect(array)["readonly"]:
            tensor = tensor.clone()
    return tensor.reshape(-1).view(torch.uint8)[:nbytes]


def _floats(array: torch.Tensor) -> torch.Tensor:
    # Files that lie in memory as they are may put them anywhere.
    return (array.clone() if array.data_ptr() % 4 else array).view(torch.float32)


def _make_weight(arrays: list[torch.Tensor], offset: float, spec: str) -> GgufTensor | Nf4Tensor:
    """Return the weight over its arrays."""
    options = dict(_spec_of(spec).options)
    if "format" in options:
        return GgufTensor(arrays[0], **options)
    data, absmax, *tables = arrays
    block_size = options.pop("nested")
    if block_size is None:
        return Nf4Tensor(data, _floats(absmax), **options)
    code, scales = map(_floats, tables)
    nested = NestedAbsmax(code, scales, offset, block_size)
    return Nf4Tensor(data, absmax, nested=nested, **options)


# Weights by the tensor of their codes, over another of the same memory, or they would keep each
# other alive. To make one anew takes as long as all the rest of a call.
_WEIGHTS = WeakIdKeyDictionary()


def _weight_over(arrays: list[torch.Tensor], offset: float, spec: str) -> GgufTensor | Nf4Tensor:
    """Return the weight over its arrays, the same one as long as they have the same memory."""
    data, *others = arrays
    if any(array.data_ptr() % 4 for array in others):
        return _make_weight(arrays, offset, spec)  # over copies, which do not follow
    key = (*[array.data_ptr() for array in arrays], data.numel(), offset, spec)
    known = _WEIGHTS.get(data)
    if known is None or known[0] != key:
        known = key, _make_weight([data.detach(), *others], offset, spec)
        _WEIGHTS[data] = known
    return known[1]  # type: ignore[no-any-return]


# ---- operators -----------------------------------------------------------------------------------


def _linear(
    x: torch.Tensor,
    arrays: list[torch.Tensor],
    offset: float,
    spec: str,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    weight = _weight_over(arrays, offset, spec)
    x, bias = _detached(x).contiguous(), _detached(bias)
    return linear(x, weight, bias, preference=_spec_of(spec).preference)


def _detached(tensor: Any) -> Any:
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


def _dequantize(
    arrays: list[torch.Tensor], offset: float, spec: str, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty(_spec_of(spec).options["shape"], dtype=dtype, device=arrays[0].device)
    return dequantize(_weight_over(arrays, offset, spec), out=out)


# Less than half of what torch.library.custom_op adds to each call. A Scalar may stay a symbol in a
# graph, where a float becomes a constant.
_LIBRARY = torch.library.Library("baracuda_cy", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor[] arrays, Scalar offset, str spec, Tensor? bias) -> Tensor"
)
_LIBRARY.define("dequantize(Tensor[] arrays, Scalar offset, str spec, ScalarType dtype) -> Tensor")
_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_linear_op = torch.ops.baracuda_cy.linear.default
_dequantize_op = torch.ops.baracuda_cy.dequantize.default


def _fake_linear(
    x: torch.Tensor,
    arrays: list[torch.Tensor],
    offset: float,
    spec: str,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], _spec_of(spec).options["shape"][0]))


def _fake_dequantize(
    arrays: list[torch.Tensor], offset: float, spec: str, dtype: torch.dtype
) -> torch.Tensor:
    return arrays[0].new_empty(_spec_of(spec).options["shape"], dtype=dtype)


torch.library.register_fake(_linear_op, _fake_linear, lib=_LIBRARY)
torch.library.register_fake(_dequantize_op, _fake_dequantize, lib=_LIBRARY)


class _LinearFunction(torch.autograd.Function):  # type: ignore[misc]
    """The product where gradients are asked for: without, the operator alone is faster."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        offset: float,
        spec: str,
        *arrays: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(*arrays)
        ctx.offset, ctx.spec = offset, spec
        return _linear_op(x, list(arrays), offset, spec, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        of_x = of_bias = None
        arrays = list(ctx.saved_tensors)
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _dequantize_op(arrays, ctx.offset, ctx.spec, gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.sum_to_size(gradient.shape[-1])
        return of_x, of_bias, None, None, *[None] * len(arrays)


# ---- the layer -----------------------------------------------------------------------------------


class Linear(torch.nn.Module):  # type: ignore[misc]
    """A linear layer over a packed weight, in place of `torch.nn.Linear`.

    It computes what `baracuda_cy.linear` does, with the same bits, eagerly, in ``torch.compile``
    and, for inference, in ``torch.export``. Gradients reach `x` and `bias`, not the weight: that of
    `x` is the gradient times the unpacked weight, which takes its memory for that long. So adapters
    such as LoRA's are trained beside it.

    The packed bytes are buffers: ``to(device)`` moves them, ``state_dict`` holds them, with what
    they are, and a change of the module's dtype leaves them alone. What is loaded is written into
    the arrays of the weight that was given.

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
        Fixed when the layer is made.

    Raises
    ------
    InvalidProblem
        No packed weight, or one that is no matrix, or a bias that is no tensor of its rows.

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
        check_packed(weight, "weight")
        if len(weight.shape) != 2:
            raise InvalidProblem(
                f"weight: expected shape (out_features, in_features), got {weight!r}; "
                "take one of its matrices, as in weight[0]"
            )
        self.out_features, self.in_features = weight.shape
        if bias is not None and not isinstance(bias, torch.Tensor):
            raise InvalidProblem(
                f"bias: expected a torch.Tensor, got {type(bias).__name__}; convert it"
            )
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise InvalidProblem(
                f"bias: expected shape ({self.out_features},), got {tuple(bias.shape)}; reshape it"
            )
        self._spec = _serialize(weight, preference)
        nested = weight.nested if isinstance(weight, Nf4Tensor) else None
        self._offset = 0.0 if nested is None else nested.offset
        self._names = tuple(arrays := _arrays(weight))
        for name, array in arrays.items():
            self.register_buffer(name, array)
        if bias is not None and not isinstance(bias, torch.nn.Parameter):
            bias = torch.nn.Parameter(bias, requires_grad=bias.requires_grad)
        self.register_parameter("bias", bias)

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
        return _weight_over(self._arrays(), self._offset, self._spec)

    @property
    def preference(self) -> PlanPreference | None:
        """What products prefer."""
        return _spec_of(self._spec).preference

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
        if not x.is_meta and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind)) if x.dtype in _TYPES else x
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        followed = torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        )
        if followed:
            return _LinearFunction.apply(x, bias, self._offset, self._spec, *self._arrays())
        return _linear_op(x, self._arrays(), self._offset, self._spec, bias)

    def extra_repr(self) -> str:
        """Return what the repr of a module shows."""
        options = _spec_of(self._spec).options
        kind = options["format"] if "format" in options else options["codebook"]
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {kind.name}"

    def _arrays(self) -> list[torch.Tensor]:
        return [self._buffers[name] for name in self._names]

    def get_extra_state(self) -> torch.Tensor:
        """Return what makes a weight of the buffers, for `state_dict`: JSON as bytes."""
        state = {**json.loads(self._spec)["weight"], "offset": self._offset}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take what belongs to buffers that were loaded and is no array."""
        self._offset = json.loads(bytes(state.tolist()))["offset"]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Before anything is written: bytes of another format may be as many.
        state = state_dict.get(f"{prefix}_extra_state")
        if state is not None:
            own, given = json.loads(self._spec)["weight"], None
            with suppress(AttributeError, ValueError, TypeError):
                given = json.loads(bytes(state.tolist()))
            what = ("shape", "format", "codebook", "layout", "block_size", "nested")
            if not isinstance(given, dict) or any(own.get(it) != given.get(it) for it in what):
                error_msgs.append(
                    f"{prefix[:-1] or 'state_dict'}: expected a weight of {own}, got one of "
                    f"{given}; load it into a layer like the one that was saved"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
