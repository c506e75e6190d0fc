# SPDX-License-Identifier: Apache-2.0
# Plain method descriptors: half the cost of a call of Cython's own functions under the limited API.
# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""The plans of packed GGUF weights, and the everyday operations built on them."""

cimport cython
from cpython.ref cimport PyObject
from cpython.type cimport PyType_IsSubtype
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from baracuda_cy cimport _cpu, _cuda
from baracuda_cy._native cimport (
    bcy_gguf_dequantize_args,
    bcy_gguf_matmul_args,
    bcy_gguf_quantize_args,
)
from baracuda_cy.dlpack cimport (
    Allocation,
    ArrayView,
    acquire_view,
    allocate_like,
    check_no_grad,
    describe,
    device_of,
    element_bytes,
    element_name,
    release_view,
)
from baracuda_cy.plan cimport (
    ACTIVATIONS,
    BIAS,
    CUDA,
    HOST,
    MATRIX,
    OF_OPERATIONS,
    OUTPUT,
    PACKED,
    SCRATCH,
    SLOTS,
    VECTOR,
    WEIGHT,
    WORKSPACE,
    Call,
    Operand,
    Plan,
    checked,
    collapse_rows,
    elements_of,
    find_stream,
    invalid,
    resolve_device,
)

from functools import lru_cache

from baracuda_cy import _cpu as _cpu_module
from baracuda_cy import _cuda as _cuda_module
from baracuda_cy.errors import InvalidProblem, Unsupported
from baracuda_cy.formats import ElementKind
from baracuda_cy.memory import DeviceBuffer
from baracuda_cy.sku import (
    ArchSku,
    BackendKind,
    GgufDequantizeDescriptor,
    GgufMmvqDescriptor,
    GgufMmvqMultiMDescriptor,
    KernelSku,
    MathPrecision,
    OpCategory,
    PrecisionGuarantee,
    QuantizeKind,
)
from baracuda_cy.tensor import GgufTensor


cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void** pointer, size_t alignment, size_t size)


cdef enum:
    F32 = 1
    F16 = 2
    BF16 = 3
    U8 = 4

cdef int64_t WORKSPACE_ALIGNMENT = 256
cdef int64_t LARGEST = 0x7fffffffffffffff

cdef type packed_type = GgufTensor


cdef int check_floating(object element, str argument) except -1:
    if element not in (ElementKind.F32, ElementKind.F16, ElementKind.BF16):
        raise invalid(argument, "float32, float16 or bfloat16", element.dtype, "convert the array")
    return 0


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
    if needed + offset > LARGEST or rows * cols > LARGEST // 4:
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


cdef int set_matrix(
    Operand* operand, object rows, object cols, object element, bint written, str argument
) except -1:
    if rows * cols > LARGEST // 8:
        raise invalid(
            argument, "an array whose bytes an int64 counts", f"{rows} rows of {cols} columns",
            "split the problem",
        )
    operand.role = MATRIX
    operand.element = element
    operand.written = written
    operand.rows = rows
    operand.cols = cols
    operand.offset = 0
    operand.alignment = element_bytes(element)
    return 0


cdef object describe_kernel(
    Plan plan, object op, object element, object output, object activations
):
    """The SKU of a GGUF operation."""
    cdef bint host = plan.device_type == HOST
    arch = ArchSku.CPU
    if not host:
        major, minor = _cuda_module.compute_capability(plan.device_id)
        arch = ArchSku(10 * major + minor)
    return KernelSku(
        category=OpCategory.QUANTIZATION,
        op=op,
        element=element,
        aux_element=ElementKind.U8,
        output_element=output,
        block_format=plan.descriptor.block_format,
        activations=activations,
        arch=arch,
        isa=_cpu_module.isa() if host else None,
        backend=BackendKind.CPU if host else BackendKind.BESPOKE,
        precision_guarantee=PrecisionGuarantee(
            math_precision=MathPrecision.INT8 if activations == "staged" else MathPrecision.F32,
            accumulator=ElementKind.F32,
            deterministic=True,
            bit_stable_on_same_hardware=True,
            batch_invariant=True,
            bit_stable_across_hardware=True,
        ),
    )


