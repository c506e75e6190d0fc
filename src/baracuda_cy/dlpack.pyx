# SPDX-License-Identifier: Apache-2.0
"""Arrays of any library, as they come in.

By the C exchange table of the type, else ``__dlpack__``, else ``__cuda_array_interface__``, else
the buffer protocol. NumPy arrays go through the buffer protocol, which is faster and knows what is
read-only. How a type is read is found out once and remembered.
"""

from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_STRIDES,
    PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from cpython.dict cimport PyDict_GetItem
from cpython.object cimport PyObject, Py_TYPE
from cpython.pycapsule cimport (
    PyCapsule_CheckExact,
    PyCapsule_GetPointer,
    PyCapsule_IsValid,
    PyCapsule_SetName,
)
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cimport baracuda_cy._cuda as _cuda
from baracuda_cy._dlpack cimport (
    DLPACK_FLAG_IS_COPIED,
    DLPACK_FLAG_READ_ONLY,
    LEGACY_NAME,
    LEGACY_USED,
    VERSIONED_NAME,
    VERSIONED_USED,
    DLDataType,
    DLManagedTensor,
    DLManagedTensorVersioned,
    DLPackExchangeAPI,
    DLPackExchangeAPIHeader,
    DLTensor,
    kDLBfloat,
    kDLBool,
    kDLCPU,
    kDLCUDA,
    kDLCUDAHost,
    kDLCUDAManaged,
    kDLFloat,
    kDLInt,
    kDLUInt,
)
from baracuda_cy._overflow cimport product_overflows
from baracuda_cy.elements cimport (
    BF16,
    BOOL,
    F16,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    element_name,
)
from baracuda_cy.pending cimport collect_now_and_then, pending_count
from baracuda_cy.stream cimport order_after, same_stream, stream_of
from baracuda_cy.view cimport (
    KEEP_BUFFER,
    KEEP_LEGACY,
    KEEP_NOTHING,
    KEEP_OBJECT,
    KEEP_VERSIONED,
    MAX_NDIM,
    ArrayView,
    release_view,
)

import sys

from baracuda_cy.errors import BaracudaError, InvalidProblem, NotAnArray, Unsupported
from baracuda_cy.formats import ElementKind

__all__ = ["describe", "inspect"]

cdef tuple MAX_VERSION = (1, 1)

# ---- element types, as the protocols say them ----------------------------------------------------

cdef inline int32_t integer_element(bint signed, int bits) noexcept nogil:
    if bits == 8:
        return I8 if signed else U8
    if bits == 16:
        return I16 if signed else U16
    if bits == 32:
        return I32 if signed else U32
    if bits == 64:
        return I64 if signed else U64
    return 0


cdef inline int32_t float_element(int bits) noexcept nogil:
    return F32 if bits == 32 else F16 if bits == 16 else F64 if bits == 64 else 0


cdef inline int32_t dlpack_element(DLDataType dtype) noexcept nogil:
    if dtype.lanes != 1:
        return 0
    if dtype.code == kDLFloat:
        return float_element(dtype.bits)
    if dtype.code == kDLBfloat:
        return BF16 if dtype.bits == 16 else 0
    if dtype.code == kDLUInt or dtype.code == kDLInt:
        return integer_element(dtype.code == kDLInt, dtype.bits)
    if dtype.code == kDLBool:
        return BOOL if dtype.bits == 8 else 0
    return 0


cdef int32_t struct_element(const char* format, Py_ssize_t itemsize) noexcept:
    """Element of a PEP 3118 format: one code of the struct module, in this machine's byte order."""
    cdef char code
    if format == NULL:
        return U8 if itemsize == 1 else 0
    if format[0] in (b"@", b"=", b"<"):
        format += 1
    elif format[0] in (b">", b"!"):
        if itemsize != 1:
            return 0
        format += 1
    code = format[0]
    if code == 0 or format[1] != 0:
        return 0
    if code in (b"B", b"H", b"I", b"L", b"Q", b"N"):
        return integer_element(False, 8 * itemsize)
    if code in (b"b", b"h", b"i", b"l", b"q", b"n"):
        return integer_element(True, 8 * itemsize)
    if code in (b"e", b"f", b"d"):
        return float_element(8 * itemsize)
    return BOOL if code == b"?" and itemsize == 1 else 0


cdef int32_t typestr_element(str typestr):
    """Element of an array-interface type, such as ``<f4``."""
    if len(typestr) < 3 or not typestr[2:].isdecimal():
        return 0
    cdef int size = int(typestr[2:]) if len(typestr) < 6 else 0
    if typestr[0] not in "<|=" and size != 1:
        return 0
    kind = typestr[1]
    if kind == "f":
        return float_element(8 * size)
    if kind == "b":
        return BOOL if size == 1 else 0
    return integer_element(kind == "i", 8 * size) if kind in "iu" else 0


# ---- what is known about a type ------------------------------------------------------------------

