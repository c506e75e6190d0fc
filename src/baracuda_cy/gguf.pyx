# SPDX-License-Identifier: Apache-2.0
# Plain method descriptors: half the cost of a call of Cython's own functions under the limited API.
# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""The plans of packed GGUF weights."""

cimport cython
from cpython.ref cimport PyObject
from cpython.type cimport PyType_IsSubtype
from libc.stdint cimport INT64_MAX, int64_t

from baracuda_cy cimport _cpu, _cuda
from baracuda_cy._native cimport bcy_gguf_dequantize_args, bcy_gguf_matmul_args
from baracuda_cy.elements cimport U8
from baracuda_cy.plan cimport (
    ACTIVATIONS,
    BIAS,
    HOST,
    OUTPUT,
    PACKED,
    WEIGHT,
    WORKSPACE,
    Call,
    Operand,
    Plan,
    begin,
    check_descriptor,
    check_floating,
    checked,
    invalid,
    set_matrix,
)

from functools import lru_cache

from baracuda_cy.descriptors import (
    GgufDequantizeDescriptor,
    GgufMmvqDescriptor,
    GgufMmvqMultiMDescriptor,
)
from baracuda_cy.formats import ElementKind
from baracuda_cy.plan import accepts
from baracuda_cy.sku import QuantizeKind
from baracuda_cy.tensor import GgufTensor, PackedWeight

cdef type packed_type = GgufTensor
cdef type weight_type = PackedWeight


cdef int64_t check_weight(object descriptor, Operand* operand) except -1:
    """Fill in what the packed matrix of a descriptor must be."""
    block_format = descriptor.block_format
    rows = checked(descriptor.nrows, "nrows")
    cols = checked(descriptor.ncols, "ncols")
    offset = checked(descriptor.w_start_byte_offset, "w_start_byte_offset")
    needed = rows * block_format.row_bytes(cols)
    if offset % block_format.alignment:
        raise invalid(
            "w_start_byte_offset", f"a multiple of {block_format.alignment} ({block_format.name})",
            str(offset), "start the matrix at a block",
        )
    if needed + offset > INT64_MAX or rows * cols > INT64_MAX // 4:
        raise invalid(
            "nrows", "a matrix whose bytes an int64 counts", f"{rows} rows of {cols} columns",
            "split the problem",
        )
    operand.role = PACKED
    operand.element = U8
    operand.written = False
    operand.rows = 1
    operand.cols = needed
    operand.offset = offset
    operand.alignment = block_format.alignment
    return 0


cdef tuple weight_problem(object descriptor):
    """`GgufTensor._problem` of the weights that a descriptor is for."""
    return (
        descriptor.nrows, descriptor.ncols, int(descriptor.block_format),
        descriptor.w_start_byte_offset,
    )


cdef object packed_data(Plan plan, object weight, tuple problem):
    """The bytes of a weight; a GgufTensor must be the matrix that the plan is for."""
    # What isinstance asks first; of any other array it would go on to ask for __class__.
    if PyType_IsSubtype(type(weight), packed_type):
        # None of a weight that was never made, which its repr then says.
        if getattr(weight, "_problem", None) != problem:
            offset = problem[3]
            raise invalid(
                "weight", plan.problem() + (f", from byte {offset} on" if offset else ""),
                repr(weight), "select a plan for this weight, as in weight.plan(...)"
                + (", or pass its bytes, weight.data" if offset else ""),
            )
        return weight.data
    if PyType_IsSubtype(type(weight), weight_type):
        raise invalid("weight", "a GgufTensor or uint8", repr(weight), "use its own plans")
    return weight