cdef object packed_data(object weight, object block_format, object ncols, str name):
    """The bytes of a weight; a GgufTensor must be of the plan's format and width."""
    # What isinstance asks first; of any other array it would go on to ask for __class__.
    if PyType_IsSubtype(type(weight), packed_type):
        if weight.format is not block_format or weight.ncols != ncols:
            raise invalid(
                name, f"{block_format.name} with {ncols} columns", repr(weight),
                "select a plan for this weight, as in weight.plan(...)",
            )
        return weight.data
    return weight


cdef class GgufProductPlan(Plan):
    """What `GgufMmvqPlan` and `GgufMmvqMultiMPlan` share."""

    cdef int prepare(self, object device, object descriptor, object preference) except -1:
        cdef Operand* operand
        self.bind(device, descriptor, preference)
        wanted = self.preference.activations
        path = "staged" if self.staged else "float"
        if wanted is not None and wanted != path:
            other = "GgufMmvqPlan" if self.staged else "GgufMmvqMultiMPlan"
            raise invalid(
                "pref", f'activations="{path}" or None for a {type(self).__name__}',
                f'activations="{wanted}"', f"select a {other}",
            )
        m = checked(descriptor.m, "m")
        check_weight(descriptor, &self.operands[WEIGHT])
        check_floating(descriptor.activation, "activation")
        check_floating(descriptor.output, "output")
        if not self.staged and descriptor.output not in (descriptor.activation, ElementKind.F32):
            raise invalid(
                "output", f"{descriptor.activation.dtype} (the activation's type) or float32",
                descriptor.output.dtype, "choose one of them or select a GgufMmvqMultiMPlan",
            )
        set_matrix(
            &self.operands[ACTIVATIONS], m, descriptor.ncols, descriptor.activation, False, "m"
        )
        set_matrix(&self.operands[OUTPUT], m, descriptor.nrows, descriptor.output, True, "m")
        operand = &self.operands[BIAS]
        operand.role = VECTOR
        operand.element = descriptor.output
        operand.rows = 1
        operand.cols = descriptor.nrows
        operand.alignment = element_bytes(operand.element)
        if self.staged:
            if self.device_type == HOST:
                self.workspace_size = _cpu.gguf_workspace_size(
                    descriptor.block_format, descriptor.ncols, m
                )
            elif not _cuda.gguf_needs_no_workspace(
                self.device_id, descriptor.block_format, descriptor.ncols, m
            ):
                self.workspace_size = _cuda.gguf_workspace_size(
                    descriptor.block_format, descriptor.ncols, m
                )
            if self.workspace_size < 0:
                raise invalid(
                    "m", "a workspace whose bytes an int64 counts",
                    f"{m} tokens of {descriptor.ncols} columns", "split the problem",
                )
        if self.workspace_size:
            operand = &self.operands[WORKSPACE]
            operand.role = SCRATCH
            operand.written = True
            operand.rows = 1
            operand.cols = self.workspace_size
            operand.alignment = WORKSPACE_ALIGNMENT
        self.block_format = descriptor.block_format
        self.ncols = descriptor.ncols
        self.idle = m == 0 or descriptor.nrows == 0
        self.args.nrows = descriptor.nrows
        self.args.ncols = descriptor.ncols
        self.args.m = m
        self.args.format = descriptor.block_format
        self.args.x_type = descriptor.activation
        self.args.y_type = descriptor.output
        self.args.device = self.device_id
        self.args.overlap = self.preference.overlap
        self.sku = describe_kernel(
            self, QuantizeKind.GGUF_MMVQ, descriptor.activation, descriptor.output, path
        )
        return 0

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
        cdef PyObject* arrays[SLOTS]
        weight = packed_data(weight, self.block_format, self.ncols, "weight")
        arrays[WEIGHT] = <PyObject*>weight
        arrays[ACTIVATIONS] = <PyObject*>activations
        arrays[OUTPUT] = <PyObject*>output
        arrays[BIAS] = NULL if bias is None else <PyObject*>bias
        arrays[WORKSPACE] = NULL
        if workspace is not None and self.workspace_size:
            arrays[WORKSPACE] = <PyObject*>workspace
        return self.run_arrays(arrays, stream, start)

    def run(self, weight, activations, output, *, bias=None, workspace=None, stream=None):
        """Compute ``output = activations @ dequantize(weight).T (+ bias)``.

        Everything is checked before anything is launched. On CUDA the call returns as soon as the
        work is queued.

        Parameters
        ----------
        weight : GgufTensor or uint8 array
            Packed blocks of the [nrows, ncols] matrix: any rank, contiguous, from byte
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
        try:
            self.validate(weight, activations, output, bias=bias)
        except (InvalidProblem, Unsupported):
            return False
        return True


@cython.final
cdef class GgufMmvqPlan(GgufProductPlan):
    """A packed GGUF weight times float activations.

    Weights are dequantized to float32 and multiplied by the activations as they are, accumulated in
    float32 in an order that depends on the format and K alone. It needs no workspace.

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
    def select(cls, device, desc, pref=None):
        """Select the kernel for a problem.

        Parameters
        ----------
        device : str, Stream or array
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or what belongs to a device.
        desc : GgufMmvqDescriptor
            The problem.
        pref : PlanPreference, optional
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
        check_descriptor(desc, GgufMmvqDescriptor)
        plan.staged = False
        plan.prepare(device, desc, pref)
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
    def select(cls, device, desc, pref=None):
        """Select the kernel for a problem.

        Parameters
        ----------
        device : str, Stream or array
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or what belongs to a device.
        desc : GgufMmvqMultiMDescriptor
            The problem.
        pref : PlanPreference, optional
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
        check_descriptor(desc, GgufMmvqMultiMDescriptor)
        plan.staged = True
        plan.prepare(device, desc, pref)
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
    def select(cls, device, desc, pref=None):
        """Select the kernel for a problem.

        Parameters
        ----------
        device : str, Stream or array
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or what belongs to a device.
        desc : GgufDequantizeDescriptor
            The problem.
        pref : PlanPreference, optional
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
        check_descriptor(desc, GgufDequantizeDescriptor)
        plan.bind(device, desc, pref)
        check_weight(desc, &plan.operands[WEIGHT])
        check_floating(desc.output, "output")
        set_matrix(&plan.operands[OUTPUT], desc.nrows, desc.ncols, desc.output, True, "nrows")
        plan.idle = desc.nrows == 0 or desc.ncols == 0
        plan.args.nrows = desc.nrows
        plan.args.ncols = desc.ncols
        plan.args.format = desc.block_format
        plan.args.y_type = desc.output
        plan.args.device = plan.device_id
        plan.sku = describe_kernel(
            plan, QuantizeKind.GGUF_DEQUANTIZE, desc.output, desc.output, None
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
        cdef PyObject* arrays[SLOTS]
        weight = packed_data(
            weight, self.descriptor.block_format, self.descriptor.ncols, "weight"
        )
        arrays[WEIGHT] = <PyObject*>weight
        arrays[ACTIVATIONS] = NULL
        arrays[OUTPUT] = <PyObject*>output
        arrays[BIAS] = NULL
        arrays[WORKSPACE] = NULL
        return self.run_arrays(arrays, stream, start)

    def run(self, weight, output, *, workspace=None, stream=None):
        """Unpack `weight` into `output`.

        Parameters
        ----------
        weight : GgufTensor or uint8 array
            Packed blocks of the [nrows, ncols] matrix: any rank, contiguous, from byte
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
        try:
            self.validate(weight, output)
        except (InvalidProblem, Unsupported):
            return False
        return True


