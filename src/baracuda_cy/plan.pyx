# SPDX-License-Identifier: Apache-2.0
"""What every plan shares: the device it is for, the check of a call's arguments, the run, the repr.

A plan fixes at `select` what each argument must be (`Operand`). A call acquires views of its
arrays, checks them against that in C, and only where something is wrong goes back to Python objects
to say what. Nothing is allocated, and nothing of a call stays in the plan.
"""

from cpython.ref cimport PyObject
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uintptr_t
from libc.string cimport memset

from baracuda_cy cimport _cuda
from baracuda_cy._overflow cimport product_overflows, sum_overflows
from baracuda_cy.dlpack cimport (
    acquire_unless_borrowed,
    acquire_view,
    borrow_view,
    check_no_tangent,
    check_plain,
    check_sign,
    current_stream_on,
    describe,
    device_of,
    in_forward_mode,
)
from baracuda_cy.elements cimport BF16, F16, F32, I8, U8, element_bytes, element_name
from baracuda_cy.pending cimport hold_until_done
from baracuda_cy.stream cimport cuda_ordinal, is_number, stream_of
from baracuda_cy.view cimport KEEP_NOTHING, ArrayView, release_view

from baracuda_cy import _cpu as _cpu_module
from baracuda_cy import _cuda as _cuda_module
from baracuda_cy.descriptors import PlanPreference
from baracuda_cy.errors import InvalidProblem, ReadOnlyArray, Unsupported, WorkspaceTooSmall
from baracuda_cy.formats import ElementKind
from baracuda_cy.sku import (
    ArchSku,
    BackendKind,
    KernelSku,
    MathPrecision,
    OpCategory,
    PrecisionGuarantee,
)


cdef enum Fault:
    SOUND
    WRONG_DEVICE
    WRONG_TYPE
    WRONG_SHAPE
    WRONG_STRIDE
    NOT_CONTIGUOUS
    TOO_SHORT
    WRONG_LENGTH
    NO_MEMORY
    MISALIGNED
    READ_ONLY
    OVERLAPPING

# NAMES borrows from it, so that no call looks into a tuple.
NAME_TABLE = (
    ("weight", "activations", "output", "bias", "workspace",
     "absmax", "nested.absmax", "nested.code"),
    ("w", "x", "out", "bias", "workspace", "w.absmax", "w.nested.absmax", "w.nested.code"),
)
cdef PyObject* NAMES[2][SLOTS]


cdef int fill_names() except -1:
    for names, words in enumerate(NAME_TABLE):
        for slot, word in enumerate(words):
            NAMES[names][slot] = <PyObject*>word
    return 0


fill_names()


cdef str name_of(Names names, int slot):
    return <str>NAMES[<int>names][slot]


cdef str message(str argument, str expected, str given, str remedy):
    return f"{argument}: expected {expected}, got {given}; {remedy}"


cdef object invalid(str argument, str expected, str given, str remedy):
    return InvalidProblem(message(argument, expected, given, remedy))


cdef str device_name(int32_t device_type, int32_t device_id):
    return "cpu" if device_type == HOST else f"cuda:{device_id}"


cdef int resolve_device(object device, int32_t* device_type, int32_t* device_id) except -1:
    """Find the device that a name, an ordinal, a stream or an array stands for."""
    cdef object asked = device
    # NumPy's numbers and strings are arrays, too.
    cdef bint numbered = is_number(asked), named = isinstance(asked, (str, bytes, bytearray))
    device_type[0] = HOST
    device_id[0] = 0
    if not (numbered or named) and device_of(asked, device_type, device_id, "device"):
        if device_type[0] == HOST:
            device_id[0] = 0
            return 0
    else:
        # torch.device prints as a name.
        if hasattr(asked, "type") and hasattr(asked, "index"):
            asked = str(asked)
        if isinstance(asked, str) and asked in ("cpu", "cpu:0"):
            return 0
        if not (
            numbered or hasattr(asked, "__cuda_stream__")
            or str(asked).partition(":")[0] == "cuda"
        ):
            raise invalid(
                "device", '"cpu", "cuda", "cuda:1", an ordinal, a Stream or an array',
                repr(device) if isinstance(device, str) else type(device).__name__,
                'name the device, as in "cpu"',
            )
        device_type[0] = CUDA
        why = _cuda_module.why_unavailable()
        if why is not None:
            raise Unsupported(f"device: {why}")
        device_id[0] = cuda_ordinal(asked)
    _cuda.require_usable_device(device_id[0])
    return 0


