# SPDX-License-Identifier: Apache-2.0
# Plain method descriptors: half the cost of a call of Cython's own functions under the limited API.
# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""The plans of weights in NF4 and FP4."""

cimport cython
from cpython.ref cimport PyObject
from cpython.type cimport PyType_IsSubtype

from baracuda_cy cimport _cpu, _cuda
from baracuda_cy._native cimport bcy_nf4_dequantize_args, bcy_nf4_matmul_args, bcy_nf4_weight
from baracuda_cy.dlpack cimport describe
from baracuda_cy.elements cimport F32, U8
from baracuda_cy.plan cimport (
    ABSMAX,
    ACTIVATIONS,
    BIAS,
    CODES,
    HOST,
    NESTED,
    NESTED_ABSMAX,
    NESTED_CODE,
    OUTPUT,
    SCALES,
    SLOTS,
    WEIGHT,
    WORKSPACE,
    Call,
    Plan,
    begin,
    check_descriptor,
    check_floating,
    checked,
    invalid,
    set_matrix,
    set_operand,
)

from functools import lru_cache

from baracuda_cy.descriptors import Nf4Descriptor, Nf4MmvqMultiMDescriptor
from baracuda_cy.formats import ElementKind, nf4_sizes
from baracuda_cy.plan import accepts
from baracuda_cy.sku import MathPrecision, QuantizeKind
from baracuda_cy.tensor import NestedAbsmax, Nf4Tensor, PackedWeight

cdef type tensor_type = Nf4Tensor
cdef type nested_type = NestedAbsmax
cdef type weight_type = PackedWeight


cdef void fill_weight(bcy_nf4_weight* weight, const Call* call) noexcept nogil:
    weight.codes = call.data[WEIGHT]
    weight.absmax = call.data[ABSMAX]
    weight.nested_absmax = <const float*>call.data[NESTED_ABSMAX]
    weight.nested_code = <const float*>call.data[NESTED_CODE]
    weight.nested_block = call.nested_block
    weight.nested_offset = call.nested_offset


cdef class Nf4Plan(Plan):
    """What the plans of NF4 and FP4 weights share."""

    cdef int bind_weight(self, object descriptor, bcy_nf4_weight* weight) except -1:
        d = descriptor
        nbytes, blocks = nf4_sizes(d.n, d.k, d.block_size, d.layout)
        self.slots = SLOTS
        self.nested = d.nested
        self.weight = (d.n, d.k, d.block_size, int(d.codebook), int(d.layout), d.nested)
        set_operand(&self.operands[WEIGHT], CODES, U8, nbytes, 1)
        if d.nested:
            set_operand(&self.operands[ABSMAX], SCALES, U8, blocks, 1)
            set_operand(&self.operands[NESTED_ABSMAX], NESTED, F32, blocks, 4)
            set_operand(&self.operands[NESTED_CODE], SCALES, F32, 256, 4)
        else:
            set_operand(&self.operands[ABSMAX], SCALES, F32, blocks, 4)
        weight.nrows = d.n
        weight.ncols = d.k
        weight.block_size = d.block_size
        weight.codebook = d.codebook
        weight.layout = d.layout
        return 0

    cdef str weight_problem(self, object descriptor):
        cdef object d = descriptor
        nested = ", nested absmax" if d.nested else ""
        return (
            f"{d.codebook.name} {d.n}x{d.k}, block size {d.block_size}, "
            f"{d.layout.name.lower()} layout{nested}"
        )

    cdef object take(self, Call* call, object weight, object absmax, object nested):
        # What isinstance asks first; of any other array it would go on to ask for __class__.
        if PyType_IsSubtype(type(weight), tensor_type):
            if absmax is not None or nested is not None:
                name = "nested" if absmax is None else "absmax"
                raise invalid(
                    name, "None beside an Nf4Tensor, which brings its own",
                    describe(absmax if nested is None else nested), "leave it out",
                )
            # None of a weight that was never made, which its repr then says.
            if getattr(weight, "_problem", None) != self.weight:
                raise invalid(
                    "weight", f"{self.problem()}", repr(weight),
                    "select a plan for this weight, as in weight.plan(...)",
                )
            return self.lend(call, weight)
        if PyType_IsSubtype(type(weight), weight_type):
            raise invalid("weight", "an Nf4Tensor or codes", repr(weight), "use its own plans")
        if absmax is None:
            raise invalid(
                "absmax", "an array beside codes that are no Nf4Tensor", "None",
                "pass the scales of the blocks, or an Nf4Tensor as the weight",
            )
        call.arrays[WEIGHT] = <PyObject*>weight
        call.arrays[ABSMAX] = <PyObject*>absmax
        return self.take_nested(call, nested)

    cdef object take_nested(self, Call* call, object nested):
        if not self.nested:
            if nested is not None:
                raise invalid(
                    "nested", "None, as descriptor.nested is False", type(nested).__name__,
                    "leave it out, or select a plan whose descriptor has nested=True",
                )
            return None
        if not isinstance(nested, NestedAbsmax):
            raise invalid(
                "nested", "a NestedAbsmax, as descriptor.nested is True", type(nested).__name__,
                "pass NestedAbsmax(code, absmax, offset), or select a plan whose descriptor has "
                "nested=False",
            )
        code, scales = nested.code, nested.absmax
        call.arrays[NESTED_CODE] = <PyObject*>code
        call.arrays[NESTED_ABSMAX] = <PyObject*>scales
        call.nested_block = nested.block_size
        call.nested_offset = nested.offset
        return nested if type(nested) is nested_type else (code, scales)

    cdef object lend(self, Call* call, object weight):
        cdef object data = weight.data, absmax = weight.absmax
        call.arrays[WEIGHT] = <PyObject*>data
        call.arrays[ABSMAX] = <PyObject*>absmax
        nested = weight.nested
        tables = self.take_nested(call, nested)
        # Only a subclass may give other arrays than it holds; a tuple for every call takes long.
        if type(weight) is tensor_type and tables is nested:
            return weight
        return data, absmax, tables