cdef int check_descriptor(object descriptor, object expected) except -1:
    if not isinstance(descriptor, expected):
        raise invalid(
            "desc", f"a {expected.__name__}", type(descriptor).__name__,
            f"pass {expected.__name__}(nrows=..., ncols=..., ...)",
        )
    return 0


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


cdef int check_out(object out, ArrayView* view, ArrayView* like, int64_t cols) except -1:
    """An output given by the caller has the shape of `like`, its last dimension being `cols`."""
    cdef bint fits = view.ndim == like.ndim
    cdef int i
    if fits:
        for i in range(like.ndim - 1):
            fits = fits and view.shape[i] == like.shape[i]
        fits = fits and view.shape[like.ndim - 1] == cols
    if not fits:
        shape = [like.shape[i] for i in range(like.ndim - 1)] + [cols]
        raise invalid("out", f"shape {shape}", describe(out), "reshape it or leave it out")
    return collapse(out, view, "out")


cdef int collapse(object array, ArrayView* view, str name) except -1:
    if not collapse_rows(view):
        raise invalid(
            name, "rows at one stride, so that leading dimensions are one", describe(array),
            "copy it, as in .contiguous() or .copy()",
        )
    return 0


def multiply(x, w, bias, out, stream, preference):
    """`linear` on a GgufTensor."""
    cdef PyObject* arrays[SLOTS]
    cdef Call call
    cdef ArrayView* view = &call.views[ACTIVATIONS]
    cdef ArrayView* scratch_view = &call.views[WORKSPACE]
    cdef int32_t device_type = HOST, device_id = 0
    cdef int slot, i
    cdef void* scratch = NULL
    cdef bint cuda
    cdef Plan plan
    cdef Allocation result = None, lent = None
    cdef object data = w.data, nothing = None, target
    memset(&call, 0, sizeof(Call))
    memset(arrays, 0, sizeof(arrays))
    arrays[WEIGHT] = <PyObject*>data
    arrays[ACTIVATIONS] = <PyObject*>x
    check_no_grad(x, "x")
    device_of(x, &device_type, &device_id)
    cuda = device_type == CUDA
    find_stream(device_type, device_id, arrays, stream, &call.stream)
    try:
        acquire_view(x, view, call.stream, cuda, "x")
        if view.element not in (F32, F16, BF16):
            raise invalid("x", "float32, float16 or bfloat16", describe(x), "convert it")
        if view.ndim == 0 or view.shape[view.ndim - 1] != w.ncols:
            raise invalid(
                "x", f"shape [..., {w.ncols}]", describe(x),
                f"its last dimension is the weight's columns ({w!r})",
            )
        if out is None:
            result = allocate_like(
                x, tuple([view.shape[i] for i in range(view.ndim - 1)]) + (w.nrows,),
                view.element, device_type, device_id, call.stream,
            )
            target = result.target
        else:
            target = out
        arrays[OUTPUT] = <PyObject*>target
        check_no_grad(target, "out")
        acquire_view(target, &call.views[OUTPUT], call.stream, cuda, "out")
        if out is not None:
            if call.views[OUTPUT].element not in (F32, view.element):
                raise invalid(
                    "out", f"{element_name(view.element)} (x's type) or float32", describe(out),
                    "convert it",
                )
        check_out(target, &call.views[OUTPUT], view, w.nrows)
        collapse(x, view, "x")
        plan = select_product(
            not cuda, device_id, <int>w.format, w.nrows, w.ncols, view.shape[0],
            view.element, call.views[OUTPUT].element, preference,
        )
        acquire_view(data, &call.views[WEIGHT], call.stream, cuda, "w")
        if bias is not None:
            arrays[BIAS] = <PyObject*>bias
            check_no_grad(bias, "bias")
            acquire_view(bias, &call.views[BIAS], call.stream, cuda, "bias")
        if plan.workspace_size:
            if cuda:
                lent = allocate_like(
                    x, (plan.workspace_size,), U8, device_type, device_id, call.stream
                )
                arrays[WORKSPACE] = <PyObject*>lent.target
                acquire_view(lent.target, scratch_view, call.stream, cuda, "workspace")
            else:
                if posix_memalign(&scratch, WORKSPACE_ALIGNMENT, plan.workspace_size):
                    raise MemoryError(f"workspace: {plan.workspace_size} bytes of host memory")
                arrays[WORKSPACE] = <PyObject*>nothing
                scratch_view.data = <char*>scratch
                scratch_view.ndim = 1
                scratch_view.shape[0] = plan.workspace_size
                scratch_view.strides[0] = 1
                scratch_view.element = U8
                scratch_view.device_type = HOST
        plan.check(&call, arrays, OF_OPERATIONS)
        plan.start(&call, arrays)
    finally:
        if scratch != NULL:
            memset(scratch_view, 0, sizeof(ArrayView))
            free(scratch)
        for slot in range(SLOTS):
            release_view(&call.views[slot])
        if lent is not None:
            lent.settle()
    return result.finish() if out is None else out