cdef int find_stream(
    int32_t device_type, int32_t device_id, PyObject** arrays, object stream, void** handle
) except -1:
    cdef int device = -1, slot
    handle[0] = NULL
    if device_type == HOST:
        if stream is not None:
            raise invalid("stream", "None on the CPU", type(stream).__name__, "leave it out")
        return 0
    if stream is not None:
        stream_of(stream, handle, &device)
        if device != -1 and device != device_id:
            raise invalid(
                "stream", f"a stream of cuda:{device_id}", f"one of cuda:{device}",
                "pass a stream of the device that holds the arrays",
            )
        return 0
    for slot in (ACTIVATIONS, OUTPUT, WEIGHT):
        if arrays[slot] != NULL and current_stream_on(<object>arrays[slot], device_id, handle):
            return 0
    handle[0] = NULL
    return 0


cdef bint collapse_rows(ArrayView* view) noexcept nogil:
    """Make [..., K] a matrix [M, K] in place; False where its rows do not lie at one stride."""
    cdef int64_t cols = 1, rows = 1, step = 1, stride = 0, expected = 0
    cdef int32_t i
    cdef bint found = False
    if view.ndim > 0:
        cols = view.shape[view.ndim - 1]
        step = view.strides[view.ndim - 1]
    for i in range(view.ndim - 1):
        if product_overflows(rows, view.shape[i], &rows):
            return False
    if rows > 1:
        for i in range(view.ndim - 2, -1, -1):
            if view.shape[i] == 1:
                continue
            if not found:
                found = True
                stride = view.strides[i]
            elif view.strides[i] != expected:
                return False
            if product_overflows(view.strides[i], view.shape[i], &expected):
                return False
    view.ndim = 2
    view.shape[0] = rows
    view.shape[1] = cols
    view.strides[0] = stride if found else cols
    view.strides[1] = step
    return True


cdef int64_t checked(object value, str argument) except -1:
    """A size or an offset as int64."""
    if value < 0:
        raise invalid(argument, "0 or more", str(value), "give the size in elements or bytes")
    if value > INT64_MAX:
        raise invalid(argument, "at most 2**63 - 1", str(value), "split the problem")
    return value


cdef int check_floating(object element, str argument) except -1:
    if element not in (ElementKind.F32, ElementKind.F16, ElementKind.BF16):
        raise invalid(
            argument, "float32, float16 or bfloat16", element.dtype, "choose one of them"
        )
    return 0


cdef int check_descriptor(object descriptor, object expected, str fields) except -1:
    if not isinstance(descriptor, expected):
        article = "an" if expected.__name__.startswith("N") else "a"
        raise invalid(
            "desc", f"{article} {expected.__name__}", type(descriptor).__name__,
            f"pass {expected.__name__}({fields})",
        )
    return 0


cdef int set_matrix(
    Operand* operand, object rows, object cols, object element, bint written, str argument
) except -1:
    if rows * cols > INT64_MAX // 8:
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


cdef int set_operand(
    Operand* operand, Role role, int element, object count, int64_t alignment
) except -1:
    operand.role = role
    operand.element = element
    operand.rows = 1
    operand.cols = count
    operand.alignment = alignment
    return 0


cdef bint stores_bytes(int element) noexcept nogil:
    """Whether packed codes may come as an array of this type."""
    return element in (U8, I8, F32, F16, BF16)