cdef class Nf4ProductPlan(Nf4Plan):
    """What `Nf4MmvqPlan` and `Nf4MmvqMultiMPlan` share."""

    cdef int prepare(
        self, object device, object descriptor, object base, object m, object preference
    ) except -1:
        cdef bint own_bits = False
        self.bind(device, descriptor, preference)
        if self.preference.activations == "staged":
            raise invalid(
                "preference", f'activations="float" or None for an {type(self).__name__}',
                'activations="staged"', "NF4 and FP4 multiply activations as they are",
            )
        m = checked(m, "m")
        self.bind_weight(base, &self.args.weight)
        self.bind_product(m, base.n, base.k, base.activation, base.output)
        if base.output not in (base.activation, ElementKind.F32):
            raise invalid(
                "output", f"{base.activation.dtype} (the activation's type) or float32",
                base.output.dtype, "choose one of them",
            )
        self.has_bias = base.bias
        self.args.m = m
        self.args.x_stride = base.k
        self.args.y_stride = base.n
        self.args.x_type = base.activation
        self.args.y_type = base.output
        self.args.device = self.device_id
        self.args.overlap = self.preference.overlap
        self.args.exact = self.preference.bit_stable_across_hardware
        if self.device_type != HOST:
            own_bits = _cuda.nf4_uses_tensor_cores(&self.args)
            self.bind_workspace(_cuda.nf4_workspace_size(&self.args), False)
        self.sku = self.describe_kernel(
            QuantizeKind.NF4_MMVQ, base.activation, base.output, "float", None,
            base.layout.name.lower(), "bias" if base.bias else None,
            MathPrecision[base.activation.name] if own_bits else None,
        )
        return 0

    cdef str problem(self):
        cdef object d = self.descriptor
        cdef object base = d.base if isinstance(d, Nf4MmvqMultiMDescriptor) else d
        bias = " with bias" if base.bias else ""
        return (
            f"{self.weight_problem(base)}, m={self.args.m}, "
            f"{base.activation.dtype} -> {base.output.dtype}{bias}"
        )

    cdef int launch(self, Call* call) except -1 nogil:
        cdef bcy_nf4_matmul_args args = self.args
        fill_weight(&args.weight, call)
        args.x = call.data[ACTIVATIONS]
        args.y = call.data[OUTPUT]
        args.bias = call.data[BIAS]
        args.workspace = call.data[WORKSPACE]
        args.x_stride = call.stride[ACTIVATIONS]
        args.y_stride = call.stride[OUTPUT]
        if self.device_type == HOST:
            _cpu.nf4_matmul(&args, self.threads)
        else:
            _cuda.nf4_matmul(&args, call.stream)
        return 0

    cdef int apply(
        self, object weight, object activations, object output, object absmax, object nested,
        object bias, object workspace, object stream, bint start,
    ) except -1:
        cdef Call call
        self.require_selected()
        begin(&call, self.slots)
        _owner = self.take(&call, weight, absmax, nested)  # held until the call returns
        self.lend_workspace(&call, workspace)
        call.arrays[ACTIVATIONS] = <PyObject*>activations
        call.arrays[OUTPUT] = <PyObject*>output
        if bias is not None:
            call.arrays[BIAS] = <PyObject*>bias
        if self.has_bias != (bias is not None):
            raise invalid(
                "bias",
                f"{'an array' if self.has_bias else 'None'}, as descriptor.bias is "
                f"{bool(self.has_bias)}",
                describe(bias) if bias is not None else "None",
                f"{'pass it' if self.has_bias else 'leave it out'}, or select a plan whose "
                f"descriptor has bias={not self.has_bias}",
            )
        return self.run_arrays(&call, stream, start)

    def run(
        self, weight, activations, output, *, absmax=None, nested=None, bias=None, workspace=None,
        stream=None,
    ):
        """Compute ``output = activations @ dequantize(weight).T (+ bias)``.

        Everything is checked before anything is launched. On CUDA the call returns as soon as the
        work is queued.

        Parameters
        ----------
        weight : Nf4Tensor or array
            The weight; or its codes alone: exactly ``ceil(n * k / 2)`` bytes, contiguous, of any
            rank, as uint8, float32, float16 or bfloat16.
        activations : array
            [m, k] in ``descriptor.activation``; rows may be padded. For m = 1 also [k].
        output : array
            [m, n] in ``descriptor.output``, written; rows may be padded. For m = 1 also [n].
        absmax : array, optional
            The scales of the blocks, where `weight` is no Nf4Tensor: exactly
            ``ceil(n * k / block_size)``, contiguous, float32; uint8 where ``descriptor.nested``.
        nested : NestedAbsmax, optional
            How absmax is quantized, where `weight` is no Nf4Tensor and ``descriptor.nested``.
        bias : array, optional
            [n] in ``descriptor.output``, added before rounding: given where ``descriptor.bias``,
            and only there.
        workspace : Workspace or array, optional
            At least `workspace_size` bytes, 256-byte aligned. Without it the product has the same
            bits and, where `workspace_size` is not 0 and the codes and half-precision activations
            begin at multiples of 16 bytes, most often takes longer.
        stream : Stream or object with ``__cuda_stream__``, optional
            Where to run on CUDA. By default the current stream of the activations' framework, else
            the legacy default stream. None on the CPU.

        Raises
        ------
        InvalidProblem
            An argument that is missing or not asked for, of the wrong dtype, shape, length, stride,
            device or alignment, one that overlaps the output or the workspace, or
            (`WorkspaceTooSmall`, `ReadOnlyArray`, `NotAnArray`) a case of its own.
        CudaError
            The launch failed.

        Examples
        --------
        >>> import numpy as np
        >>> import baracuda_cy as bcy
        >>> w = bcy.quantize(np.eye(64, dtype=np.float32), "nf4")
        >>> plan = w.plan(m=2)
        >>> y = np.empty((2, 64), np.float32)
        >>> plan.run(w, np.ones((2, 64), np.float32), y)
        >>> bool((y == 1).all())
        True
        """
        self.apply(weight, activations, output, absmax, nested, bias, workspace, stream, True)

    def validate(self, weight, activations, output, *, absmax=None, nested=None, bias=None):
        """Check arguments as `run` does, and run nothing.

        Parameters
        ----------
        weight, activations, output, absmax, nested, bias
            As in `run`.

        Raises
        ------
        InvalidProblem
            As in `run`.
        """
        self.apply(weight, activations, output, absmax, nested, bias, None, None, False)

    def can_implement(self, weight, activations, output, *, absmax=None, nested=None, bias=None):
        """Say whether `validate` accepts the arguments.

        Returns
        -------
        bool
        """
        return accepts(
            self.validate, weight, activations, output, absmax=absmax, nested=nested, bias=bias
        )