cdef class GgufProductPlan(Plan):
    """What `GgufMmvqPlan` and `GgufMmvqMultiMPlan` share."""

    cdef int prepare(self, object device, object descriptor, object preference) except -1:
        self.bind(device, descriptor, preference)
        wanted = self.preference.activations
        path = "staged" if self.staged else "float"
        if wanted is not None and wanted != path:
            other = "GgufMmvqPlan" if self.staged else "GgufMmvqMultiMPlan"
            raise invalid(
                "preference", f'activations="{path}" or None for a {type(self).__name__}',
                f'activations="{wanted}"', f"select a {other}",
            )
        m = checked(descriptor.m, "m")
        check_weight(descriptor, &self.operands[WEIGHT])
        self.bind_product(
            m, descriptor.nrows, descriptor.ncols, descriptor.activation, descriptor.output
        )
        if not self.staged and descriptor.output not in (descriptor.activation, ElementKind.F32):
            raise invalid(
                "output", f"{descriptor.activation.dtype} (the activation's type) or float32",
                descriptor.output.dtype, "choose one of them or select a GgufMmvqMultiMPlan",
            )
        self.weight = weight_problem(descriptor)
        self.args.nrows = descriptor.nrows
        self.args.ncols = descriptor.ncols
        self.args.m = m
        self.args.format = descriptor.block_format
        self.args.x_type = descriptor.activation
        self.args.y_type = descriptor.output
        self.args.device = self.device_id
        self.args.overlap = self.preference.overlap
        if self.staged:
            self.bind_workspace(self.staged_bytes(), True)
        self.sku = self.describe_kernel(
            QuantizeKind.GGUF_MMVQ, descriptor.activation, descriptor.output, path,
            descriptor.block_format,
        )
        return 0

    cdef int64_t staged_bytes(self) except -1:
        cdef int64_t size = 0
        if self.device_type == HOST:
            size = _cpu.gguf_workspace_size(&self.args)
        elif not _cuda.gguf_needs_no_workspace(&self.args):
            size = _cuda.gguf_workspace_size(&self.args)
        if size < 0:
            raise invalid(
                "m", "a workspace whose bytes an int64 counts",
                f"{self.args.m} tokens of {self.args.ncols} columns", "split the problem",
            )
        return size

    cdef str problem(self):
        cdef object d = self.descriptor
        path = "staged int8" if self.staged else "float activations"
        return (
            f"{d.block_format.name} {d.nrows}x{d.ncols}, m={d.m}, "
            f"{d.activation.dtype} -> {d.output.dtype}, {path}"
        )

    cdef int launch(self, Call* call) except -1 nogil:
        cdef bcy_gguf_matmul_args args = self.args
        args.weight = call.data[WEIGHT]
        args.x = call.data[ACTIVATIONS]
        args.y = call.data[OUTPUT]
        args.bias = call.data[BIAS]
        args.workspace = call.data[WORKSPACE]
        args.x_stride = call.stride[ACTIVATIONS]
        args.y_stride = call.stride[OUTPUT]
        if self.device_type == HOST:
            if self.staged:
                _cpu.gguf_stage(&args, self.threads)
                _cpu.gguf_matmul(&args, self.threads)
            else:
                _cpu.gguf_matvec(&args, self.threads)
        elif self.staged:
            _cuda.gguf_matmul(&args, call.stream)
        else:
            _cuda.gguf_matvec(&args, call.stream)
        return 0

    cdef int apply(
        self, object weight, object activations, object output, object bias, object workspace,
        object stream, bint start,
    ) except -1:
        cdef Call call
        self.require_selected()
        begin(&call, self.slots)
        weight = packed_data(self, weight, self.weight)
        call.arrays[WEIGHT] = <PyObject*>weight
        call.arrays[ACTIVATIONS] = <PyObject*>activations
        call.arrays[OUTPUT] = <PyObject*>output
        if bias is not None:
            call.arrays[BIAS] = <PyObject*>bias
        self.lend_workspace(&call, workspace)
        return self.run_arrays(&call, stream, start)

    def run(self, weight, activations, output, *, bias=None, workspace=None, stream=None):
        """Compute ``output = activations @ dequantize(weight).T (+ bias)``.

        Everything is checked before anything is launched. On CUDA the call returns as soon as the
        work is queued.

        Parameters
        ----------
        weight : GgufTensor or uint8 array
            The [nrows, ncols] matrix; or its packed blocks: any rank, contiguous, from byte
            ``descriptor.w_start_byte_offset`` on; longer is fine.
        activations : array
            [m, ncols] in ``descriptor.activation``; rows may be padded. For m = 1 also [ncols].
        output : array
            [m, nrows] in ``descriptor.output``, written; rows may be padded. For m = 1 also
            [nrows].
        bias : array, optional
            [nrows] in ``descriptor.output``, added before rounding.
        workspace : Workspace or array, optional
            At least `workspace_size` bytes, 256-byte aligned; not needed where that is 0.
        stream : Stream or object with ``__cuda_stream__``, optional
            Where to run on CUDA. By default the current stream of the activations' framework, else
            the legacy default stream. None on the CPU.

        Raises
        ------
        InvalidProblem
            An argument of the wrong dtype, shape, stride, device or alignment, one that overlaps
            another, or (`WorkspaceTooSmall`, `ReadOnlyArray`, `NotAnArray`) a case of its own.
        CudaError
            The launch failed.

        Examples
        --------
        >>> import numpy as np
        >>> import baracuda_cy as bcy
        >>> w = bcy.quantize(np.eye(64, dtype=np.float32), "Q8_0")
        >>> plan = w.plan(m=2)
        >>> y = np.empty((2, 64), np.float32)
        >>> x = np.ones((2, 64), np.float32)
        >>> plan.run(w, x, y, workspace=bcy.Workspace(plan.workspace_size, device="cpu"))
        >>> bool(np.allclose(y, x, rtol=1e-2))
        True
        """
        self.apply(weight, activations, output, bias, workspace, stream, True)

    def validate(self, weight, activations, output, *, bias=None):
        """Check arguments as `run` does, and run nothing.

        Parameters
        ----------
        weight, activations, output, bias
            As in `run`.

        Raises
        ------
        InvalidProblem
            As in `run`.
        """
        self.apply(weight, activations, output, bias, None, None, False)

    def can_implement(self, weight, activations, output, *, bias=None):
        """Say whether `validate` accepts the arguments.

        Returns
        -------
        bool
        """
        return accepts(self.validate, weight, activations, output, bias=bias)


