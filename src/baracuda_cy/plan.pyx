# SPDX-License-Identifier: Apache-2.0
"""What every plan shares: the device it is for, the check of a call's arguments, the run, the repr.

A plan fixes at `select` what each argument must be (`Operand`). A call acquires views of its
arrays, checks them against that in C, and only where something is wrong goes back to Python objects
to say what. Nothing is allocated, and nothing of a call stays in the plan.
"""

from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.string cimport memset

from baracuda_cy cimport _cuda
from baracuda_cy.dlpack cimport (
    ArrayView,
    acquire_view,
    check_no_grad,
    current_stream_on,
    describe,
    device_of,
    element_bytes,
    element_name,
    hold_until_done,
    release_view,
)
from baracuda_cy.stream cimport cuda_ordinal, stream_of

from baracuda_cy.errors import InvalidProblem, ReadOnlyArray, Unsupported, WorkspaceTooSmall
from baracuda_cy.sku import PlanPreference

from baracuda_cy import _cuda as _cuda_module


cdef extern from *:
    """
    static inline int bcy_product_overflows(int64_t a, int64_t b, int64_t* r) {
      return __builtin_mul_overflow(a, b, r);
    }
    static inline int bcy_sum_overflows(int64_t a, int64_t b, int64_t* r) {
      return __builtin_add_overflow(a, b, r);
    }
    """
    bint product_overflows "bcy_product_overflows"(int64_t a, int64_t b, int64_t* r) noexcept nogil
    bint sum_overflows "bcy_sum_overflows"(int64_t a, int64_t b, int64_t* r) noexcept nogil


cdef enum:
    F32 = 1
    F16 = 2
    BF16 = 3
    U8 = 4
    I8 = 5

cdef enum Fault:
    SOUND
    WRONG_DEVICE
    WRONG_TYPE
    WRONG_SHAPE
    WRONG_STRIDE
    NOT_CONTIGUOUS
    TOO_SHORT
    NO_MEMORY
    MISALIGNED
    READ_ONLY
    OVERLAPPING

cdef int64_t LARGEST = 0x7fffffffffffffff

