# SPDX-License-Identifier: Apache-2.0
"""What `linear`, `dequantize`, `quantize` and moving a weight run, for every kind of weight."""

from cpython.ref cimport PyObject
from cpython.type cimport PyType_IsSubtype
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from baracuda_cy cimport _cpu, _cuda
from baracuda_cy._native cimport (
    BCY_ERROR_OUT_OF_MEMORY,
    bcy_gguf_quantize_args,
    bcy_nf4_nest_args,
    bcy_nf4_quantize_args,
)
from baracuda_cy.allocation cimport Allocation, allocate_like
from baracuda_cy.dlpack cimport (
    acquire_unless_borrowed,
    acquire_view,
    borrow_view,
    check_no_grad,
    check_plain,
    check_sign,
    describe,
    device_of,
    hold_view,
    is_borrowed,
)
from baracuda_cy.elements cimport BF16, F16, F32, U8, element_bytes, element_name
from baracuda_cy.plan cimport (
    ABSMAX,
    ACTIVATIONS,
    BIAS,
    CUDA,
    HOST,
    NESTED_ABSMAX,
    NESTED_CODE,
    OF_OPERATIONS,
    OUTPUT,
    SLOTS,
    WEIGHT,
    WORKSPACE,
    WORKSPACE_ALIGNMENT,
    Call,
    Plan,
    acquire,
    begin,
    borrow,
    check_floating,
    collapse_rows,
    contiguous,
    elements_of,
    find_stream,
    has_single_columns,
    hold_foreign,
    invalid,
    release_views,
    resolve_device,
)
from baracuda_cy.view cimport ArrayView, release_view

from baracuda_cy import gguf, nf4
from baracuda_cy.codebooks import dynamic_code
from baracuda_cy.descriptors import GgufDequantizeDescriptor
from baracuda_cy.errors import InvalidProblem
from baracuda_cy.formats import ElementKind
from baracuda_cy.memory import DeviceBuffer
from baracuda_cy.tensor import GgufTensor


cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void** pointer, size_t alignment, size_t size)


cdef int NESTED_BLOCK = 256

cdef type gguf_type = GgufTensor
cdef object select_gguf = gguf.select_product
cdef object select_nf4 = nf4.select_product


cdef int check_shape(object out, ArrayView* view, ArrayView* like, int64_t cols) except -1:
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
    return 0


cdef int look(object array, ArrayView* view, void* stream, bint cuda, str name) except -1:
    """Acquire a view; one that is to be borrowed is only read for now."""
    if not acquire_unless_borrowed(array, view, stream, cuda, name, True):
        borrow_view(array, view, NULL, False, name)
    return 0


cdef int collapse(object array, ArrayView* view, str name) except -1:
    if not collapse_rows(view):
        raise invalid(
            name, "rows at one stride, so that leading dimensions are one", describe(array),
            "copy it, as in .contiguous() or .copy()",
        )
    return 0


cdef int check_rows(object array, const ArrayView* view, str name) except -1:
    """The rows of a matrix are contiguous, and apart from each other."""
    cdef int64_t rows = view.shape[0], cols = view.shape[1]
    if rows and cols and (
        (cols > 1 and view.strides[1] != 1) or (rows > 1 and view.strides[0] < cols)
    ):
        raise invalid(
            name, f"stride 1 along the last axis and rows at least {cols} apart",
            f"strides ({view.strides[0]}, {view.strides[1]}) in {describe(array)}",
            "copy it, as in .contiguous() or .copy()",
        )
    return 0


cdef int look_at_activations(
    Call* call, object x, object w, object stream, int32_t* device_type, int32_t* device_id
) except -1:
    """Acquire `x`, which says where the call runs, and check it against the weight.

    A view that is to be borrowed is only read for now, as in `look`.
    """
    cdef ArrayView* view = &call.views[ACTIVATIONS]
    cdef bint borrowed = is_borrowed(x)
    check_no_grad(x, "x")
    if borrowed:
        borrow_view(x, view, NULL, False, "x")
        device_type[0], device_id[0] = view.device_type, view.device_id
    else:
        device_of(x, device_type, device_id, "x")
    find_stream(device_type[0], device_id[0], call.arrays, stream, &call.stream)
    if not borrowed:
        acquire_view(x, view, call.stream, device_type[0] == CUDA, "x")
    if has_single_columns(view):
        check_sign(x, "x")
    if view.element not in (F32, F16, BF16):
        raise invalid("x", "float32, float16 or bfloat16", describe(x), "convert it")
    if view.ndim == 0 or view.shape[view.ndim - 1] != w.ncols:
        raise invalid(
            "x", f"shape [..., {w.ncols}]", describe(x),
            f"its last dimension is the weight's columns ({w!r})",
        )
    return 0