cdef int64_t elements_of(const ArrayView* view) noexcept nogil:
    cdef int64_t count = 1
    cdef int32_t i
    for i in range(view.ndim):
        if view.shape[i] == 0:
            return 0
    for i in range(view.ndim):
        if product_overflows(count, view.shape[i], &count):
            return INT64_MAX
    return count


cdef bint contiguous(const ArrayView* view) noexcept nogil:
    cdef int64_t expected = 1
    cdef int32_t i
    if elements_of(view) <= 1:
        return True
    for i in range(view.ndim - 1, -1, -1):
        if view.shape[i] != 1:
            if view.strides[i] != expected or product_overflows(expected, view.shape[i], &expected):
                return False
    return True


cdef bint fits(int element, const Operand* operand) noexcept nogil:
    """Whether an argument may be an array of this type."""
    if operand.role == PACKED:
        return element == U8 or element == I8
    if operand.role == CODES:
        return stores_bytes(element)
    if operand.role == SCRATCH:
        return element != 0
    return element == operand.element


cdef int64_t length_of(const Call* call, const Operand* operand) noexcept nogil:
    """Bytes or elements of a contiguous argument."""
    if operand.role != NESTED:
        return operand.cols
    return operand.cols // call.nested_block + (operand.cols % call.nested_block != 0)


cdef Fault find_fault(Call* call, int slot, const Operand* operand) noexcept nogil:
    """Compare one argument, its device apart, with what it must be; note where its bytes are."""
    cdef ArrayView* view = &call.views[slot]
    cdef int64_t item = element_bytes(view.element), size, rows, stride, step
    call.span[slot] = 0
    if not fits(view.element, operand):
        return WRONG_TYPE
    if operand.role >= PACKED:
        if not contiguous(view):
            return NOT_CONTIGUOUS
        if product_overflows(elements_of(view), item, &size):
            size = INT64_MAX
        if operand.written and view.readonly:
            return READ_ONLY
        call.data[slot] = view.data + operand.offset
        if operand.role == PACKED or operand.role == SCRATCH:
            if size - operand.offset < operand.cols:
                return TOO_SHORT
            size = operand.cols
        elif size != length_of(call, operand) * (1 if operand.role == CODES else item):
            return WRONG_LENGTH
    else:
        rows, stride, step = operand.rows, operand.cols, 1
        if operand.role == MATRIX and view.ndim == 2:
            if view.shape[0] != rows or view.shape[1] != operand.cols:
                return WRONG_SHAPE
            step = view.strides[1]
            if rows > 1:
                stride = view.strides[0]
        elif view.ndim == 1 and rows == 1 and view.shape[0] == operand.cols:
            step = view.strides[0]
        else:
            return WRONG_SHAPE
        if operand.written and view.readonly:
            return READ_ONLY
        call.data[slot] = view.data
        call.stride[slot] = operand.cols
        if rows == 0 or operand.cols == 0:
            return SOUND
        if (operand.cols > 1 and step != 1) or stride < operand.cols:
            return WRONG_STRIDE
        call.stride[slot] = stride
        if (
            product_overflows(rows - 1, stride, &size)
            or sum_overflows(size, operand.cols, &size)
            or product_overflows(size, item, &size)
        ):
            return WRONG_STRIDE
    if size == 0:
        return SOUND
    if view.data == NULL:
        return NO_MEMORY
    if <uintptr_t>call.data[slot] % <uintptr_t>operand.alignment:
        return MISALIGNED
    call.span[slot] = size
    return SOUND


cdef bint overlap(const Call* call, int a, int b) noexcept nogil:
    cdef uintptr_t first = <uintptr_t>call.data[a], second = <uintptr_t>call.data[b]
    return (
        call.span[a] != 0 and call.span[b] != 0
        and first < second + call.span[b] and second < first + call.span[a]
    )


cdef str or_select(const Call* call, str which):
    """A remedy that only those have who select plans."""
    return f", or select a plan {which}" if call.names == OF_PLANS else ""