def unpack(w, dtype, out, stream, preference):
    """`dequantize` on a GgufTensor."""
    cdef PyObject* arrays[SLOTS]
    cdef Call call
    cdef ArrayView like
    cdef int32_t device_type = HOST, device_id = 0
    cdef int slot, i
    cdef bint cuda
    cdef Plan plan
    cdef Allocation result = None
    cdef object data = w.data, target = out
    memset(&call, 0, sizeof(Call))
    memset(arrays, 0, sizeof(arrays))
    memset(&like, 0, sizeof(like))
    arrays[WEIGHT] = <PyObject*>data
    device_of(data, &device_type, &device_id)
    cuda = device_type == CUDA
    if out is not None:
        check_no_grad(out, "out")
        arrays[OUTPUT] = <PyObject*>out
    find_stream(device_type, device_id, arrays, stream, &call.stream)
    try:
        if out is not None:
            acquire_view(out, &call.views[OUTPUT], call.stream, cuda, "out")
            if dtype is None and call.views[OUTPUT].element in (F32, F16, BF16):
                dtype = call.views[OUTPUT].element
        element = ElementKind.F32 if dtype is None else ElementKind.of(dtype)
        check_floating(element, "dtype")
        plan = GgufDequantizePlan.select(
            f"cuda:{device_id}" if cuda else "cpu",
            GgufDequantizeDescriptor(
                nrows=w.nrows, ncols=w.ncols, block_format=w.format, output=element
            ),
            preference,
        )
        if out is None:
            result = allocate_like(data, w.shape, element, device_type, device_id, call.stream)
            target = result.target
            arrays[OUTPUT] = <PyObject*>target
            acquire_view(target, &call.views[OUTPUT], call.stream, cuda, "out")
        acquire_view(data, &call.views[WEIGHT], call.stream, cuda, "w")
        like.ndim = len(w.shape)
        for i in range(like.ndim):
            like.shape[i] = w.shape[i]
        check_out(target, &call.views[OUTPUT], &like, w.ncols)
        plan.check(&call, arrays, OF_OPERATIONS)
        plan.start(&call, arrays)
    finally:
        for slot in range(SLOTS):
            release_view(&call.views[slot])
    return result.finish() if out is None else out