cdef enum:
    KINDS = 512              # a power of two; more types than half of it start the table afresh
    OWN_TYPES = 8

cdef Kind kinds[KINDS]
cdef int kinds_used = 0
cdef Kind own_types[OWN_TYPES]
cdef int own_types_used = 0


cdef inline Kind* slot_of(void* type_) noexcept nogil:
    cdef uintptr_t i = (<uintptr_t>type_ >> 4) ^ (<uintptr_t>type_ >> 13)
    while True:
        i &= KINDS - 1
        if kinds[i].type == <PyObject*>type_ or kinds[i].type == NULL:
            return &kinds[i]
        i += 1


cdef inline Kind* kind_of(object array) except NULL:
    cdef Kind* kind = slot_of(<void*>Py_TYPE(array))
    return kind if kind.type != NULL else learn(array)


cdef int copy_kind(object array, Kind* kind) except -1:
    kind[0] = kind_of(array)[0]
    return 0


cdef Kind* learn(object array) except NULL:
    global kinds_used
    cdef object type_ = type(array)
    cdef Kind found
    cdef Kind* slot
    cdef PyObject* old[KINDS]
    cdef int i, count = 0
    memset(&found, 0, sizeof(found))
    classify(array, &found)
    if 2 * kinds_used >= KINDS:
        for i in range(KINDS):
            if kinds[i].type != NULL:
                old[count] = kinds[i].type
                count += 1
        memset(kinds, 0, sizeof(kinds))
        kinds_used = 0
        # A type that dies here runs code of others, which may come back to the table.
        for i in range(count):
            Py_DECREF(<object>old[i])
    slot = slot_of(<void*>type_)
    if slot.type == NULL:
        Py_INCREF(type_)
        slot[0] = found
        slot.type = <PyObject*>type_
        kinds_used += 1
    return slot


cdef Framework framework_of(object type_):
    for base in type_.__mro__:
        module = getattr(base, "__module__", None)
        package = module.partition(".")[0] if isinstance(module, str) else ""
        # A layer of torch.nn is torch's too, but no tensor.
        if package == "torch" and base.__name__ == "Tensor":
            return TORCH
        if package == "jax" or package == "jaxlib":
            return JAX
        if package == "cupy":
            return CUPY
        if package == "numpy":
            return MASKED if base.__name__ == "MaskedArray" else NUMPY
    return OTHER


cdef int classify(object array, Kind* kind) except -1:
    global forward_variables
    cdef object type_ = type(array)
    cdef int i
    for i in range(own_types_used):
        if own_types[i].type == <PyObject*>type_:
            kind[0] = own_types[i]
            return 0
    kind.framework = framework_of(type_)
    if kind.framework == TORCH and forward_variables is None:
        module = sys.modules.get("torch.autograd.forward_ad")
        forward_variables = {} if module is None else vars(module)
    kind.api = exchange_api(type_)
    if kind.api != NULL:
        kind.route = EXCHANGE
    elif kind.framework in (NUMPY, MASKED) and PyObject_CheckBuffer(array):
        kind.route = BUFFER
    elif hasattr(type_, "__dlpack__") and hasattr(type_, "__dlpack_device__"):
        kind.route = DLPACK
    elif hasattr(type_, "__cuda_array_interface__"):
        kind.route = CUDA_INTERFACE
    elif PyObject_CheckBuffer(array):
        kind.route = BUFFER
    else:
        # A framework has types that are no arrays, such as its dtypes.
        kind.framework = OTHER
    return 0


cdef Route route_of(object array, Kind* kind) except *:
    # What the type does not offer, one object may.
    if kind.route == NOT_AN_ARRAY:
        if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
            return DLPACK
        if hasattr(array, "__cuda_array_interface__"):
            return CUDA_INTERFACE
    return kind.route


cdef DLPackExchangeAPI* exchange_api(object type_) except? NULL:
    """The exchange table of a type in a version we read, or NULL."""
    cdef DLPackExchangeAPIHeader* header = NULL
    table = getattr(type_, "__dlpack_c_exchange_api__", None)
    if table is None:
        table = getattr(type_, "__c_dlpack_exchange_api__", None)
    if PyCapsule_CheckExact(table):
        if PyCapsule_IsValid(table, "dlpack_exchange_api"):
            header = <DLPackExchangeAPIHeader*>PyCapsule_GetPointer(table, "dlpack_exchange_api")
    elif isinstance(table, int):
        header = <DLPackExchangeAPIHeader*><uintptr_t>table
    while header != NULL and header.version.major != 1:
        header = header.prev_api
    return <DLPackExchangeAPI*>header


cdef int register_type(object type_, fill_function fill) except -1:
    global own_types_used
    Py_INCREF(type_)
    own_types[own_types_used].type = <PyObject*>type_
    own_types[own_types_used].fill = fill
    own_types[own_types_used].route = OWN
    own_types_used += 1
    return 0