@cython.final
cdef class GgufMmvqPlan(GgufProductPlan):
    """A packed GGUF weight times float activations.

    Of the activations it takes 24 bits with the sign, one fewer than float32 has, counted from the
    largest of each group of 32: products are summed exactly in integers within a group and in
    float32 across groups, in an order that depends on the format and K alone. It needs no
    workspace; on the CPU it takes memory for some tokens while it runs.

    Examples
    --------
    >>> import baracuda_cy as bcy
    >>> plan = bcy.GgufMmvqPlan.select(
    ...     "cpu", bcy.GgufMmvqDescriptor(nrows=64, ncols=256, block_format="Q4_K"))
    >>> plan.workspace_size, plan.sku.activations
    (0, 'float')
    """

    @classmethod
    @cython.binding(True)
    def select(cls, device, desc, preference=None):
        """Select the kernel for a problem.

        Parameters
        ----------
        device : str, int, Stream or array
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``, the 1 of that, or what belongs to a device.
        desc : GgufMmvqDescriptor
            The problem.
        preference : PlanPreference, optional
            Wishes.

        Returns
        -------
        GgufMmvqPlan

        Raises
        ------
        InvalidProblem
            The descriptor describes no problem: a negative size, columns that are no multiple of
            the block size, a misaligned offset, an output of another type.
        Unsupported
            The machine or the build has no such device.
        """
        cdef GgufMmvqPlan plan = GgufMmvqPlan.__new__(GgufMmvqPlan)
        check_descriptor(desc, GgufMmvqDescriptor, "nrows=..., ncols=..., ...")
        plan.staged = False
        plan.prepare(device, desc, preference)
        return plan


@cython.final
cdef class GgufMmvqMultiMPlan(GgufProductPlan):
    """A packed GGUF weight times activations that are staged to int8, for any number of them.

    Each group of 32 activations is scaled to int8, products are summed exactly in integers within a
    group and in float32 across groups, in an order that depends on the format and K alone: token m
    of any batch has the bits it has alone.

    Examples
    --------
    >>> import baracuda_cy as bcy
    >>> plan = bcy.GgufMmvqMultiMPlan.select(
    ...     "cpu", bcy.GgufMmvqMultiMDescriptor(nrows=64, ncols=256, m=8, block_format="Q4_K"))
    >>> plan.sku.activations, plan.precision_guarantee.batch_invariant
    ('staged', True)
    """

    @classmethod
    @cython.binding(True)
    def select(cls, device, desc, preference=None):
        """Select the kernel for a problem.

        Parameters
        ----------
        device : str, int, Stream or array
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``, the 1 of that, or what belongs to a device.
        desc : GgufMmvqMultiMDescriptor
            The problem.
        preference : PlanPreference, optional
            Wishes.

        Returns
        -------
        GgufMmvqMultiMPlan

        Raises
        ------
        InvalidProblem
            The descriptor describes no problem: a negative size, columns that are no multiple of
            the block size, a misaligned offset, a type that is no float32, float16 or bfloat16.
        Unsupported
            The machine or the build has no such device.
        """
        cdef GgufMmvqMultiMPlan plan = GgufMmvqMultiMPlan.__new__(GgufMmvqMultiMPlan)
        check_descriptor(desc, GgufMmvqMultiMDescriptor, "nrows=..., ncols=..., ...")
        plan.staged = True
        plan.prepare(device, desc, preference)
        return plan