@cython.final
cdef class Nf4MmvqPlan(Nf4ProductPlan):
    """A weight in NF4 or FP4 times one activation vector.

    The activation is multiplied as it is. It needs no workspace; with one, float32 multiply-adds
    are faster on compute capability 9.0 and up.

    Examples
    --------
    >>> import baracuda_cy as bcy
    >>> plan = bcy.Nf4MmvqPlan.select("cpu", bcy.Nf4Descriptor(n=64, k=256))
    >>> plan.workspace_size, plan.sku.op
    (0, QuantizeKind.NF4_MMVQ)
    """

    @classmethod
    @cython.binding(True)
    def select(cls, device, desc, preference=None):
        """Select the kernel for a problem.

        Parameters
        ----------
        device : str, int, Stream or array
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``, the 1 of that, or what belongs to a device.
        desc : Nf4Descriptor
            The problem.
        preference : PlanPreference, optional
            Wishes.

        Returns
        -------
        Nf4MmvqPlan

        Raises
        ------
        InvalidProblem
            The descriptor describes no problem: a negative size, one that the layout cannot
            express, an output of another type; or staged activations are asked for.
        Unsupported
            The machine or the build has no such device.
        """
        cdef Nf4MmvqPlan plan = Nf4MmvqPlan.__new__(Nf4MmvqPlan)
        check_descriptor(desc, Nf4Descriptor, "n=..., k=..., ...")
        plan.prepare(device, desc, desc, 1, preference)
        return plan