# ---- errors --------------------------------------------------------------------------------------


cdef str type_name(object array):
    module = type(array).__module__
    name = type(array).__qualname__
    return name if module in ("builtins", "__main__") else f"{module}.{name}"


cdef object cannot_share(object array, str name, object error):
    # Some producers append a native stack trace.
    reason = str(error).partition("\n")[0]
    return InvalidProblem(
        f"{name}: expected an array that can be shared, got {type_name(array)}, which refused: "
        f"{type(error).__name__}: {reason}; pass a dense array in CPU or CUDA memory"
    )


cdef int raised() except -1:
    # The error that a C function of the producer has set.
    return -1


cdef int refused(object array, str name) except -1:
    """Turn a producer's error into ours, keeping it as the cause."""
    try:
        raised()
    except (BaracudaError, MemoryError):
        raise
    except Exception as error:
        raise cannot_share(array, name, error) from error
    return 0


cdef int not_an_array(object array, str name) except -1:
    if framework_of(type(array)) == JAX:
        raise NotAnArray(
            f"{name}: expected an array with memory, got {type_name(array)}, which jax traces; "
            "call this outside of jax.jit and other transformations, or inside "
            "baracuda_cy.jax.linear"
        )
    raise NotAnArray(
        f"{name}: expected an array (__dlpack__, __cuda_array_interface__ or the buffer protocol), "
        f"got {type_name(array)}; convert it with numpy.asarray or a framework's asarray"
    )


cdef int too_many_dimensions(int64_t ndim, str name) except -1:
    raise InvalidProblem(f"{name}: expected 0 to {MAX_NDIM} dimensions, got {ndim}; reshape it")


# ---- DLPack tensors ------------------------------------------------------------------------------


cdef int check_device_type(int device_type, str name) except -1:
    if device_type not in (kDLCPU, kDLCUDA, kDLCUDAHost, kDLCUDAManaged):
        raise InvalidProblem(
            f"{name}: expected an array in CPU or CUDA memory, got one on DLPack device type "
            f"{device_type}; copy it there first"
        )
    return 0


cdef int unreadable(const DLTensor* tensor, str name) except -1:
    """Say what is wrong with a tensor that read_tensor refused."""
    check_device_type(tensor.device.device_type, name)
    if not 0 <= tensor.ndim <= MAX_NDIM:
        too_many_dimensions(tensor.ndim, name)
    if tensor.ndim and tensor.shape == NULL:
        raise InvalidProblem(f"{name}: expected a shape, got none from its library; copy the array")
    shape = tuple([tensor.shape[i] for i in range(tensor.ndim)])
    if min(shape, default=0) < 0:
        raise InvalidProblem(f"{name}: expected sizes of 0 or more, got shape {shape}")
    if tensor.data == NULL:
        raise InvalidProblem(
            f"{name}: expected memory for shape {shape}, got a null pointer; allocate the array"
        )
    raise InvalidProblem(
        f"{name}: expected fewer than 2**63 elements, got shape {shape}; split the array"
    )


cdef void compact_strides(ArrayView* view) noexcept nogil:
    cdef int64_t step = 1
    cdef int i
    for i in range(view.ndim - 1, -1, -1):
        view.strides[i] = step
        # Of an empty array the strides mean nothing, and its sizes may be enormous.
        step = <int64_t>(<uint64_t>step * <uint64_t>view.shape[i])


cdef inline int read_tensor(ArrayView* view, const DLTensor* tensor, str name) except -1:
    cdef int32_t ndim = tensor.ndim
    cdef int64_t count = 1
    cdef int device_type = tensor.device.device_type
    cdef int device = 0
    cdef int status, i
    cdef bint sound = 0 <= ndim <= MAX_NDIM and (ndim == 0 or tensor.shape != NULL)
    if device_type == kDLCUDAManaged:
        view.device_type = kDLCUDA
        # DLPack gives managed memory the id 0, whatever device it was made for.
        with nogil:
            status = _cuda.pointer_device(tensor.data, &device_type, &device)
        _cuda.check(status, name)
        view.device_id = device
    elif device_type == kDLCPU or device_type == kDLCUDAHost:
        view.device_type = kDLCPU
        view.device_id = 0
    else:
        view.device_type = kDLCUDA
        view.device_id = tensor.device.device_id
        sound = sound and device_type == kDLCUDA
    if sound:
        for i in range(ndim):
            view.shape[i] = tensor.shape[i]
            if tensor.shape[i] < 0 or product_overflows(count, tensor.shape[i], &count):
                sound = False
                break
    if not sound or (tensor.data == NULL and count != 0):
        return unreadable(tensor, name)
    view.ndim = ndim
    if tensor.strides != NULL:
        for i in range(ndim):
            view.strides[i] = tensor.strides[i]
    else:
        compact_strides(view)
    view.element = dlpack_element(tensor.dtype)
    view.data = <char*>tensor.data + tensor.byte_offset if tensor.data != NULL else NULL
    return 0