@cython.final
cdef class GgufDequantizePlan(Plan):
    """A packed GGUF weight unpacked to floats, with the bits of ggml's own code.

    Examples
    --------
    >>> import numpy as np
    >>> import baracuda_cy as bcy
    >>> w = bcy.quantize(np.eye(32, dtype=np.float32), "Q8_0")
    >>> plan = bcy.GgufDequantizePlan.select(
    ...     "cpu", bcy.GgufDequantizeDescriptor(nrows=32, ncols=32, block_format="Q8_0"))
    >>> out = np.empty((32, 32), np.float32)
    >>> plan.run(w, out)
    >>> bool(np.allclose(out, np.eye(32), atol=1e-3))
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
        desc : GgufDequantizeDescriptor
            The problem.
        preference : PlanPreference, optional
            Wishes.

        Returns
        -------
        GgufDequantizePlan

        Raises
        ------
        InvalidProblem
            The descriptor describes no problem.
        Unsupported
            The machine or the build has no such device.
        """
        cdef GgufDequantizePlan plan = GgufDequantizePlan.__new__(GgufDequantizePlan)
        check_descriptor(desc, GgufDequantizeDescriptor, "nrows=..., ncols=..., ...")
        plan.bind(device, desc, preference)
        check_weight(desc, &plan.operands[WEIGHT])
        check_floating(desc.output, "output")
        set_matrix(&plan.operands[OUTPUT], desc.nrows, desc.ncols, desc.output, True, "nrows")
        plan.idle = desc.nrows == 0 or desc.ncols == 0
        plan.weight = weight_problem(desc)
        plan.args.nrows = desc.nrows
        plan.args.ncols = desc.ncols
        plan.args.format = desc.block_format
        plan.args.y_type = desc.output
        plan.args.device = plan.device_id
        plan.sku = plan.describe_kernel(
            QuantizeKind.GGUF_DEQUANTIZE, desc.output, desc.output, None, desc.block_format
        )
        return plan

    cdef str problem(self):
        cdef object d = self.descriptor
        return f"{d.block_format.name} {d.nrows}x{d.ncols} -> {d.output.dtype}"

    cdef int launch(self, Call* call) except -1 nogil:
        cdef bcy_gguf_dequantize_args args = self.args
        args.weight = call.data[WEIGHT]
        args.y = call.data[OUTPUT]
        args.y_stride = call.stride[OUTPUT]
        if self.device_type == HOST:
            _cpu.gguf_dequantize(&args, self.threads)
        else:
            _cuda.gguf_dequantize(&args, call.stream)
        return 0

    cdef int fill(self, object weight, object output, object stream, bint start) except -1:
        cdef Call call
        self.require_selected()
        begin(&call, self.slots)
        weight = packed_data(self, weight, self.weight)
        call.arrays[WEIGHT] = <PyObject*>weight
        call.arrays[OUTPUT] = <PyObject*>output
        return self.run_arrays(&call, stream, start)

    def run(self, weight, output, *, workspace=None, stream=None):
        """Unpack `weight` into `output`.

        Parameters
        ----------
        weight : GgufTensor or uint8 array
            The [nrows, ncols] matrix; or its packed blocks: any rank, contiguous, from byte
            ``descriptor.w_start_byte_offset`` on; longer is fine.
        output : array
            [nrows, ncols] in ``descriptor.output``, written; rows may be padded.
        workspace : object, optional
            Not used: `workspace_size` is 0.
        stream : Stream or object with ``__cuda_stream__``, optional
            Where to run on CUDA. By default the current stream of the output's framework, else the
            legacy default stream. None on the CPU.

        Raises
        ------
        InvalidProblem
            An argument of the wrong dtype, shape, stride, device or alignment, or an output that
            is read-only or overlaps the weight.
        CudaError
            The launch failed.
        """
        self.fill(weight, output, stream, True)

    def validate(self, weight, output):
        """Check arguments as `run` does, and run nothing.

        Parameters
        ----------
        weight, output
            As in `run`.

        Raises
        ------
        InvalidProblem
            As in `run`.
        """
        self.fill(weight, output, None, False)

    def can_implement(self, weight, output):
        """Say whether `validate` accepts the arguments.

        Returns
        -------
        bool
        """
        return accepts(self.validate, weight, output)


@lru_cache(maxsize=1024)
def select_product(
    host, ordinal, block_format, nrows, ncols, m, activation, output, preference
):
    """The plan of a product of `linear`, selected once; enums come as integers, which hash fast."""
    device = "cpu" if host else f"cuda:{ordinal}"
    activation, output = ElementKind(activation), ElementKind(output)
    floating = preference is not None and preference.activations == "float"
    kind, plan = GgufMmvqMultiMDescriptor, GgufMmvqMultiMPlan
    if floating:
        kind, plan = GgufMmvqDescriptor, GgufMmvqPlan
    descriptor = kind(
        nrows=nrows, ncols=ncols, m=m, block_format=block_format,
        activation=activation, output=output,
    )
    return plan.select(device, descriptor, preference)
