# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False
"""Results, allocated by the library that made the array they belong to."""

cimport cython
from cpython.ref cimport Py_DECREF
from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memset

cimport baracuda_cy._cuda as _cuda
from baracuda_cy._dlpack cimport (
    DLManagedTensorVersioned,
    DLPackExchangeAPI,
    DLTensor,
    kDLCPU,
    kDLCUDA,
)
from baracuda_cy._native cimport BCY_ERROR_OUT_OF_MEMORY
from baracuda_cy.dlpack cimport (
    CUPY,
    EXCHANGE,
    JAX,
    TORCH,
    Kind,
    acquire_view,
    copy_kind,
    current_stream,
    describe,
    raised,
    too_many_dimensions,
)
from baracuda_cy.elements cimport (
    dlpack_dtype,
    element_bytes,
    element_name,
    element_of,
    numpy_dtype,
)
from baracuda_cy.stream cimport same_stream, stream_of
from baracuda_cy.view cimport MAX_NDIM, ArrayView, release_view

import sys

from baracuda_cy.arguments import as_shape
from baracuda_cy.errors import InvalidProblem, OutOfMemory

__all__ = ["empty_like"]


cdef enum Making:
    MADE               # target is the result
    HAND_TO_JAX        # a DeviceArray on the way to JAX, settled first
    PUT_ON_JAX_CPU
    SETTLE             # a DeviceArray that outlives the stream it was made on


cdef int handing_over = 0


cdef bint exporting_to_jax() noexcept:
    return handing_over != 0


@cython.final
cdef class Allocation:
    cdef object finish(self):
        global handing_over
        if self.kind == HAND_TO_JAX or self.kind == SETTLE:
            self.target._settle()
        if self.kind == HAND_TO_JAX:
            from jax import dlpack

            handing_over += 1
            try:
                return dlpack.from_dlpack(self.target)
            finally:
                handing_over -= 1
        if self.kind == PUT_ON_JAX_CPU:
            devices = getattr(self.prototype, "devices", None)
            device = next(iter(devices())) if devices is not None else None
            return sys.modules["jax"].device_put(self.target, device)
        return self.target

    cdef int settle(self) except -1:
        # What a launch holds may outlive the stream that was lent for it.
        if self.kind == HAND_TO_JAX or self.kind == SETTLE:
            self.target._settle(scratch=True)
        return 0


cdef Allocation allocated(object target, int kind=MADE, object prototype=None):
    cdef Allocation result = Allocation.__new__(Allocation)
    result.target = target
    result.kind = kind
    result.prototype = prototype
    return result


cdef void set_error(void* context, const char* kind, const char* message) noexcept with gil:
    (<list>context).append(
        f"{(<bytes>kind).decode(errors='replace')}: {(<bytes>message).decode(errors='replace')}"
    )


cdef object allocate_by_exchange(
    const DLPackExchangeAPI* api, tuple shape, int element, int device_type, int device_id
):
    cdef DLTensor prototype
    cdef DLManagedTensorVersioned* managed = NULL
    cdef void* array = NULL
    cdef int64_t sizes[MAX_NDIM]
    cdef list errors = []
    cdef object result
    cdef int i
    memset(&prototype, 0, sizeof(prototype))
    for i in range(len(shape)):
        sizes[i] = shape[i]
    prototype.device.device_type = device_type
    prototype.device.device_id = device_id
    prototype.ndim = len(shape)
    prototype.dtype = dlpack_dtype(element)
    prototype.shape = sizes
    if api.managed_tensor_allocator(&prototype, &managed, <void*>errors, set_error) != 0:
        if not errors:
            raised()
        # Some libraries append a native stack trace.
        what = f"output: {errors[0].partition(chr(10))[0]}"
        if "storage" in what:
            # So torch says that it traces what is called, and gives tensors without memory.
            raise InvalidProblem(
                f"output: expected memory of torch, got a tensor that it traces ({what}); call "
                "this outside of torch.func's transformations"
            )
        if device_type == kDLCUDA:
            raise OutOfMemory(2, "cudaErrorMemoryAllocation", what)
        _cuda.check(BCY_ERROR_OUT_OF_MEMORY, what)
    if api.managed_tensor_to_py_object_no_sync(managed, &array) != 0:
        raised()
    result = <object>array
    Py_DECREF(result)
    return result