cdef object stream_number(void* stream):
    # 0 is not allowed in the protocol, because it could mean either default stream.
    return <uintptr_t>stream if stream != NULL else 1


cdef object call_dlpack(object array, dict arguments, Kind* kind):
    """Call ``__dlpack__``, leaving max_version out for producers older than it."""
    if kind.unversioned:
        return array.__dlpack__(**arguments)
    try:
        return array.__dlpack__(max_version=MAX_VERSION, **arguments)
    except TypeError as error:
        if "max_version" not in str(error):
            raise
    capsule = array.__dlpack__(**arguments)
    kind_of(array).unversioned = True
    return capsule


cdef object request_capsule(
    object array, int device_type, int device_id, object stream, Kind* kind
):
    cdef int previous = -1
    if device_type != kDLCUDA and device_type != kDLCUDAManaged:
        return call_dlpack(array, {}, kind)
    if stream is None:
        # JAX knows no -1; with None it hands out the array as it is.
        return call_dlpack(array, {"stream": None if kind.framework == JAX else -1}, kind)
    # Producers record events on their current stream of the current device.
    if device_type == kDLCUDA:
        with nogil:
            _cuda.get_device(&previous)
        if previous != device_id:
            with nogil:
                _cuda.set_device(device_id)
    try:
        return call_dlpack(array, {"stream": stream}, kind)
    finally:
        if previous >= 0 and previous != device_id:
            with nogil:
                _cuda.set_device(previous)


cdef int take_versioned(DLManagedTensorVersioned* tensor, ArrayView* view, str name) except -1:
    view.keep = tensor
    view.keep_kind = KEEP_VERSIONED
    if tensor.version.major != 1:
        # Of another major version only what comes before `flags` may be touched.
        raise Unsupported(
            f"{name}: expected a tensor of DLPack 1.x, got one of {tensor.version.major}."
            f"{tensor.version.minor}; its library must honour max_version"
        )
    # What is written to a copy does not reach the array.
    view.readonly = (tensor.flags & (DLPACK_FLAG_READ_ONLY | DLPACK_FLAG_IS_COPIED)) != 0
    return read_tensor(view, &tensor.dl_tensor, name)


cdef int take_capsule(object capsule, ArrayView* view, str name) except -1:
    """Own what a capsule holds, and read it."""
    cdef DLManagedTensorVersioned* versioned
    cdef DLManagedTensor* legacy
    if PyCapsule_IsValid(capsule, VERSIONED_NAME):
        versioned = <DLManagedTensorVersioned*>PyCapsule_GetPointer(capsule, VERSIONED_NAME)
        PyCapsule_SetName(capsule, VERSIONED_USED)
        return take_versioned(versioned, view, name)
    if PyCapsule_IsValid(capsule, LEGACY_NAME):
        legacy = <DLManagedTensor*>PyCapsule_GetPointer(capsule, LEGACY_NAME)
        PyCapsule_SetName(capsule, LEGACY_USED)
        view.keep = legacy
        view.keep_kind = KEEP_LEGACY
        return read_tensor(view, &legacy.dl_tensor, name)
    raise InvalidProblem(
        f"{name}: expected __dlpack__ to give an unused DLPack capsule, got {capsule!r}"
    )


# ---- one function per protocol -------------------------------------------------------------------


cdef int acquire_own(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name, Kind* kind
) except -1:
    cdef void* theirs = NULL
    try:
        kind.fill(array, view, &theirs)
    except InvalidProblem as error:
        # What is closed says so of itself; the caller knows it as an argument.
        raise type(error)(f"{name}: {str(error).partition(': ')[2]}") from None
    if on_cuda_stream and view.device_type == kDLCUDA and not same_stream(theirs, stream):
        order_after(stream, theirs, view.device_id)
        view.foreign_order = True
    return 0


cdef inline int acquire_borrowed(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name,
    const DLPackExchangeAPI* api,
) except -1:
    cdef DLTensor tensor
    if api.dltensor_from_py_object_no_sync(<void*>array, &tensor) != 0:
        return refused(array, name)
    read_tensor(view, &tensor, name)
    return follow_exchange(array, view, stream, on_cuda_stream, name, api)


cdef int acquire_managed(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name,
    const DLPackExchangeAPI* api,
) except -1:
    cdef DLManagedTensorVersioned* managed = NULL
    if api.managed_tensor_from_py_object_no_sync(<void*>array, &managed) != 0:
        return refused(array, name)
    take_versioned(managed, view, name)
    return follow_exchange(array, view, stream, on_cuda_stream, name, api)


cdef inline int follow_exchange(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name,
    const DLPackExchangeAPI* api,
) except -1:
    cdef void* theirs = NULL
    if on_cuda_stream and view.device_type == kDLCUDA:
        if api.current_work_stream(kDLCUDA, view.device_id, &theirs) != 0:
            return refused(array, name)
        if not same_stream(theirs, stream):
            order_after(stream, theirs, view.device_id)
            view.foreign_order = True
    return 0