def multiply(x, w, bias, out, stream, preference):
    """`linear` on a packed weight."""
    cdef Call call
    cdef ArrayView* view = &call.views[ACTIVATIONS]
    cdef ArrayView* out_view = &call.views[OUTPUT]
    cdef ArrayView* scratch_view = &call.views[WORKSPACE]
    cdef ArrayView matrix
    cdef int32_t device_type = HOST, device_id = 0
    cdef int slot, i, output
    cdef void* scratch = NULL
    cdef bint cuda
    cdef Plan plan
    cdef Allocation result = None, lent = None
    cdef object data = w.data, nothing = None, target
    begin(&call, SLOTS)
    call.names = OF_OPERATIONS
    call.arrays[WEIGHT] = <PyObject*>data
    call.arrays[ACTIVATIONS] = <PyObject*>x
    try:
        look_at_activations(&call, x, w, stream, &device_type, &device_id)
        cuda = device_type == CUDA
        output = view.element
        # Before memory for its result is asked for.
        matrix = view[0]
        collapse(x, &matrix, "x")
        check_rows(x, &matrix, "x")
        if out is None:
            result = allocate_like(
                x, tuple([view.shape[i] for i in range(view.ndim - 1)]) + (w.nrows,),
                output, device_type, device_id, call.stream,
            )
            target = result.target
            acquire_unless_borrowed(target, out_view, call.stream, cuda, "out", False)
        else:
            target = out
            look(out, out_view, call.stream, cuda, "out")
            if has_single_columns(out_view):
                check_sign(out, "out")
            output = out_view.element
            if output not in (F32, view.element):
                raise invalid(
                    "out", f"{element_name(view.element)} (x's type) or float32", describe(out),
                    "convert it",
                )
            check_shape(out, out_view, view, w.nrows)
        call.arrays[OUTPUT] = <PyObject*>target
        if PyType_IsSubtype(type(w), gguf_type):
            plan = select_gguf(
                not cuda, device_id, <int>w.format, w.nrows, w.ncols, matrix.shape[0],
                view.element, output, preference,
            )
        else:
            plan = select_nf4(
                not cuda, device_id, w._problem, matrix.shape[0], view.element, output,
                bias is not None, preference,
            )
        _owner = plan.lend(&call, w)  # held until the call returns
        if bias is not None:
            call.arrays[BIAS] = <PyObject*>bias
        for slot in range(plan.slots):
            if slot != ACTIVATIONS and slot != OUTPUT and call.arrays[slot] != NULL:
                acquire(plan, &call, slot)
        if plan.workspace_size and cuda:
            lent = allocate_like(
                x, (plan.workspace_size,), U8, device_type, device_id, call.stream
            )
            call.arrays[WORKSPACE] = <PyObject*>lent.target
            acquire_unless_borrowed(
                lent.target, scratch_view, call.stream, cuda, "workspace", False
            )
        borrow(plan, &call)
        collapse(x, view, "x")
        collapse(target, out_view, "out")
        if plan.workspace_size and not cuda:
            if posix_memalign(&scratch, WORKSPACE_ALIGNMENT, plan.workspace_size):
                _cuda.check(BCY_ERROR_OUT_OF_MEMORY, f"workspace: {plan.workspace_size} bytes")
            call.arrays[WORKSPACE] = <PyObject*>nothing
            scratch_view.data = <char*>scratch
            scratch_view.ndim = 1
            scratch_view.shape[0] = plan.workspace_size
            scratch_view.strides[0] = 1
            scratch_view.element = U8
            scratch_view.device_type = HOST
        plan.check(&call)
        plan.start(&call)
    finally:
        if scratch != NULL:
            memset(scratch_view, 0, sizeof(ArrayView))
            free(scratch)
        release_views(&call, SLOTS)
        if lent is not None:
            lent.settle()
    return result.finish() if out is None else out