cdef bint all_finite(const char* data, int64_t count, int element) noexcept nogil:
    """Whether none of `count` floats has an exponent of ones."""
    cdef int64_t i
    cdef uint32_t worst = 0, bits
    cdef uint16_t half_mask = 0x7c00 if element == F16 else 0x7f80
    if element == F32:
        for i in range(count):
            bits = (<const uint32_t*>data)[i] & 0x7f800000
            worst = worst if worst > bits else bits
        return worst < 0x7f800000
    for i in range(count):
        bits = (<const uint16_t*>data)[i] & half_mask
        worst = worst if worst > bits else bits
    return worst < half_mask


def pack(array, block_format, threads):
    """`quantize` to a format: the packed bytes as a NumPy array, and the shape."""
    cdef ArrayView view, packed
    cdef bcy_gguf_quantize_args args
    cdef int64_t row, item
    cdef int workers = threads
    cdef bint finite = True
    import numpy as np

    memset(&view, 0, sizeof(view))
    memset(&packed, 0, sizeof(packed))
    memset(&args, 0, sizeof(args))
    check_no_grad(array, "array")
    acquire_view(array, &view, NULL, False, "array")
    try:
        if view.device_type != HOST:
            raise invalid(
                "array", "an array on the host", describe(array),
                "copy it there first, as in .cpu()",
            )
        if view.element not in (F32, F16, BF16):
            raise invalid(
                "array", "float32, float16 or bfloat16", describe(array),
                "convert it, as in .astype('float32')",
            )
        if view.ndim == 0:
            raise invalid("array", "one dimension or more", describe(array), "reshape it")
        shape = tuple([view.shape[i] for i in range(view.ndim)])
        row_bytes = block_format.row_bytes(shape[-1])
        collapse(array, &view, "array")
        item = element_bytes(view.element)
        if view.shape[0] and view.shape[1]:
            if (view.shape[1] > 1 and view.strides[1] != 1) or (
                view.shape[0] > 1 and view.strides[0] < view.shape[1]
            ):
                raise invalid(
                    "array", "contiguous rows",
                    f"strides ({view.strides[0]}, {view.strides[1]}) in {describe(array)}",
                    "copy it, as in .contiguous() or .copy()",
                )
            with nogil:
                for row in range(view.shape[0]):
                    finite = finite and all_finite(
                        view.data + row * view.strides[0] * item, view.shape[1], view.element
                    )
            if not finite:
                raise invalid(
                    "array", "finite values", f"NaN or infinity in {describe(array)}",
                    "replace them: a block's scale could not represent them",
                )
        data = np.empty((*shape[:-1], row_bytes), np.uint8)
        acquire_view(data, &packed, NULL, False, "data")
        args.x = view.data
        args.weight = packed.data
        args.nrows = view.shape[0]
        args.ncols = view.shape[1]
        args.x_stride = view.strides[0] if view.shape[0] > 1 else view.shape[1]
        args.format = block_format
        args.x_type = view.element
        if args.nrows and args.ncols:
            with nogil:
                _cpu.gguf_quantize(&args, workers)
    finally:
        release_view(&view)
        release_view(&packed)
    return data, shape