cdef int acquire_dlpack(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name, Kind* kind
) except -1:
    cdef void* theirs = NULL
    cdef Framework framework = kind.framework
    try:
        device_type, device_id = array.__dlpack_device__()
        capsule = request_capsule(
            array, int(device_type), int(device_id),
            stream_number(stream) if on_cuda_stream else None, kind,
        )
    except (BaracudaError, MemoryError):
        raise
    except Exception as error:
        raise cannot_share(array, name, error) from error
    take_capsule(capsule, view, name)
    if framework == JAX:
        view.readonly = True
    if on_cuda_stream and view.device_type == kDLCUDA:
        view.foreign_order = not (
            framework_stream(framework, view.device_id, &theirs) and same_stream(theirs, stream)
        )
    return 0


cdef int acquire_cuda_interface(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name
) except -1:
    cdef int device_type = kDLCUDA
    cdef int device = 0
    cdef int status, i
    cdef int64_t count = 1
    cdef void* pointer
    cdef str given = type_name(array)
    cdef str typestr
    try:
        interface = array.__cuda_array_interface__
        version = interface.get("version", 0)
        shape = tuple([int(size) for size in interface["shape"]])
        typestr = interface["typestr"]
        address, readonly = interface["data"]
        strides = interface.get("strides")
        if strides is not None:
            strides = tuple([int(stride) for stride in strides])
        mask = interface.get("mask")
        # Before version 3 the interface had no stream, and work was on the legacy default stream.
        theirs = interface.get("stream") if version >= 3 else 1
        address = int(address or 0)
        itemsize = int(typestr[2:])
        numbers = (address >> 1,) + shape + (strides or ())
        if address < 0 or any([abs(number) >= 1 << 63 for number in numbers]):
            raise OverflowError("a number in it is beyond 64 bits")
    except (BaracudaError, MemoryError):
        raise
    except Exception as error:
        raise InvalidProblem(
            f"{name}: expected a __cuda_array_interface__ of version 2 or 3, got one of {given} "
            f"that cannot be read: {type(error).__name__}: {error}"
        ) from error
    if version > 3:
        raise Unsupported(
            f"{name}: expected a __cuda_array_interface__ of version 3 or less, got {version}"
        )
    if mask is not None:
        raise InvalidProblem(
            f"{name}: expected an array without a mask, got {given} with one; fill it"
        )
    if theirs is not None and (not isinstance(theirs, int) or not 0 < theirs < 1 << 64):
        raise InvalidProblem(
            f"{name}: expected the stream of __cuda_array_interface__ to be None, 1, 2 or a "
            f"handle, got {theirs!r}"
        )
    if len(shape) > MAX_NDIM:
        too_many_dimensions(len(shape), name)
    view.ndim = len(shape)
    for i in range(view.ndim):
        view.shape[i] = shape[i]
        if view.shape[i] < 0 or product_overflows(count, view.shape[i], &count):
            raise InvalidProblem(
                f"{name}: expected sizes of 0 or more, fewer than 2**63 elements, got shape {shape}"
            )
    if strides is None:
        compact_strides(view)
    else:
        element_strides(view, strides, itemsize, name)
    view.element = typestr_element(typestr)
    view.readonly = bool(readonly)
    pointer = <void*><uintptr_t>address
    if pointer == NULL and count != 0:
        raise InvalidProblem(
            f"{name}: expected memory for shape {shape}, got a null pointer; allocate the array"
        )
    with nogil:
        if pointer == NULL:
            status = _cuda.get_device_quietly(&device)
        else:
            status = _cuda.pointer_device(pointer, &device_type, &device)
    _cuda.check(status, name)
    if device_type == kDLCPU:
        raise InvalidProblem(
            f"{name}: expected __cuda_array_interface__ to point to CUDA memory, got {address:#x}, "
            "which CUDA does not know"
        )
    view.data = <char*>pointer
    view.device_type = kDLCUDA
    view.device_id = device
    if on_cuda_stream:
        # A producer that names no stream has nothing to wait for, but does not wait for us either.
        view.foreign_order = True
        if theirs is not None:
            pointer = <void*><uintptr_t>theirs
            order_after(stream, pointer, device)
            view.foreign_order = not same_stream(stream, pointer)
    Py_INCREF(array)
    view.keep = <void*>array
    view.keep_kind = KEEP_OBJECT
    return 0


cdef int element_strides(ArrayView* view, object strides, int64_t itemsize, str name) except -1:
    """Strides in elements from strides in bytes."""
    cdef int i
    if len(strides) != view.ndim:
        raise InvalidProblem(
            f"{name}: expected one stride per dimension, got {len(strides)} for {view.ndim}"
        )
    for i in range(view.ndim):
        view.strides[i] = strides[i] // itemsize if itemsize else 0
        if itemsize and strides[i] % itemsize:
            if view.shape[i] > 1:
                raise InvalidProblem(
                    f"{name}: expected strides that are multiples of the element's {itemsize} "
                    f"bytes, got {strides}; copy the array, as in .copy()"
                )
    return 0