cdef object explain_fault(
    Call* call, int slot, const Operand* operand, int fault, str name, str problem
):
    """The exception for an argument that is not what its operand says."""
    cdef ArrayView* view = &call.views[slot]
    cdef str given = describe(<object>call.arrays[slot])
    cdef str device = device_name(view.device_type, view.device_id)
    cdef str lend = f"lend Workspace(plan.workspace_size, device={device!r})"
    cdef int64_t size = elements_of(view)
    if fault == WRONG_TYPE:
        if operand.role == PACKED:
            return invalid(
                name, "uint8", given, "view the packed blocks as bytes, as in .view(uint8)"
            )
        if operand.role == CODES:
            return invalid(
                name, "uint8, or bytes stored as float32, float16 or bfloat16", given,
                "view the codes as bytes, as in .view(uint8)",
            )
        if operand.role == SCRATCH:
            return invalid(name, "bytes", given, lend)
        remedy = "convert it" + or_select(call, "whose descriptor names its type")
        if operand.role == SCALES or operand.role == NESTED:
            remedy = "pass the array that belongs to the codes: uint8 only where it is nested"
        return invalid(name, element_name(operand.element), given, remedy)
    if fault == WRONG_SHAPE:
        rows, cols = operand.rows, operand.cols
        shape = f"shape [{cols}]" if operand.role == VECTOR else f"shape [{rows}, {cols}]"
        if operand.role == MATRIX and rows == 1:
            shape += f" or [{cols}]"
        return invalid(
            name, shape, given, "reshape it" + or_select(call, "whose descriptor has its sizes")
        )
    if fault == WRONG_STRIDE or fault == NOT_CONTIGUOUS:
        expected = "one contiguous run of bytes"
        if operand.role == MATRIX:
            expected = f"stride 1 along the last axis and rows at least {operand.cols} apart"
        elif operand.role == VECTOR:
            expected = "stride 1"
        strides = ", ".join([str(view.strides[i]) for i in range(view.ndim)])
        return invalid(
            name, expected, f"strides ({strides}) in {given}",
            "copy it, as in .contiguous() or .copy()",
        )
    if fault == TOO_SHORT:
        size *= element_bytes(view.element)
        if operand.role == SCRATCH:
            return WorkspaceTooSmall(operand.cols, size)
        return invalid(
            name, f"at least {operand.offset + operand.cols} bytes{problem}",
            f"{size} in {given}",
            "pass the whole packed matrix, or correct shape, format or offset",
        )
    if fault == WRONG_LENGTH:
        expected = f"exactly {length_of(call, operand)} elements"
        if operand.role == NESTED:
            expected += f", one to {call.nested_block} blocks"
        if operand.role == CODES:
            size *= element_bytes(view.element)
            expected = f"exactly {operand.cols} bytes"
        return invalid(
            name, f"{expected}{problem}", f"{size} in {given}",
            "pass all of the weight and no more, or correct its shape or block size",
        )
    if fault == NO_MEMORY:
        return invalid(
            name, "memory", f"a null pointer for {given}", "pass an array that is allocated"
        )
    if fault == MISALIGNED:
        address = <uintptr_t>call.data[slot]
        return invalid(
            name, f"an address that is a multiple of {operand.alignment}",
            f"{address:#x} for {given}",
            lend if operand.role == SCRATCH else "copy it into an array of its own",
        )
    return ReadOnlyArray(
        message(name, "a writable array", f"read-only {given}",
                "pass one that may be written; JAX arrays are immutable")
    )


cdef void begin(Call* call, int slots) noexcept nogil:
    """Empty a call that fills no more than the first `slots`."""
    memset(call, 0, sizeof(Call) - (SLOTS - slots) * sizeof(ArrayView))


cdef int release_views(Call* call, int slots) noexcept:
    cdef int slot
    for slot in range(slots):
        if call.views[slot].keep_kind != KEEP_NOTHING:
            release_view(&call.views[slot])
    return 0