def unpack(w, dtype, out, stream, preference):
    """`dequantize` on a packed weight."""
    cdef Call call
    cdef ArrayView like
    cdef int32_t device_type = HOST, device_id = 0
    cdef int slot, i
    cdef bint cuda
    cdef Plan plan
    cdef Allocation result = None
    cdef object data = w.data, target = out
    begin(&call, SLOTS)
    memset(&like, 0, sizeof(like))
    call.names = OF_OPERATIONS
    call.arrays[WEIGHT] = <PyObject*>data
    device_of(data, &device_type, &device_id, "data")
    cuda = device_type == CUDA
    if out is not None:
        check_plain(out, "out")
        call.arrays[OUTPUT] = <PyObject*>out
    find_stream(device_type, device_id, call.arrays, stream, &call.stream)
    try:
        if out is not None:
            look(out, &call.views[OUTPUT], call.stream, cuda, "out")
            if dtype is None and call.views[OUTPUT].element in (F32, F16, BF16):
                dtype = call.views[OUTPUT].element
        element = ElementKind.F32 if dtype is None else ElementKind.of(dtype)
        check_floating(element, "dtype")
        device = f"cuda:{device_id}" if cuda else "cpu"
        if PyType_IsSubtype(type(w), gguf_type):
            plan = gguf.GgufDequantizePlan.select(
                device,
                GgufDequantizeDescriptor(
                    nrows=w.nrows, ncols=w.ncols, block_format=w.format, output=element
                ),
                preference,
            )
        else:
            plan = nf4.select_dequantize(device, w._problem, element, preference)
        if out is None:
            result = allocate_like(data, w.shape, element, device_type, device_id, call.stream)
            target = result.target
            call.arrays[OUTPUT] = <PyObject*>target
            acquire_unless_borrowed(target, &call.views[OUTPUT], call.stream, cuda, "out", False)
        _owner = plan.lend(&call, w)  # held until the call returns
        for slot in range(plan.slots):
            if slot != OUTPUT and call.arrays[slot] != NULL:
                acquire(plan, &call, slot)
        like.ndim = len(w.shape)
        for i in range(like.ndim):
            like.shape[i] = w.shape[i]
        borrow(plan, &call)
        check_shape(target, &call.views[OUTPUT], &like, w.ncols)
        collapse(target, &call.views[OUTPUT], "out")
        plan.check(&call)
        plan.start(&call)
    finally:
        release_views(&call, SLOTS)
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


cdef int acquire_floats(object array, ArrayView* view, void* stream, bint cuda) except -1:
    """View what is to be quantized: floats of one dimension or more."""
    check_plain(array, "array")
    hold_view(array, view, stream, cuda, "array")
    if view.element not in (F32, F16, BF16):
        raise invalid(
            "array", "float32, float16 or bfloat16", describe(array),
            "convert it, as in .astype('float32')",
        )
    if view.ndim == 0:
        raise invalid("array", "one dimension or more", describe(array), "reshape it")
    return 0


cdef int check_finite(object array, const ArrayView* view) except -1:
    """What is to be quantized on the host, a matrix by now, holds neither NaN nor infinity."""
    cdef int64_t row, item = element_bytes(view.element)
    cdef bint finite = True
    if view.shape[1] == 0:
        # Of rows without columns there may be more than can be counted through.
        return 0
    with nogil:
        for row in range(view.shape[0]):
            finite = finite and all_finite(
                view.data + row * view.strides[0] * item, view.shape[1], view.element
            )
    if not finite:
        raise not_finite(array)
    return 0


cdef object not_finite(object array):
    return invalid(
        "array", "finite values", f"NaN or infinity in {describe(array)}",
        "replace them: a block's scale could not represent them",
    )


def pack(array, block_format, threads):
    """`quantize` to a GGUF format: the packed bytes as a NumPy array, and the shape."""
    cdef ArrayView view, packed
    cdef bcy_gguf_quantize_args args
    cdef int workers = threads
    import numpy as np

    memset(&view, 0, sizeof(view))
    memset(&packed, 0, sizeof(packed))
    memset(&args, 0, sizeof(args))
    try:
        acquire_floats(array, &view, NULL, False)
        if view.device_type != HOST:
            raise invalid(
                "array", "an array on the host", describe(array),
                "copy it there first, as in .cpu()",
            )
        shape = tuple([view.shape[i] for i in range(view.ndim)])
        if shape[-1] % block_format.block_size:
            raise invalid(
                "array",
                f"a multiple of {block_format.block_size} columns "
                f"(the block size of {block_format.name})",
                describe(array), "pad the rows or choose a format with smaller blocks",
            )
        row_bytes = block_format.row_bytes(shape[-1])
        collapse(array, &view, "array")
        check_rows(array, &view, "array")
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
            try:
                with nogil:
                    _cpu.gguf_quantize(&args, workers)
            except InvalidProblem:
                # All else that it refuses was looked at above.
                raise not_finite(array) from None
    finally:
        release_view(&view)
        release_view(&packed)
    return data, shape


cdef Allocation place(
    Call* call, int slot, object like, int64_t count, int element, int device_type, int device_id
):
    """Memory for what is to be written: an array of the kind of `like`."""
    cdef Allocation made = allocate_like(
        like, (count,), element, device_type, device_id, call.stream
    )
    cdef object target = made.target
    call.arrays[slot] = <PyObject*>target
    acquire_view(target, &call.views[slot], call.stream, device_type == CUDA, "result")
    return made