cdef int acquire_buffer(object array, ArrayView* view, str name, Kind* kind) except -1:
    cdef Py_buffer* buffer
    cdef Framework framework = kind.framework
    cdef int i
    if framework == MASKED:
        raise InvalidProblem(
            f"{name}: expected an array without a mask, got {type_name(array)}; "
            "fill it, as in .filled(0)"
        )
    buffer = <Py_buffer*>calloc(1, sizeof(Py_buffer))
    if buffer == NULL:
        raise MemoryError()
    try:
        PyObject_GetBuffer(array, buffer, PyBUF_STRIDES | PyBUF_FORMAT)
    except (BufferError, TypeError, ValueError) as error:
        free(buffer)
        if framework == NUMPY:
            return acquire_numpy(array, view, name)
        raise cannot_share(array, name, error) from error
    except BaseException:
        free(buffer)
        raise
    view.keep = buffer
    view.keep_kind = KEEP_BUFFER
    if buffer.ndim > MAX_NDIM:
        too_many_dimensions(buffer.ndim, name)
    view.ndim = buffer.ndim
    for i in range(view.ndim):
        view.shape[i] = buffer.shape[i]
    if buffer.strides == NULL:
        # Asked for or not, ctypes gives none.
        compact_strides(view)
    elif buffer.itemsize:
        for i in range(view.ndim):
            view.strides[i] = buffer.strides[i] // buffer.itemsize
            if buffer.strides[i] % buffer.itemsize and buffer.shape[i] > 1:
                element_strides(
                    view, [buffer.strides[j] for j in range(buffer.ndim)], buffer.itemsize, name
                )
    view.element = struct_element(buffer.format, buffer.itemsize)
    view.data = <char*>buffer.buf
    view.device_type = kDLCPU
    view.readonly = buffer.readonly
    return 0


cdef int acquire_numpy(object array, ArrayView* view, str name) except -1:
    """NumPy arrays of types that the buffer protocol has no letter for, such as bfloat16."""
    cdef object dtype = array.dtype
    cdef int i
    if not hasattr(array, "ctypes"):
        # A scalar does not say where it is.
        return not_an_array(array, name)
    if dtype.name == "bfloat16" and dtype.type.__module__ == "ml_dtypes":
        return acquire_bfloat16(array, view, name)
    if array.ndim > MAX_NDIM:
        too_many_dimensions(array.ndim, name)
    view.ndim = array.ndim
    for i in range(view.ndim):
        view.shape[i] = array.shape[i]
    element_strides(view, array.strides, dtype.itemsize, name)
    view.data = <char*><uintptr_t>array.ctypes.data
    view.device_type = kDLCPU
    view.readonly = not array.flags.writeable
    Py_INCREF(array)
    view.keep = <void*>array
    view.keep_kind = KEEP_OBJECT
    return 0


cdef int acquire_bfloat16(object array, ArrayView* view, str name) except -1:
    cdef Kind plain
    memset(&plain, 0, sizeof(plain))
    acquire_buffer(array.view("uint16"), view, name, &plain)
    view.element = BF16 if array.dtype.isnative else 0
    return 0


# ---- what plans call -----------------------------------------------------------------------------


cdef int acquire_view(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name
) except -1:
    if not acquire_unless_borrowed(array, view, stream, on_cuda_stream, name, False):
        borrow_view(array, view, stream, on_cuda_stream, name)
    return 0


cdef int hold_view(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name
) except -1:
    empty_view(view)
    if pending_count:
        collect_now_and_then(stream, on_cuda_stream)
    # By value: what was released, and what the producers run, may move the table.
    return acquire_kept(array, view, stream, on_cuda_stream, name, kind_of(array)[0])


cdef bint acquire_unless_borrowed(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name, bint no_grad
) except -1:
    cdef Kind* kind
    empty_view(view)
    if pending_count:
        collect_now_and_then(stream, on_cuda_stream)
    # Only now: what was released may have run code that moves the table.
    kind = kind_of(array)
    if no_grad and kind.framework == TORCH:
        refuse_grad(array, name)
        kind = kind_of(array)
    if lends(kind):
        return False
    acquire_kept(array, view, stream, on_cuda_stream, name, kind[0])
    return True


cdef int borrow_view(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name
) except -1:
    cdef Kind* kind = kind_of(array)
    empty_view(view)
    if not lends(kind):
        # Code of others gave it another class meanwhile.
        return acquire_kept(array, view, stream, on_cuda_stream, name, kind[0])
    return acquire_borrowed(array, view, stream, on_cuda_stream, name, kind.api)


cdef bint is_borrowed(object array) except -1:
    return lends(kind_of(array))