cdef int hold_foreign(Call* call, int slots, int device) except -1:
    cdef bint foreign = False
    cdef int slot
    for slot in range(slots):
        foreign |= call.views[slot].foreign_order
    if not foreign:
        return 0
    return hold_until_done(
        call.views, slots,
        tuple([<object>call.arrays[slot] for slot in range(slots) if call.arrays[slot] != NULL]),
        device, call.stream,
    )


cdef bint has_single_columns(const ArrayView* view) noexcept nogil:
    return view.ndim > 0 and view.shape[view.ndim - 1] == 1


cdef bint holds_floats(Plan plan, int slot) noexcept:
    # Only floats can require a gradient or have torch's negative bit.
    return plan.operands[slot].role in (MATRIX, VECTOR, SCALES, NESTED)


cdef int acquire(Plan plan, Call* call, int slot) except -1:
    cdef ArrayView* view = &call.views[slot]
    cdef str name = name_of(call.names, slot)
    cdef object array = <object>call.arrays[slot]
    cdef bint floats = holds_floats(plan, slot)
    if (
        acquire_unless_borrowed(
            array, view, call.stream, plan.device_type == CUDA, name, floats
        )
        and floats and has_single_columns(view)
    ):
        check_sign(array, name)
    return 0


cdef int borrow(Plan plan, Call* call) except -1:
    cdef int slot
    if in_forward_mode():
        for slot in range(plan.slots):
            if holds_floats(plan, slot) and call.arrays[slot] != NULL:
                check_no_tangent(<object>call.arrays[slot], name_of(call.names, slot))
    if borrow_all(plan, call):
        for slot in range(plan.slots):
            if holds_floats(plan, slot) and has_single_columns(&call.views[slot]):
                check_sign(<object>call.arrays[slot], name_of(call.names, slot))
        # What was asked may have run code of others.
        borrow_all(plan, call)
    return 0


cdef bint borrow_all(Plan plan, Call* call) except -1:
    """Acquire what is to be borrowed; say whether a sign in it is in doubt."""
    cdef bint in_doubt = False
    cdef int slot
    for slot in range(plan.slots):
        if call.arrays[slot] != NULL and call.views[slot].keep_kind == KEEP_NOTHING:
            borrow_view(
                <object>call.arrays[slot], &call.views[slot], call.stream,
                plan.device_type == CUDA, name_of(call.names, slot),
            )
            if has_single_columns(&call.views[slot]) and holds_floats(plan, slot):
                in_doubt = True
    return in_doubt