@cython.final
cdef class Nf4MmvqMultiMPlan(Nf4ProductPlan):
    """A weight in NF4 or FP4 times any number of activation vectors.

    Token m of any batch has the bits it has alone. On CUDA, half-precision activations may be
    multiplied on tensor cores, whose bits are their own: ``precision_guarantee`` says so, and
    ``PlanPreference(bit_stable_across_hardware=True)`` asks for the kernel with the bits of the
    CPU. It needs no workspace; where `workspace_size` is not 0, on compute capability 9.0 and up,
    it is faster with one.

    Examples
    --------
    >>> import baracuda_cy as bcy
    >>> plan = bcy.Nf4MmvqMultiMPlan.select(
    ...     "cpu", bcy.Nf4MmvqMultiMDescriptor(base=bcy.Nf4Descriptor(n=64, k=256), m=8))
    >>> plan.workspace_size, plan.precision_guarantee.batch_invariant
    (0, True)
    """

    @classmethod
    @cython.binding(True)
    def select(cls, device, desc, preference=None):
        """Select the kernel for a problem.

        Parameters
        ----------
        device : str, int, Stream or array
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``, the 1 of that, or what belongs to a device.
        desc : Nf4MmvqMultiMDescriptor
            The problem.
        preference : PlanPreference, optional
            Wishes.

        Returns
        -------
        Nf4MmvqMultiMPlan

        Raises
        ------
        InvalidProblem
            The descriptor describes no problem: a negative size, one that the layout cannot
            express, an output of another type; or staged activations are asked for.
        Unsupported
            The machine or the build has no such device.
        """
        cdef Nf4MmvqMultiMPlan plan = Nf4MmvqMultiMPlan.__new__(Nf4MmvqMultiMPlan)
        check_descriptor(desc, Nf4MmvqMultiMDescriptor, "base=Nf4Descriptor(...), m=...")
        plan.prepare(device, desc, desc.base, desc.m, preference)
        return plan