cdef inline bint lends(const Kind* kind) noexcept nogil:
    return kind.route == EXCHANGE and kind.api.dltensor_from_py_object_no_sync != NULL


cdef inline void empty_view(ArrayView* view) noexcept nogil:
    view.readonly = False
    view.foreign_order = False
    view.keep_kind = KEEP_NOTHING
    view.keep = NULL


cdef int acquire_kept(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name, Kind kind
) except -1:
    try:
        return acquire_by_route(array, view, stream, on_cuda_stream, name, kind)
    except BaseException:
        release_view(view)
        raise


cdef int acquire_by_route(
    object array, ArrayView* view, void* stream, bint on_cuda_stream, str name, Kind kind
) except -1:
    cdef Route route = route_of(array, &kind)
    if route == OWN:
        return acquire_own(array, view, stream, on_cuda_stream, name, &kind)
    if route == EXCHANGE:
        return acquire_managed(array, view, stream, on_cuda_stream, name, kind.api)
    if route == DLPACK:
        return acquire_dlpack(array, view, stream, on_cuda_stream, name, &kind)
    if route == CUDA_INTERFACE:
        return acquire_cuda_interface(array, view, stream, on_cuda_stream, name)
    if route == BUFFER:
        return acquire_buffer(array, view, name, &kind)
    return not_an_array(array, name)


cdef int check_no_grad(object array, str name) except -1:
    return refuse_grad(array, name) if kind_of(array).framework == TORCH else 0


cdef int refuse_grad(object array, str name) except -1:
    if array.requires_grad:
        raise InvalidProblem(
            f"{name}: expected a tensor that needs no gradient, got requires_grad=True; "
            "pass it as .detach(), or multiply by a baracuda_cy.torch.Linear"
        )
    return 0


# The variables of torch.autograd.forward_ad, once an array of torch was seen. One of them tells
# whether forward-mode differentiation goes on: a look at it is all that it costs where none does.
cdef dict forward_variables = None
cdef object OUTSIDE = -1


cdef bint in_forward_mode() except -1:
    cdef PyObject* level
    if forward_variables is None:
        return False
    level = PyDict_GetItem(forward_variables, "_current_level")
    # The identity first: a comparison of integers takes longer.
    return level != NULL and <object>level is not OUTSIDE and <object>level >= 0


cdef int check_no_tangent(object array, str name) except -1:
    if kind_of(array).framework != TORCH:
        return 0
    if sys.modules["torch.autograd.forward_ad"].unpack_dual(array).tangent is not None:
        raise InvalidProblem(
            f"{name}: expected a tensor without a tangent, got a dual one of forward-mode "
            "differentiation; pass its primal, torch.autograd.forward_ad.unpack_dual(x).primal"
        )
    return 0


cdef int check_sign(object array, str name) except -1:
    if kind_of(array).framework == TORCH and array.is_neg():
        raise InvalidProblem(
            f"{name}: expected a tensor whose memory holds its values, got one with torch's "
            "negative bit; pass it as .resolve_neg()"
        )
    return 0


cdef int check_plain(object array, str name) except -1:
    """Refuse a torch tensor with a gradient or tangent, or whose memory is not its values."""
    check_no_grad(array, name)
    if in_forward_mode():
        check_no_tangent(array, name)
    return check_sign(array, name)


cdef int framework_stream(Framework framework, int device, void** stream) except -1:
    """1 and the stream on which a framework without exchange table works now, else 0."""
    if framework == CUPY:
        module = sys.modules["cupy"]
        stream[0] = <void*><uintptr_t>module.cuda.get_current_stream(device).ptr
        return 1
    if framework == TORCH:
        module = sys.modules["torch"]
        stream[0] = <void*><uintptr_t>module.cuda.current_stream(device).cuda_stream
        return 1
    return 0


cdef int current_stream_on(object array, int32_t device_id, void** stream) except -1:
    cdef Kind* kind = kind_of(array)
    if kind.route == EXCHANGE:
        if kind.api.current_work_stream(kDLCUDA, device_id, stream) != 0:
            return refused(array, "stream")
        return 1
    return current_stream(array, stream)


cdef int current_stream(object array, void** stream) except -1:
    cdef Kind kind = kind_of(array)[0]
    cdef ArrayView view
    cdef void* theirs = NULL
    cdef int32_t device_type = 0
    cdef int32_t device_id = 0
    if kind.route == OWN:
        memset(&view, 0, sizeof(view))
        kind.fill(array, &view, &theirs)
        release_view(&view)
        if view.device_type != kDLCUDA:
            return 0
        stream[0] = theirs
        return 1
    if kind.route != EXCHANGE and kind.framework != CUPY and kind.framework != TORCH:
        return 0
    if not device_of(array, &device_type, &device_id, "array") or device_type != kDLCUDA:
        return 0
    if kind.route != EXCHANGE:
        return framework_stream(kind.framework, device_id, stream)
    if kind.api.current_work_stream(kDLCUDA, device_id, stream) != 0:
        return refused(array, "stream")
    return 1