cdef class Plan:
    """A problem, the kernel selected for it and the device it runs on.

    Plans are immutable and may be shared between threads. They come from the ``select`` of a
    subclass; this class cannot be instantiated.

    Attributes
    ----------
    descriptor : object
        The problem, as it was given to ``select``.
    preference : PlanPreference
        The wishes it was selected with.
    sku : KernelSku
        The kernel.
    workspace_size : int
        Bytes of scratch that `run` must be lent; plans of NF4 and FP4 weights only take longer
        without.
    """

    def __init__(self, *args, **kwargs):
        raise TypeError(
            f"{type(self).__name__} is made by {type(self).__name__}.select(device, descriptor)"
        )

    cdef int require_selected(self) except -1:
        if self.sku is None:
            raise invalid(
                "plan", "one that select made", f"an empty {type(self).__name__}",
                "call its class's select",
            )
        return 0

    @property
    def device(self):
        """Device that the plan runs on, such as ``"cuda:0"``."""
        self.require_selected()
        return device_name(self.device_type, self.device_id)

    @property
    def precision_guarantee(self):
        """What the bits of the results promise: `sku.precision_guarantee`."""
        self.require_selected()
        return self.sku.precision_guarantee

    def __repr__(self):
        if self.sku is None:
            return f"{type(self).__name__}(empty)"
        guarantee = self.sku.precision_guarantee
        promises = ", ".join(
            text
            for holds, text in (
                (guarantee.deterministic, "deterministic"),
                (guarantee.batch_invariant, "batch-invariant"),
                (guarantee.bit_stable_across_hardware, "same bits on every backend"),
            )
            if holds
        )
        return f"{type(self).__name__}({self.problem()}, {self.machine()}; {promises})"

    # What cannot be changed needs no copy.
    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return type(self).select, (self.device, self.descriptor, self.preference)

    cdef str problem(self):
        return ""

    cdef str machine(self):
        if self.device_type == CUDA:
            return f"{self.device} sm_{int(self.sku.arch)}"
        if not self.threads:
            return f"cpu {self.sku.isa}"
        return f"cpu {self.sku.isa}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    cdef int bind(self, object device, object descriptor, object preference) except -1:
        """The part of `select` that does not depend on the operation."""
        if preference is None:
            preference = PlanPreference()
        elif not isinstance(preference, PlanPreference):
            raise invalid(
                "preference", "a PlanPreference", type(preference).__name__,
                "pass PlanPreference(...) or None",
            )
        resolve_device(device, &self.device_type, &self.device_id)
        self.descriptor = descriptor
        self.preference = preference
        self.slots = COMMON_SLOTS
        self.threads = preference.threads or 0
        return 0

    cdef int bind_product(
        self, object m, object nrows, object ncols, object activation, object output
    ) except -1:
        check_floating(activation, "activation")
        check_floating(output, "output")
        set_matrix(&self.operands[ACTIVATIONS], m, ncols, activation, False, "m")
        set_matrix(&self.operands[OUTPUT], m, nrows, output, True, "m")
        set_operand(&self.operands[BIAS], VECTOR, output, nrows, element_bytes(output))
        self.idle = m == 0 or nrows == 0
        return 0

    cdef int bind_workspace(self, int64_t size, bint required) except -1:
        self.workspace_size = size
        self.needs_workspace = required and size
        if size:
            set_operand(&self.operands[WORKSPACE], SCRATCH, U8, size, WORKSPACE_ALIGNMENT)
            self.operands[WORKSPACE].written = True
        return 0

    cdef int lend_workspace(self, Call* call, object workspace) except -1:
        if workspace is not None and self.workspace_size:
            call.arrays[WORKSPACE] = <PyObject*>workspace
        return 0

    cdef object describe_kernel(
        self, object op, object element, object output, object activations,
        object block_format=None, object layout=None, object epilogue=None, object math=None,
    ):
        """The SKU of a kernel; `math` where its bits are its own and not those of the CPU."""
        cdef bint host = self.device_type == HOST
        arch = ArchSku.CPU
        if not host:
            major, minor = _cuda_module.compute_capability(self.device_id)
            arch = ArchSku(10 * major + minor)
        exact = MathPrecision.INT8 if activations == "staged" else MathPrecision.F32
        return KernelSku(
            category=OpCategory.QUANTIZATION,
            op=op,
            element=element,
            aux_element=ElementKind.U8,
            output_element=output,
            block_format=block_format,
            activations=activations,
            layout=layout,
            epilogue=epilogue,
            arch=arch,
            isa=_cpu_module.isa() if host else None,
            backend=BackendKind.CPU if host else BackendKind.BESPOKE,
            precision_guarantee=PrecisionGuarantee(
                math_precision=exact if math is None else math,
                accumulator=ElementKind.F32,
                deterministic=True,
                bit_stable_on_same_hardware=True,
                batch_invariant=True,
                bit_stable_across_hardware=math is None,
            ),
        )

    cdef object lend(self, Call* call, object weight):
        cdef object data = weight.data
        call.arrays[WEIGHT] = <PyObject*>data
        return data

    cdef int launch(self, Call* call) except -1 nogil:
        return 0

    cdef int run_arrays(self, Call* call, object stream, bint start) except -1:
        cdef int slot
        find_stream(self.device_type, self.device_id, call.arrays, stream, &call.stream)
        try:
            for slot in range(self.slots):
                if call.arrays[slot] != NULL:
                    acquire(self, call, slot)
            borrow(self, call)
            self.check(call)
            if start:
                if self.needs_workspace and call.arrays[WORKSPACE] == NULL:
                    raise WorkspaceTooSmall(self.workspace_size, 0)
                self.start(call)
        finally:
            release_views(call, self.slots)
        return 0

    cdef int check(self, Call* call) except -1:
        cdef Fault fault
        cdef ArrayView* view
        cdef int slot, other
        for slot in range(self.slots):
            if self.operands[slot].role == ABSENT or call.arrays[slot] == NULL:
                continue
            view = &call.views[slot]
            fault = WRONG_DEVICE
            if view.device_type == self.device_type and (
                view.device_type == HOST or view.device_id == self.device_id
            ):
                fault = find_fault(call, slot, &self.operands[slot])
            if fault != SOUND:
                raise self.explain(call, slot, fault, 0)
        for slot in (OUTPUT, WORKSPACE):
            if call.arrays[slot] != NULL:
                for other in range(self.slots):
                    if other != slot and overlap(call, slot, other):
                        raise self.explain(call, slot, OVERLAPPING, other)
        return 0

    cdef int start(self, Call* call) except -1:
        if self.idle:
            return 0
        if self.device_type == HOST:
            with nogil:
                self.launch(call)
            return 0
        try:
            with nogil:
                self.launch(call)
        finally:
            # Also after a failure: a kernel that was launched before it still reads the arrays.
            hold_foreign(call, self.slots, self.device_id)
        return 0

    cdef object explain(self, Call* call, int slot, int fault, int other):
        """The exception for an argument that does not fit."""
        cdef str name = name_of(call.names, slot)
        cdef str given = describe(<object>call.arrays[slot])
        if fault == WRONG_DEVICE:
            there = device_name(call.views[slot].device_type, call.views[slot].device_id)
            return invalid(
                name, f"an array on {self.device}", given,
                "move it there" + or_select(call, f"for {there}"),
            )
        if fault == OVERLAPPING:
            return invalid(
                name, f"memory apart from {name_of(call.names, other)}",
                f"{given} overlapping {describe(<object>call.arrays[other])}",
                "give it memory of its own",
            )
        return explain_fault(
            call, slot, &self.operands[slot], fault, name, f" ({self.problem()})"
        )