@cython.final
cdef class Nf4DequantizePlan(Nf4Plan):
    """A weight in NF4 or FP4 unpacked to floats, with the bits of bitsandbytes.

    Of the descriptor it looks at the weight and at `output`.

    Examples
    --------
    >>> import numpy as np
    >>> import baracuda_cy as bcy
    >>> w = bcy.quantize(np.eye(64, dtype=np.float32), "nf4")
    >>> plan = bcy.Nf4DequantizePlan.select(
    ...     "cpu", bcy.Nf4Descriptor(n=64, k=64, output="float32"))
    >>> out = np.empty((64, 64), np.float32)
    >>> plan.run(w, out)
    >>> bool((out == np.eye(64)).all())
    True
    """

    @classmethod
    @cython.binding(True)
    def select(cls, device, desc, preference=None):
        """Select the kernel for a problem.

        Parameters
        ----------
        device : str, int, Stream or array
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``, the 1 of that, or what belongs to a device.
        desc : Nf4Descriptor
            The problem.
        preference : PlanPreference, optional
            Wishes.

        Returns
        -------
        Nf4DequantizePlan

        Raises
        ------
        InvalidProblem
            The descriptor describes no problem.
        Unsupported
            The machine or the build has no such device.
        """
        cdef Nf4DequantizePlan plan = Nf4DequantizePlan.__new__(Nf4DequantizePlan)
        check_descriptor(desc, Nf4Descriptor, "n=..., k=..., ...")
        plan.bind(device, desc, preference)
        plan.bind_weight(desc, &plan.args.weight)
        check_floating(desc.output, "output")
        set_matrix(&plan.operands[OUTPUT], desc.n, desc.k, desc.output, True, "n")
        plan.idle = desc.n == 0 or desc.k == 0
        plan.args.y_type = desc.output
        plan.args.device = plan.device_id
        plan.sku = plan.describe_kernel(
            QuantizeKind.DEQUANTIZE_PER_GROUP, desc.output, desc.output, None, None,
            desc.layout.name.lower(),
        )
        return plan

    cdef str problem(self):
        return f"{self.weight_problem(self.descriptor)} -> {self.descriptor.output.dtype}"

    cdef int launch(self, Call* call) except -1 nogil:
        cdef bcy_nf4_dequantize_args args = self.args
        fill_weight(&args.weight, call)
        args.y = call.data[OUTPUT]
        args.y_stride = call.stride[OUTPUT]
        if self.device_type == HOST:
            _cpu.nf4_dequantize(&args, self.threads)
        else:
            _cuda.nf4_dequantize(&args, call.stream)
        return 0

    cdef int fill(
        self, object weight, object output, object absmax, object nested, object stream,
        bint start,
    ) except -1:
        cdef Call call
        self.require_selected()
        begin(&call, self.slots)
        _owner = self.take(&call, weight, absmax, nested)  # held until the call returns
        call.arrays[OUTPUT] = <PyObject*>output
        return self.run_arrays(&call, stream, start)

    def run(self, weight, output, *, absmax=None, nested=None, workspace=None, stream=None):
        """Unpack `weight` into `output`.

        Parameters
        ----------
        weight : Nf4Tensor or array
            The weight; or its codes alone: exactly ``ceil(n * k / 2)`` bytes, contiguous, of any
            rank, as uint8, float32, float16 or bfloat16.
        output : array
            [n, k] in ``descriptor.output``, written; rows may be padded.
        absmax : array, optional
            The scales of the blocks, where `weight` is no Nf4Tensor: exactly
            ``ceil(n * k / block_size)``, contiguous, float32; uint8 where ``descriptor.nested``.
        nested : NestedAbsmax, optional
            How absmax is quantized, where `weight` is no Nf4Tensor and ``descriptor.nested``.
        workspace : object, optional
            Not used: `workspace_size` is 0.
        stream : Stream or object with ``__cuda_stream__``, optional
            Where to run on CUDA. By default the current stream of the output's framework, else the
            legacy default stream. None on the CPU.

        Raises
        ------
        InvalidProblem
            An argument that is missing or not asked for, of the wrong dtype, shape, length, stride,
            device or alignment, or an output that is read-only or overlaps the weight.
        CudaError
            The launch failed.
        """
        self.fill(weight, output, absmax, nested, stream, True)

    def validate(self, weight, output, *, absmax=None, nested=None):
        """Check arguments as `run` does, and run nothing.

        Parameters
        ----------
        weight, output, absmax, nested
            As in `run`.

        Raises
        ------
        InvalidProblem
            As in `run`.
        """
        self.fill(weight, output, absmax, nested, None, False)

    def can_implement(self, weight, output, *, absmax=None, nested=None):
        """Say whether `validate` accepts the arguments.

        Returns
        -------
        bool
        """
        return accepts(self.validate, weight, output, absmax=absmax, nested=nested)


cdef object descriptor_of(tuple weight, object activation, object output, object bias):
    """The descriptor of weights with this ``Nf4Tensor._problem``."""
    n, k, block_size, codebook, layout, nested = weight
    return Nf4Descriptor(
        n=n, k=k, block_size=block_size, codebook=codebook, layout=layout, nested=nested, bias=bias,
        activation=activation, output=output,
    )


@lru_cache(maxsize=1024)
def select_product(host, ordinal, weight, m, activation, output, bias, preference):
    """The plan of a product of `linear`, selected once; enums come as integers, which hash fast."""
    base = descriptor_of(weight, ElementKind(activation), ElementKind(output), bias)
    return Nf4MmvqMultiMPlan.select(
        "cpu" if host else f"cuda:{ordinal}", Nf4MmvqMultiMDescriptor(base=base, m=m), preference
    )


def select_dequantize(device, weight, output, preference):
    """The plan of `dequantize`."""
    return Nf4DequantizePlan.select(
        device, descriptor_of(weight, output, output, False), preference
    )