# NAMES borrows from it, so that no call looks into a tuple.
NAME_TABLE = (
    ("weight", "activations", "output", "bias", "workspace"),
    ("w", "x", "out", "bias", "workspace"),
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
    """Find the device that a name, a stream or an array stands for."""
    cdef object asked = device
    device_type[0] = HOST
    device_id[0] = 0
    if device_of(asked, device_type, device_id):
        if device_type[0] == HOST:
            device_id[0] = 0
            return 0
    else:
        # torch.device prints as a name.
        if hasattr(asked, "type") and hasattr(asked, "index"):
            asked = str(asked)
        if isinstance(asked, str) and asked in ("cpu", "cpu:0"):
            return 0
        if not hasattr(asked, "__cuda_stream__") and str(asked).partition(":")[0] != "cuda":
            raise invalid(
                "device", '"cpu", "cuda", "cuda:1", a Stream or an array',
                repr(device) if isinstance(device, str) else type(device).__name__,
                'name the device, as in "cpu"',
            )
        device_type[0] = CUDA
        why = _cuda_module.why_unavailable()
        if why is not None:
            raise Unsupported(f"device: {why}")
        device_id[0] = cuda_ordinal(asked)
    _cuda.require_device(device_id[0])
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
    if value > LARGEST:
        raise invalid(argument, "at most 2**63 - 1", str(value), "split the problem")
    return value


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
            return LARGEST
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


cdef Fault find_fault(Call* call, int slot, const Operand* operand) noexcept nogil:
    """Compare one argument, its device apart, with what it must be; note where its bytes are."""
    cdef ArrayView* view = &call.views[slot]
    cdef int64_t item = element_bytes(view.element), size, rows, stride, step
    call.span[slot] = 0
    if operand.role == PACKED or operand.role == SCRATCH:
        if operand.role == PACKED and view.element != U8 and view.element != I8:
            return WRONG_TYPE
        if item == 0:
            return WRONG_TYPE
        if not contiguous(view):
            return NOT_CONTIGUOUS
        if product_overflows(elements_of(view), item, &size):
            size = LARGEST
        if operand.written and view.readonly:
            return READ_ONLY
        if size - operand.offset < operand.cols:
            return TOO_SHORT
        call.data[slot] = view.data + operand.offset
        size = operand.cols
    else:
        if view.element != operand.element:
            return WRONG_TYPE
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
        Bytes of scratch that `run` must be lent.
    """

    def __init__(self, *args, **kwargs):
        raise TypeError(
            f"{type(self).__name__} is made by {type(self).__name__}.select(device, descriptor)"
        )

    @property
    def device(self):
        """Device that the plan runs on, such as ``"cuda:0"``."""
        return device_name(self.device_type, self.device_id)

    @property
    def precision_guarantee(self):
        """What the bits of the results promise: `sku.precision_guarantee`."""
        return self.sku.precision_guarantee

    def __repr__(self):
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
                "pref", "a PlanPreference", type(preference).__name__,
                "pass PlanPreference(...) or None",
            )
        resolve_device(device, &self.device_type, &self.device_id)
        self.descriptor = descriptor
        self.preference = preference
        self.threads = preference.threads or 0
        return 0

    cdef int launch(self, Call* call) except -1 nogil:
        return 0

    cdef int run_arrays(self, PyObject** arrays, object stream, bint start) except -1:
        cdef Call call
        cdef int slot
        memset(&call, 0, sizeof(Call))
        find_stream(self.device_type, self.device_id, arrays, stream, &call.stream)
        try:
            for slot in range(SLOTS):
                if arrays[slot] != NULL:
                    # Only floats can require a gradient.
                    if self.operands[slot].role in (MATRIX, VECTOR):
                        check_no_grad(<object>arrays[slot], name_of(OF_PLANS, slot))
                    acquire_view(
                        <object>arrays[slot], &call.views[slot], call.stream,
                        self.device_type == CUDA, name_of(OF_PLANS, slot),
                    )
            self.check(&call, arrays, OF_PLANS)
            if start:
                if self.workspace_size and arrays[WORKSPACE] == NULL:
                    raise WorkspaceTooSmall(self.workspace_size, 0)
                self.start(&call, arrays)
        finally:
            for slot in range(SLOTS):
                release_view(&call.views[slot])
        return 0

    cdef int check(self, Call* call, PyObject** arrays, Names names) except -1:
        cdef Fault fault
        cdef ArrayView* view
        cdef int slot, other
        for slot in range(SLOTS):
            if self.operands[slot].role == ABSENT:
                continue
            if arrays[slot] == NULL:
                continue
            view = &call.views[slot]
            fault = WRONG_DEVICE
            if view.device_type == self.device_type and (
                view.device_type == HOST or view.device_id == self.device_id
            ):
                fault = find_fault(call, slot, &self.operands[slot])
            if fault != SOUND:
                raise self.explain(call, arrays, names, slot, fault, 0)
        for slot in (OUTPUT, WORKSPACE):
            if arrays[slot] != NULL:
                for other in range(SLOTS):
                    if other != slot and overlap(call, slot, other):
                        raise self.explain(call, arrays, names, slot, OVERLAPPING, other)
        return 0

    cdef int start(self, Call* call, PyObject** arrays) except -1:
        cdef bint foreign = False
        cdef int slot
        if self.idle:
            return 0
        if self.device_type == HOST:
            with nogil:
                self.launch(call)
            return 0
        for slot in range(SLOTS):
            foreign |= call.views[slot].foreign_order
        if not foreign:
            with nogil:
                self.launch(call)
            return 0
        try:
            with nogil:
                self.launch(call)
        finally:
            # Also after a failure: a kernel that was launched before it still reads the arrays.
            hold_until_done(
                call.views, SLOTS,
                tuple([<object>arrays[slot] for slot in range(SLOTS) if arrays[slot] != NULL]),
                self.device_id, call.stream,
            )
        return 0

    cdef object explain(
        self, Call* call, PyObject** arrays, Names names, int slot, int fault, int other
    ):
        """The exception for an argument that does not fit."""
        cdef Operand* operand = &self.operands[slot]
        cdef ArrayView* view = &call.views[slot]
        cdef str name = name_of(names, slot)
        cdef str given = describe(<object>arrays[slot])
        cdef int64_t size
        if fault == WRONG_DEVICE:
            there = device_name(view.device_type, view.device_id)
            return invalid(
                name, f"an array on {self.device}", given,
                f"move it there, or select a plan for {there}",
            )
        if fault == WRONG_TYPE:
            if operand.role == PACKED:
                return invalid(
                    name, "uint8", given, "view the packed blocks as bytes, as in .view(uint8)"
                )
            if operand.role == SCRATCH:
                return invalid(
                    name, "bytes", given,
                    f"lend Workspace(plan.workspace_size, device={self.device!r})",
                )
            return invalid(
                name, element_name(operand.element), given,
                "convert it, or select a plan whose descriptor names its type",
            )
        if fault == WRONG_SHAPE:
            rows, cols = operand.rows, operand.cols
            shape = f"shape [{cols}]" if operand.role == VECTOR else f"shape [{rows}, {cols}]"
            if operand.role == MATRIX and rows == 1:
                shape += f" or [{cols}]"
            return invalid(
                name, shape, given, "reshape it, or select a plan whose descriptor has its sizes"
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
            size = elements_of(view) * element_bytes(view.element)
            if operand.role == SCRATCH:
                return WorkspaceTooSmall(operand.cols, size)
            return invalid(
                name, f"at least {operand.offset + operand.cols} bytes ({self.problem()})",
                f"{size} in {given}",
                "pass the whole packed matrix, or correct shape, format or offset",
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
                f"lend Workspace(plan.workspace_size, device={self.device!r})"
                if operand.role == SCRATCH else "copy it into an array of its own",
            )
        if fault == READ_ONLY:
            return ReadOnlyArray(
                message(name, "a writable array", f"read-only {given}",
                        "pass one that may be written; JAX arrays are immutable")
            )
        return invalid(
            name, f"memory apart from {name_of(names, other)}",
            f"{given} overlapping {describe(<object>arrays[other])}",
            "give it memory of its own",
        )


def inspect_packed(object data, int64_t needed, int64_t alignment):
    """Check that `data` holds `needed` packed bytes; return the name of its device."""
    cdef ArrayView view
    cdef int64_t size
    memset(&view, 0, sizeof(view))
    acquire_view(data, &view, NULL, False, "data")
    try:
        if view.element != U8 and view.element != I8:
            raise invalid(
                "data", "uint8", describe(data),
                "view the packed blocks as bytes, as in .view(uint8)",
            )
        if not contiguous(&view):
            raise invalid(
                "data", "one contiguous run of bytes", describe(data),
                "copy it, as in .contiguous() or .copy()",
            )
        size = elements_of(&view)
        if size < needed:
            raise invalid(
                "data", f"at least {needed} bytes", f"{size} in {describe(data)}",
                "correct format and shape, or pass the whole packed matrix",
            )
        if needed and <uintptr_t>view.data % <uintptr_t>alignment:
            raise invalid(
                "data", f"an address that is a multiple of {alignment}",
                f"{<uintptr_t>view.data:#x} for {describe(data)}",
                "copy it into an array of its own",
            )
        return device_name(view.device_type, view.device_id)
    finally:
        release_view(&view)


def inspect_values(object data, str name, object element, object count):
    """Check that `data` holds `count` values of type `element`; return its device and how many.

    Without an element it is bytes that are counted, of any type that they may be stored as; without
    a count there may be any number.
    """
    cdef ArrayView view
    cdef int64_t size
    memset(&view, 0, sizeof(view))
    check_no_grad(data, name)
    acquire_view(data, &view, NULL, False, name)
    try:
        if element is None and not stores_bytes(view.element):
            raise invalid(
                name, "uint8, or bytes stored as float32, float16 or bfloat16", describe(data),
                "view the codes as bytes, as in .view(uint8)",
            )
        if element is not None and view.element != element:
            raise invalid(name, element.dtype, describe(data), "convert it")
        if not contiguous(&view):
            raise invalid(
                name, "contiguous memory", describe(data),
                "copy it, as in .contiguous() or .copy()",
            )
        size = elements_of(&view)
        unit = "elements"
        if element is None:
            size *= element_bytes(view.element)
            unit = "bytes"
        if count is not None and size != count:
            raise invalid(
                name, f"exactly {count} {unit}", f"{size} in {describe(data)}",
                "correct shape and block size, or pass all of the weight and no more",
            )
        if size and element is not None and <uintptr_t>view.data % element_bytes(view.element):
            raise invalid(
                name, f"an address that is a multiple of {element_bytes(view.element)}",
                f"{<uintptr_t>view.data:#x} for {describe(data)}",
                "copy it into an array of its own",
            )
        return device_name(view.device_type, view.device_id), size
    finally:
        release_view(&view)