def encode(array, codebook, block_size, nested, threads):
    """`quantize` to codes of 4 bits, on the device of the array.

    Gives the codes, their absmax, where that is `nested` its table, scales and offset, and the
    shape and the type of the array.
    """
    cdef Call call
    cdef ArrayView* view = &call.views[ACTIVATIONS]
    cdef bcy_nf4_quantize_args args
    cdef bcy_nf4_nest_args nest
    cdef int32_t device_type = HOST, device_id = 0
    cdef int workers = threads
    cdef bint cuda
    cdef char* to
    cdef Allocation codes, absmax, scales = None, outer = None, table = None
    cdef object code, tables = None
    import numpy as np

    begin(&call, SLOTS)
    memset(&args, 0, sizeof(args))
    memset(&nest, 0, sizeof(nest))
    device_of(array, &device_type, &device_id, "array")
    cuda = device_type == CUDA
    if cuda:
        _cuda.require_usable_device(device_id)
    like = array if cuda else np.empty(0, np.uint8)
    call.arrays[ACTIVATIONS] = <PyObject*>array
    find_stream(device_type, device_id, call.arrays, None, &call.stream)
    try:
        acquire_floats(array, view, call.stream, cuda)
        if not contiguous(view):
            raise invalid(
                "array", "contiguous memory, as blocks run across rows", describe(array),
                "copy it, as in .contiguous() or .copy()",
            )
        shape = tuple([view.shape[i] for i in range(view.ndim)])
        collapse(array, view, "array")
        if not cuda:
            check_finite(array, view)
        args.x = view.data
        args.count = elements_of(view)
        args.block_size = block_size
        args.codebook = codebook
        args.x_type = view.element
        args.device = device_id
        nest.count = args.count // args.block_size + (args.count % args.block_size != 0)
        nest.nested_block = NESTED_BLOCK
        nest.device = device_id
        codes = place(
            &call, WEIGHT, like, args.count // 2 + args.count % 2, U8, device_type, device_id
        )
        absmax = place(&call, ABSMAX, like, nest.count, F32, device_type, device_id)
        args.codes = call.views[WEIGHT].data
        args.absmax = <float*>call.views[ABSMAX].data
        if args.count:
            with nogil:
                if cuda:
                    _cuda.nf4_quantize(&args, call.stream)
                else:
                    _cpu.nf4_quantize(&args, workers)
        if nested:
            code = dynamic_code()
            # The offset is a mean in float64, taken on the host whatever the device.
            seen = np.empty(nest.count, np.float32)
            to = <char*><uintptr_t>seen.ctypes.data
            if cuda:
                table = place(&call, NESTED_CODE, like, 256, F32, device_type, device_id)
                with nogil:
                    _cuda.copy(device_id, to, args.absmax, 4 * nest.count, call.stream)
                    _cuda.stream_synchronize(device_id, call.stream)
                to = <char*><uintptr_t>code.ctypes.data
                with nogil:
                    _cuda.copy(device_id, call.views[NESTED_CODE].data, to, 1024, call.stream)
                nest.nested_code = <const float*>call.views[NESTED_CODE].data
            else:
                memcpy(to, args.absmax, 4 * nest.count)
                nest.nested_code = <const float*><uintptr_t>code.ctypes.data
            nest.offset = np.mean(seen, dtype=np.float64) if nest.count else 0.0
            outer = place(&call, OUTPUT, like, nest.count, U8, device_type, device_id)
            scales = place(
                &call, NESTED_ABSMAX, like,
                nest.count // NESTED_BLOCK + (nest.count % NESTED_BLOCK != 0), F32,
                device_type, device_id,
            )
            nest.absmax = args.absmax
            nest.codes = call.views[OUTPUT].data
            nest.nested_absmax = <float*>call.views[NESTED_ABSMAX].data
            if nest.count:
                with nogil:
                    if cuda:
                        _cuda.nf4_nest(&nest, call.stream)
                    else:
                        _cpu.nf4_nest(&nest, workers)
    finally:
        if cuda:
            # Also after a failure: a kernel that was launched before it still reads the arrays.
            hold_foreign(&call, SLOTS, device_id)
        release_views(&call, SLOTS)
    kind = ElementKind(args.x_type)
    if not nested:
        return codes.finish(), absmax.finish(), None, shape, kind
    absmax.settle()
    tables = (code if table is None else table.finish(), scales.finish(), nest.offset)
    return codes.finish(), outer.finish(), tables, shape, kind


def require_values(array, name):
    """Refuse a torch tensor whose memory does not hold its values."""
    check_sign(array, name)


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
    device_of(data, &device_type, &device_id, "data")
    # The copy runs in the order of the stream that the bytes are on, and is waited for.
    find_stream(device_type, device_id, arrays, stream, &handle)
    try:
        hold_view(data, &view, handle, device_type == CUDA, "data")
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
    device_of(data, &source_type, &source_id, "data")
    if device_type == source_type and (device_type == HOST or device_id == source_id):
        if device_type == HOST:
            find_stream(HOST, 0, arrays, stream, &handle)
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
        hold_view(data, &source, handle, True, "data")
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