def fetch(data, stream=None):
    """A copy of the bytes of a contiguous array, wherever it is, as a NumPy array of uint8."""
    cdef ArrayView view
    cdef PyObject* arrays[SLOTS]
    cdef int32_t device_type = HOST, device_id = 0
    cdef int64_t nbytes
    cdef void* handle = NULL
    cdef char* to
    import numpy as np

    memset(&view, 0, sizeof(view))
    memset(arrays, 0, sizeof(arrays))
    arrays[WEIGHT] = <PyObject*>data
    device_of(data, &device_type, &device_id)
    # The copy runs in the order of the stream that the bytes are on, and is waited for.
    find_stream(device_type, device_id, arrays, stream, &handle)
    try:
        acquire_view(data, &view, handle, device_type == CUDA, "data")
        nbytes = elements_of(&view) * element_bytes(view.element)
        result = np.empty(nbytes, np.uint8)
        to = <char*><uintptr_t>result.ctypes.data
        if nbytes and device_type == HOST:
            memcpy(to, view.data, nbytes)
        elif nbytes:
            with nogil:
                _cuda.copy(device_id, to, view.data, nbytes, handle)
                _cuda.stream_synchronize(device_id, handle)
    finally:
        release_view(&view)
    return result


def move(data, nbytes, device, stream):
    """The first `nbytes`, or all, of `data` on `device`: itself where it is there already."""
    cdef ArrayView source, target
    cdef int32_t device_type = HOST, device_id = 0
    cdef int32_t source_type = HOST, source_id = 0
    cdef int64_t size
    cdef PyObject* arrays[SLOTS]
    cdef void* handle = NULL
    import numpy as np

    resolve_device(device, &device_type, &device_id)
    device_of(data, &source_type, &source_id)
    if device_type == source_type and (device_type == HOST or device_id == source_id):
        return data
    if source_type == HOST:
        if nbytes is not None:
            flat = data if isinstance(data, np.ndarray) else np.from_dlpack(data)
            data = flat.reshape(-1).view(np.uint8)[:nbytes]
        return DeviceBuffer.from_host(data, stream=stream, device=device_id)
    if device_type == HOST:
        return fetch(data, stream)[:nbytes]
    memset(&source, 0, sizeof(source))
    memset(&target, 0, sizeof(target))
    memset(arrays, 0, sizeof(arrays))
    arrays[WEIGHT] = <PyObject*>data
    find_stream(CUDA, source_id, arrays, stream, &handle)
    try:
        acquire_view(data, &source, handle, True, "data")
        size = elements_of(&source) * element_bytes(source.element)
        if nbytes is not None:
            size = min(size, nbytes)
        result = DeviceBuffer(size, device=device_id)
        acquire_view(result, &target, handle, True, "result")
        if size:
            with nogil:
                _cuda.copy(source_id, target.data, source.data, size, handle)
                _cuda.stream_synchronize(source_id, handle)
    finally:
        release_view(&source)
        release_view(&target)
    return result