def accepts(validate, *arguments, **keywords):
    """Whether a plan's `validate` finds nothing wrong with these arguments."""
    try:
        validate(*arguments, **keywords)
    except (InvalidProblem, Unsupported):
        return False
    return True


cdef tuple inspect(
    object data, str name, Role role, int element, object count, int64_t alignment
):
    """Check one array as plans do; give the name of its device and its count."""
    cdef Call call
    cdef Operand operand
    cdef Fault fault
    begin(&call, 1)
    memset(&operand, 0, sizeof(Operand))
    check_plain(data, name)
    call.arrays[WEIGHT] = <PyObject*>data
    acquire_view(data, &call.views[WEIGHT], NULL, False, name)
    try:
        operand.role = role
        operand.element = element
        operand.cols = elements_of(&call.views[WEIGHT]) if count is None else count
        operand.alignment = alignment
        fault = find_fault(&call, WEIGHT, &operand)
        if fault != SOUND:
            raise explain_fault(&call, WEIGHT, &operand, fault, name, "")
        return (
            device_name(call.views[WEIGHT].device_type, call.views[WEIGHT].device_id),
            operand.cols,
        )
    finally:
        release_views(&call, 1)


def inspect_packed(object data, int64_t needed, int64_t alignment):
    """Check that `data` holds `needed` packed bytes or more; return the name of its device."""
    return inspect(data, "data", PACKED, U8, needed, alignment)[0]


def inspect_codes(object data, int64_t nbytes):
    """Check that `data` holds exactly `nbytes` of codes; return the name of its device."""
    return inspect(data, "data", CODES, U8, nbytes, 1)[0]


def inspect_scales(object array, str name, object element, count=None):
    """Check that `array` holds `count` values, or any; return its device's name and how many."""
    return inspect(array, name, SCALES, element, count, element_bytes(element))