cdef object device_array(tuple shape, int element, int device_id, void* stream):
    from baracuda_cy.memory import DeviceArray
    from baracuda_cy.stream import Stream

    return DeviceArray.empty(
        shape, element, stream=Stream.from_handle(<uintptr_t>stream, device=device_id),
    )


cdef object cupy_stream(object cupy, void* stream, int device_id):
    from baracuda_cy.stream import Stream

    # CuPy 14 takes streams by their protocol and deprecates the class for handles.
    if hasattr(cupy.cuda.Stream, "from_external"):
        ours = Stream.from_handle(<uintptr_t>stream, device=device_id)
        return cupy.cuda.Stream.from_external(ours)
    return cupy.cuda.ExternalStream(<uintptr_t>stream, device_id)


cdef Allocation allocate_like(
    object prototype, tuple shape, int element, int device_type, int device_id, void* stream
):
    cdef Kind kind
    copy_kind(prototype, &kind)
    if len(shape) > MAX_NDIM:
        too_many_dimensions(len(shape), "output")
    if kind.route == EXCHANGE:
        return allocated(allocate_by_exchange(kind.api, shape, element, device_type, device_id))
    if kind.framework == TORCH:
        torch = sys.modules["torch"]
        where = "cpu" if device_type == kDLCPU else f"cuda:{device_id}"
        return allocated(
            torch.empty(shape, dtype=getattr(torch, element_name(element)), device=where)
        )
    if device_type == kDLCPU:
        import numpy as np

        try:
            target = np.empty(shape, numpy_dtype(element, "output"))
        except MemoryError as error:
            _cuda.check(BCY_ERROR_OUT_OF_MEMORY, f"output: {error}")
        return allocated(target, PUT_ON_JAX_CPU if kind.framework == JAX else MADE, prototype)
    if kind.framework == CUPY:
        cupy = sys.modules["cupy"]
        dtype = numpy_dtype(element, "output")
        # CuPy's pool reuses memory in the order of the stream that is current when it lends it.
        with cupy.cuda.Device(device_id):
            if same_stream(
                <void*><uintptr_t>cupy.cuda.get_current_stream(device_id).ptr, stream
            ):
                return allocated(cupy.empty(shape, dtype))
            with cupy_stream(cupy, stream, device_id):
                return allocated(cupy.empty(shape, dtype))
    target = device_array(shape, element, device_id, stream)
    return allocated(target, HAND_TO_JAX if kind.framework == JAX else SETTLE, prototype)


def empty_like(prototype, shape, dtype=None, *, stream=None):
    """Allocate an array with the library, and on the device, of another.

    Parameters
    ----------
    prototype : array
        Says which library and device.
    shape : tuple of int
        Shape of the result, C-contiguous.
    dtype : ElementKind, str or a framework's dtype, optional
        Type of the result; the prototype's by default.
    stream : Stream or object with ``__cuda_stream__``, optional
        Where the result will be used; by default the stream the prototype's library works on.

    Returns
    -------
    array
        Its contents are undefined. NumPy for host buffers, `DeviceArray` for a CUDA array whose
        library is not known to allocate.

    Raises
    ------
    NotAnArray
        `prototype` is none.
    InvalidProblem
        Its dtype is none of ours, and none was given; a shape that cannot be; or a stream on the
        CPU.
    Unsupported
        NumPy bfloat16 without ml_dtypes.

    Examples
    --------
    >>> import numpy as np
    >>> from baracuda_cy.allocation import empty_like
    >>> empty_like(np.zeros(3, "float16"), (2, 4)).dtype
    dtype('float16')
    """
    cdef ArrayView view
    cdef void* handle = NULL
    cdef int device = -1
    memset(&view, 0, sizeof(view))
    acquire_view(prototype, &view, NULL, False, "prototype")
    release_view(&view)
    cdef int element = view.element if dtype is None else element_of(dtype, "dtype")
    if element == 0:
        raise InvalidProblem(
            f"dtype: expected one to be named, as the prototype is {describe(prototype)}; "
            'name it, as in "float32"'
        )
    sizes = as_shape(shape, element_bytes(element))
    if stream is None:
        current_stream(prototype, &handle)
    elif view.device_type == kDLCPU:
        raise InvalidProblem(
            f"stream: expected None on the CPU, got {type(stream).__name__}; leave it out"
        )
    else:
        stream_of(stream, &handle, &device)
    return allocate_like(
        prototype, sizes, element, view.device_type, view.device_id, handle
    ).finish()