cdef int device_of(
    object array, int32_t* device_type, int32_t* device_id, str name
) except -1:
    cdef Kind kind = kind_of(array)[0]
    cdef Route route = route_of(array, &kind)
    cdef ArrayView view
    if route == NOT_AN_ARRAY:
        return 0
    if route == BUFFER:
        device_type[0] = kDLCPU
        device_id[0] = 0
        return 1
    if route == DLPACK:
        try:
            theirs, index = array.__dlpack_device__()
            check_device_type(theirs, name)
            # Managed memory does not say where it is.
            if int(theirs) != kDLCUDAManaged:
                device_type[0] = kDLCPU if int(theirs) == kDLCUDAHost else int(theirs)
                device_id[0] = index if device_type[0] != kDLCPU else 0
                return 1
        except (BaracudaError, MemoryError):
            raise
        except Exception as error:
            raise cannot_share(array, name, error) from error
    memset(&view, 0, sizeof(view))
    acquire_view(array, &view, NULL, False, name)
    device_type[0] = view.device_type
    device_id[0] = view.device_id
    release_view(&view)
    return 1


# ---- what Python sees ----------------------------------------------------------------------------


cdef str text_of(ArrayView* view, object array):
    name = element_name(view.element)
    if view.element == 0:
        # Types that are none of ours still have a name in their own library.
        dtype = getattr(array, "dtype", None)
        name = str(dtype).rpartition(".")[2] if dtype is not None else name
    shape = ", ".join([str(view.shape[i]) for i in range(view.ndim)])
    where = "cpu" if view.device_type == kDLCPU else f"cuda:{view.device_id}"
    return f"{name}[{shape}] on {where}"


cpdef object describe(object array):
    """Short text for messages, such as ``"float16[8, 4096] on cuda:0"``.

    Parameters
    ----------
    array : object
        Any array; what is none gets the name of its type.

    Returns
    -------
    str

    Examples
    --------
    >>> from baracuda_cy.dlpack import describe
    >>> describe(bytearray(16)), describe(None)
    ('uint8[16] on cpu', 'NoneType')
    """
    cdef ArrayView view
    memset(&view, 0, sizeof(view))
    try:
        acquire_view(array, &view, NULL, False, "array")
        return text_of(&view, array)
    except Exception:
        return type(array).__name__
    finally:
        release_view(&view)


cdef str route_name(object array, ArrayView* view):
    cdef Kind kind = kind_of(array)[0]
    cdef Route route = route_of(array, &kind)
    if route == OWN:
        return "baracuda_cy"
    if route == EXCHANGE:
        return "__dlpack_c_exchange_api__"
    if route == CUDA_INTERFACE:
        return "__cuda_array_interface__"
    if route == DLPACK:
        return "__dlpack__" if view.keep_kind == KEEP_VERSIONED else "__dlpack__ (unversioned)"
    return "buffer protocol"


def inspect(array, stream=None):
    """Show what the library sees of an array.

    Parameters
    ----------
    array : object
        Any array.
    stream : Stream or object with ``__cuda_stream__``, optional
        Show it as to work on this stream: the array's own stream is ordered before it. By default
        nothing is ordered.

    Returns
    -------
    dict
        ``pointer`` (int, of the first element), ``shape``, ``strides`` (elements), ``element``
        (`ElementKind`, or None when the dtype is none of ours), ``device``, ``readonly``,
        ``foreign_order`` (whether it is held until a kernel on `stream` is done) and ``protocol``
        (how it was read).

    Raises
    ------
    NotAnArray
        `array` offers no protocol.
    InvalidProblem
        Its library refuses to share it, or it is none that can be described.

    Examples
    --------
    >>> import numpy as np
    >>> from baracuda_cy.dlpack import inspect
    >>> seen = inspect(np.zeros((2, 6), "float16")[:, ::2])
    >>> seen["shape"], seen["strides"], seen["element"], seen["protocol"]
    ((2, 3), (6, 2), ElementKind.F16, 'buffer protocol')
    """
    cdef ArrayView view
    cdef void* handle = NULL
    cdef int device = -1
    memset(&view, 0, sizeof(view))
    if stream is not None:
        stream_of(stream, &handle, &device)
    acquire_view(array, &view, handle, stream is not None, "array")
    try:
        return {
            "pointer": <uintptr_t>view.data,
            "shape": tuple([view.shape[i] for i in range(view.ndim)]),
            "strides": tuple([view.strides[i] for i in range(view.ndim)]),
            "element": ElementKind(view.element) if view.element else None,
            "device": "cpu" if view.device_type == kDLCPU else f"cuda:{view.device_id}",
            "readonly": bool(view.readonly),
            "foreign_order": bool(view.foreign_order),
            "protocol": route_name(array, &view),
        }
    finally:
        release_view(&view)
