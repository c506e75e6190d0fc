# SPDX-License-Identifier: Apache-2.0
"""The CUDA half of the native code, and what this build and this machine can run.

Importing this module touches no driver. In a build without CUDA it imports all the same: `built`
gives False and everything else says why.
"""

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int32_t, int64_t
from posix.unistd cimport getpid

from baracuda_cy._native cimport (
    BCY_ERROR_INVALID_ARGUMENT,
    BCY_ERROR_NO_CUDA,
    BCY_ERROR_OUT_OF_MEMORY,
    BCY_ERROR_TOO_LARGE,
    BCY_ERROR_UNKNOWN_FORMAT,
    BCY_ERROR_UNSUPPORTED_TYPE,
    bcy_cuda_architectures,
    bcy_cuda_built,
    bcy_cuda_device_count,
    bcy_cuda_device_info,
    bcy_cuda_driver_version,
    bcy_cuda_error_name,
    bcy_cuda_error_text,
    bcy_cuda_event_create,
    bcy_cuda_event_destroy,
    bcy_cuda_event_elapsed_ms,
    bcy_cuda_event_query,
    bcy_cuda_event_record,
    bcy_cuda_event_synchronize,
    bcy_cuda_free,
    bcy_cuda_free_host,
    bcy_cuda_get_device,
    bcy_cuda_gguf_dequantize,
    bcy_cuda_gguf_matmul,
    bcy_cuda_gguf_matvec,
    bcy_cuda_gguf_needs_no_workspace,
    bcy_cuda_gguf_stage,
    bcy_cuda_gguf_workspace_size,
    bcy_cuda_has_kernels,
    bcy_cuda_malloc,
    bcy_cuda_malloc_host,
    bcy_cuda_memcpy,
    bcy_cuda_memory_info,
    bcy_cuda_memset,
    bcy_cuda_nf4_dequantize,
    bcy_cuda_nf4_matmul,
    bcy_cuda_nf4_nest,
    bcy_cuda_nf4_quantize,
    bcy_cuda_nf4_uses_tensor_cores,
    bcy_cuda_nf4_workspace_size,
    bcy_cuda_pointer_device,
    bcy_cuda_set_device,
    bcy_cuda_stream_create,
    bcy_cuda_stream_destroy,
    bcy_cuda_stream_device,
    bcy_cuda_stream_is_capturing,
    bcy_cuda_stream_priority,
    bcy_cuda_stream_priority_range,
    bcy_cuda_stream_query,
    bcy_cuda_stream_synchronize,
    bcy_cuda_stream_wait,
    bcy_cuda_toolkit_version,
    bcy_cuda_xla_handler,
    bcy_device_info,
)

from baracuda_cy.errors import CudaError, InvalidProblem, OutOfMemory, Unsupported

# The cudaError_t values that deserve words of their own.
cdef enum:
    cudaErrorMemoryAllocation = 2
    cudaErrorInitializationError = 3
    cudaErrorStubLibrary = 34
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorNoKernelImageForDevice = 209

cdef int imported_by = getpid()


cdef str dotted(int version):
    return f"{version // 1000}.{version % 1000 // 10}"


cdef int read_driver_version() noexcept nogil:
    cdef int version = 0
    bcy_cuda_driver_version(&version)
    return version


cdef str name_of(int status):
    if status == BCY_ERROR_NO_CUDA:
        return "BCY_ERROR_NO_CUDA"
    if status == BCY_ERROR_UNKNOWN_FORMAT:
        return "BCY_ERROR_UNKNOWN_FORMAT"
    if status == BCY_ERROR_UNSUPPORTED_TYPE:
        return "BCY_ERROR_UNSUPPORTED_TYPE"
    if status == BCY_ERROR_TOO_LARGE:
        return "BCY_ERROR_TOO_LARGE"
    if status == BCY_ERROR_OUT_OF_MEMORY:
        return "BCY_ERROR_OUT_OF_MEMORY"
    if status == BCY_ERROR_INVALID_ARGUMENT:
        return "BCY_ERROR_INVALID_ARGUMENT"
    if status < 0:
        return "unknown status"
    return (<bytes>bcy_cuda_error_name(status)).decode()


cdef str text_of(int status):
    return (<bytes>bcy_cuda_error_text(status)).decode(errors="replace")


cdef str reason_of(int status):
    """Why the machine cannot run CUDA work, or None when `status` is about something else."""
    cdef int version
    if status == BCY_ERROR_NO_CUDA:
        return (
            "this build has no CUDA kernels; install a wheel with CUDA or rebuild without "
            'BARACUDA_CUDA=0, or use device "cpu"'
        )
    if status == cudaErrorInsufficientDriver:
        with nogil:
            version = read_driver_version()
        if version == 0:
            return 'no NVIDIA driver was found on this machine; install one, or use device "cpu"'
        return (
            f"the NVIDIA driver supports CUDA {dotted(version)}, this build needs "
            f"{dotted(bcy_cuda_toolkit_version())}; update the driver, or use device \"cpu\""
        )
    if status == cudaErrorStubLibrary:
        return (
            "libcuda is the toolkit's stub, not a driver; take the stubs folder out of "
            'LD_LIBRARY_PATH, or use device "cpu"'
        )
    if status == cudaErrorNoDevice:
        return (
            "the driver sees no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES, "
            'or use device "cpu"'
        )
    if status == cudaErrorInitializationError and getpid() != imported_by:
        return (
            "CUDA does not survive fork(); start the process with multiprocessing's "
            '"spawn" method, or use device "cpu"'
        )
    return None


cdef str no_kernels(int device):
    cdef bcy_device_info info
    cdef int status
    with nogil:
        status = bcy_cuda_device_info(device, &info)
    gpu, rebuild = f"cuda:{device}", "native"
    if status == 0:
        name = (<bytes>info.name).decode(errors="replace")
        gpu = f"{name} (compute capability {info.major}.{info.minor})"
        rebuild = f"{info.major}{info.minor}"
    return (
        f"this build has no code for {gpu}: it was compiled for {' '.join(architectures())}; "
        f'rebuild with BARACUDA_CUDA_ARCHS={rebuild}, or use device "cpu"'
    )


cdef int check(int status, str what) except -1:
    if status == 0:
        return 0
    cdef int device = 0
    reason = reason_of(status)
    if reason is not None:
        raise Unsupported(f"{what}: {reason}")
    if status == cudaErrorNoKernelImageForDevice:
        with nogil:
            bcy_cuda_get_device(&device)
        raise Unsupported(f"{what}: {no_kernels(device)}")
    if status == cudaErrorMemoryAllocation:
        raise OutOfMemory(status, name_of(status), f"{what}: the device has no memory left")
    if status == BCY_ERROR_OUT_OF_MEMORY:
        raise OutOfMemory(status, name_of(status), f"{what}: the host has no memory left")
    if status == BCY_ERROR_UNKNOWN_FORMAT:
        raise Unsupported(f"{what}: the block format is not one this build has kernels for")
    if status == BCY_ERROR_UNSUPPORTED_TYPE:
        raise Unsupported(
            f"{what}: the element type is not one this operation takes; convert the array first"
        )
    if status == BCY_ERROR_TOO_LARGE:
        raise Unsupported(
            f"{what}: a size exceeds what one launch can address; split the problem"
        )
    if status == BCY_ERROR_INVALID_ARGUMENT:
        raise InvalidProblem(f"{what}: a size, stride or pointer contradicts the operation")
    if status < 0:
        raise InvalidProblem(f"{what}: failed with status {status}")
    raise CudaError(status, name_of(status), f"{what}: {text_of(status)}")


cdef int fail(int status, const char* what) except -1 with gil:
    return check(status, (<bytes>what).decode())


cdef int fail_allocation(int status, int64_t nbytes, int device) except -1 with gil:
    cdef int64_t free_bytes = 0
    cdef int64_t total_bytes = 0
    cdef int unknown
    if status != cudaErrorMemoryAllocation:
        return check(status, f"allocating {nbytes} bytes on cuda:{device}")
    with nogil:
        unknown = bcy_cuda_memory_info(device, &free_bytes, &total_bytes)
    have = "" if unknown else f"; {free_bytes} of {total_bytes} bytes are free"
    raise OutOfMemory(
        status,
        name_of(status),
        f"allocating {nbytes} bytes on cuda:{device}{have}; free buffers, or use a smaller problem",
    )


cdef int fail_pinning(int status, int64_t nbytes) except -1 with gil:
    what = f"allocating {nbytes} bytes of pinned memory"
    if status != cudaErrorMemoryAllocation:
        return check(status, what)
    raise OutOfMemory(
        status,
        name_of(status),
        f"{what}; the host cannot lock as much: free buffers, or use a smaller one",
    )


# ---- operations ----------------------------------------------------------------------------------


cdef int gguf_dequantize(const bcy_gguf_dequantize_args* args, void* stream) except -1 nogil:
    cdef int status = bcy_cuda_gguf_dequantize(args, stream)
    return fail(status, b"dequantizing on CUDA") if status else 0


cdef int gguf_matvec(const bcy_gguf_matmul_args* args, void* stream) except -1 nogil:
    cdef int status = bcy_cuda_gguf_matvec(args, stream)
    return fail(status, b"multiplying on CUDA") if status else 0


cdef int gguf_stage(const bcy_gguf_matmul_args* args, void* stream) except -1 nogil:
    cdef int status = bcy_cuda_gguf_stage(args, stream)
    return fail(status, b"staging activations on CUDA") if status else 0


cdef int gguf_matmul(const bcy_gguf_matmul_args* args, void* stream) except -1 nogil:
    cdef int status = bcy_cuda_gguf_matmul(args, stream)
    return fail(status, b"staging activations or multiplying them on CUDA") if status else 0


cdef int gguf_needs_no_workspace(const bcy_gguf_matmul_args* args) except -1 nogil:
    cdef int32_t answer = 0
    cdef int status = bcy_cuda_gguf_needs_no_workspace(args, &answer)
    return fail(status, b"asking for the workspace of a product on CUDA") if status else answer


cdef int64_t gguf_workspace_size(const bcy_gguf_matmul_args* args) except -2 nogil:
    cdef int64_t size = 0
    cdef int status = bcy_cuda_gguf_workspace_size(args, &size)
    return fail(status, b"asking for the workspace of a product on CUDA") if status else size


cdef int nf4_uses_tensor_cores(const bcy_nf4_matmul_args* args) except -1 nogil:
    cdef int32_t answer = 0
    cdef int status = bcy_cuda_nf4_uses_tensor_cores(args, &answer)
    return fail(status, b"looking at a CUDA device") if status else answer


cdef int64_t nf4_workspace_size(const bcy_nf4_matmul_args* args) except -1 nogil:
    cdef int64_t size = 0
    cdef int status = bcy_cuda_nf4_workspace_size(args, &size)
    return fail(status, b"looking at a CUDA device") if status else size


cdef int nf4_matmul(const bcy_nf4_matmul_args* args, void* stream) except -1 nogil:
    cdef int status = bcy_cuda_nf4_matmul(args, stream)
    return fail(status, b"multiplying 4-bit codes on CUDA") if status else 0


cdef int nf4_dequantize(const bcy_nf4_dequantize_args* args, void* stream) except -1 nogil:
    cdef int status = bcy_cuda_nf4_dequantize(args, stream)
    return fail(status, b"dequantizing 4-bit codes on CUDA") if status else 0


cdef int nf4_quantize(const bcy_nf4_quantize_args* args, void* stream) except -1 nogil:
    cdef int status = bcy_cuda_nf4_quantize(args, stream)
    return fail(status, b"quantizing to 4-bit codes on CUDA") if status else 0


cdef int nf4_nest(const bcy_nf4_nest_args* args, void* stream) except -1 nogil:
    cdef int status = bcy_cuda_nf4_nest(args, stream)
    return fail(status, b"quantizing absmax on CUDA") if status else 0


# ---- devices -------------------------------------------------------------------------------------

cdef enum:
    MAX_DEVICES = 64

cdef bint usable[MAX_DEVICES]


cdef int require_ordinal(int device) except -1:
    cdef int status
    cdef int count = 0
    with nogil:
        status = bcy_cuda_device_count(&count)
    check(status, f"device cuda:{device}" if device >= 0 else "device")
    if not 0 <= device < count:
        raise InvalidProblem(
            f"device: expected an ordinal from 0 to {count - 1}, as there are {count} CUDA "
            f"devices, got {device}"
        )
    return 0


cdef int require_usable_device(int device) except -1:
    cdef int status
    if 0 <= device < MAX_DEVICES and usable[device]:
        return 0
    require_ordinal(device)
    with nogil:
        status = bcy_cuda_has_kernels(device)
    if status == cudaErrorNoKernelImageForDevice:
        raise Unsupported(f"device cuda:{device}: {no_kernels(device)}")
    check(status, f"device cuda:{device}")
    if device < MAX_DEVICES:
        usable[device] = True
    return 0


cdef int get_device(int* device) except -1 nogil:
    cdef int status = bcy_cuda_get_device(device)
    return fail(status, b"asking for the current device") if status else 0


cdef int get_device_quietly(int* device) noexcept nogil:
    return bcy_cuda_get_device(device)


cdef int set_device(int device) except -1 nogil:
    cdef int status = bcy_cuda_set_device(device)
    return fail(status, b"setting the current device") if status else 0


# ---- streams and events --------------------------------------------------------------------------


cdef int stream_create(int device, int priority, void** stream) except -1 nogil:
    cdef int status = bcy_cuda_stream_create(device, priority, stream)
    return fail(status, b"creating a stream") if status else 0


cdef int stream_destroy(int device, void* stream) noexcept nogil:
    return bcy_cuda_stream_destroy(device, stream)


cdef int stream_synchronize(int device, void* stream) except -1 nogil:
    cdef int status = bcy_cuda_stream_synchronize(device, stream)
    return fail(status, b"waiting for a stream") if status else 0


cdef int stream_synchronize_quietly(int device, void* stream) noexcept nogil:
    return bcy_cuda_stream_synchronize(device, stream)


cdef int stream_query(int device, void* stream, int* done) except -1 nogil:
    cdef int status = bcy_cuda_stream_query(device, stream, done)
    return fail(status, b"querying a stream") if status else 0


cdef int stream_wait_event(int device, void* stream, void* event) except -1 nogil:
    cdef int status = bcy_cuda_stream_wait(device, stream, event)
    return fail(status, b"making a stream wait for an event") if status else 0


cdef int stream_is_capturing(int device, void* stream, int* capturing) except -1 nogil:
    cdef int status = bcy_cuda_stream_is_capturing(device, stream, capturing)
    return fail(status, b"asking whether a stream is capturing") if status else 0


cdef int stream_device(void* stream, int* device) except -1 nogil:
    cdef int status = bcy_cuda_stream_device(stream, device)
    return fail(status, b"asking for a stream's device") if status else 0


cdef int stream_priority(int device, void* stream, int* priority) except -1 nogil:
    cdef int status = bcy_cuda_stream_priority(device, stream, priority)
    return fail(status, b"asking for a stream's priority") if status else 0


cdef int stream_priority_range(int device, int* least, int* greatest) except -1 nogil:
    cdef int status = bcy_cuda_stream_priority_range(device, least, greatest)
    return fail(status, b"asking for the stream priorities") if status else 0


cdef int event_create(int device, int timing, void** event) except -1 nogil:
    cdef int status = bcy_cuda_event_create(device, timing, event)
    return fail(status, b"creating an event") if status else 0


cdef int event_destroy(int device, void* event) noexcept nogil:
    return bcy_cuda_event_destroy(device, event)


cdef int event_record(int device, void* event, void* stream) except -1 nogil:
    cdef int status = bcy_cuda_event_record(device, event, stream)
    return fail(status, b"recording an event") if status else 0


cdef int event_synchronize(void* event) except -1 nogil:
    cdef int status = bcy_cuda_event_synchronize(event)
    return fail(status, b"waiting for an event") if status else 0


cdef int event_synchronize_quietly(void* event) noexcept nogil:
    return bcy_cuda_event_synchronize(event)


cdef int event_query(void* event, int* done) except -1 nogil:
    cdef int status = bcy_cuda_event_query(event, done)
    return fail(status, b"querying an event") if status else 0


cdef int event_is_done(void* event) noexcept nogil:
    # An event that cannot be asked any more (a failed context) has nothing left to protect.
    cdef int done = 0
    return 1 if bcy_cuda_event_query(event, &done) else done


cdef int event_elapsed_ms(void* start, void* end, float* ms) except -1 nogil:
    cdef int status = bcy_cuda_event_elapsed_ms(start, end, ms)
    return fail(status, b"reading the time between two events") if status else 0


# ---- memory --------------------------------------------------------------------------------------


cdef int malloc_device(int device, int64_t nbytes, void* stream, void** pointer) except -1 nogil:
    cdef int status = bcy_cuda_malloc(device, nbytes, stream, pointer)
    return fail_allocation(status, nbytes, device) if status else 0


cdef int free_device(int device, void* pointer, void* stream) noexcept nogil:
    return bcy_cuda_free(device, pointer, stream)


cdef int malloc_pinned(int64_t nbytes, void** pointer) except -1 nogil:
    cdef int status = bcy_cuda_malloc_host(nbytes, pointer)
    return fail_pinning(status, nbytes) if status else 0


cdef int free_pinned(void* pointer) noexcept nogil:
    return bcy_cuda_free_host(pointer)


cdef int copy(
    int device, void* to, const void* source, int64_t nbytes, void* stream
) except -1 nogil:
    cdef int status = bcy_cuda_memcpy(device, to, source, nbytes, stream)
    return fail(status, b"copying memory") if status else 0


cdef int fill(int device, void* to, int value, int64_t nbytes, void* stream) except -1 nogil:
    cdef int status = bcy_cuda_memset(device, to, value, nbytes, stream)
    return fail(status, b"filling memory") if status else 0


cdef int pointer_device(const void* pointer, int* device_type, int* device) noexcept nogil:
    return bcy_cuda_pointer_device(pointer, device_type, device)


# ---- what Python sees ----------------------------------------------------------------------------


def built():
    """Whether this build has CUDA kernels.

    Returns
    -------
    bool

    Examples
    --------
    >>> from baracuda_cy import _cuda
    >>> _cuda.built() in (True, False)
    True
    """
    return bool(bcy_cuda_built())


def architectures():
    """Architectures the kernels were compiled for, as in ``BARACUDA_CUDA_ARCHS``.

    Returns
    -------
    tuple of str
        Such as ``("80", "90", "90-virtual")``; empty in a build without CUDA.
    """
    text = (<bytes>bcy_cuda_architectures()).decode()
    return tuple(text.split(";")) if text else ()


def toolkit_version():
    """CUDA version of this build.

    Returns
    -------
    tuple of int or None
        Such as ``(13, 0)``; None in a build without CUDA.
    """
    cdef int version = bcy_cuda_toolkit_version()
    return (version // 1000, version % 1000 // 10) if version else None


def driver_version():
    """Highest CUDA version that the installed driver supports.

    Returns
    -------
    tuple of int or None
        Such as ``(13, 0)``; None without a driver or in a build without CUDA.
    """
    cdef int version
    with nogil:
        version = read_driver_version()
    return (version // 1000, version % 1000 // 10) if version else None


def device_count():
    """Number of CUDA devices that can be used; 0 without a driver or with one that is too old.

    Returns
    -------
    int
    """
    cdef int count = 0
    with nogil:
        bcy_cuda_device_count(&count)
    return count


def why_unavailable():
    """Why CUDA cannot be used here.

    Returns
    -------
    str or None
        The reason and the remedy; None where there is a device to use.

    Examples
    --------
    >>> from baracuda_cy import _cuda
    >>> (_cuda.why_unavailable() is None) == (_cuda.device_count() > 0)
    True
    """
    cdef int count = 0
    cdef int status
    with nogil:
        status = bcy_cuda_device_count(&count)
    if status == 0 and count == 0:
        status = cudaErrorNoDevice
    if status == 0:
        return None
    return reason_of(status) or f"{name_of(status)}: {text_of(status)}"


cdef int read_device(int device, bcy_device_info* info) except -1:
    cdef int status
    with nogil:
        status = bcy_cuda_device_info(device, info)
    if status == cudaErrorInvalidDevice:
        require_ordinal(device)
    return check(status, f"device cuda:{device}")


def device_name(int device=0):
    """Name of a device, such as ``"NVIDIA H100 PCIe"``.

    Parameters
    ----------
    device : int
        Ordinal.

    Returns
    -------
    str

    Raises
    ------
    Unsupported
        There is no CUDA here; the message says why.
    InvalidProblem
        There is no such device.
    """
    cdef bcy_device_info info
    read_device(device, &info)
    return (<bytes>info.name).decode(errors="replace")


def multiprocessors(int device=0):
    """Number of multiprocessors of a device, by which kernels choose how many blocks they launch.

    Parameters
    ----------
    device : int
        Ordinal.

    Returns
    -------
    int

    Raises
    ------
    Unsupported
        There is no CUDA here; the message says why.
    InvalidProblem
        There is no such device.
    """
    cdef bcy_device_info info
    read_device(device, &info)
    return info.multiprocessors


def compute_capability(int device=0):
    """Compute capability of a device.

    Parameters
    ----------
    device : int
        Ordinal.

    Returns
    -------
    tuple of int
        Such as ``(9, 0)``.

    Raises
    ------
    Unsupported
        There is no CUDA here; the message says why.
    InvalidProblem
        There is no such device.
    """
    cdef bcy_device_info info
    read_device(device, &info)
    return info.major, info.minor


def xla_handler(str operation):
    """What JAX calls for an operation: a capsule, or None where there is none, as without CUDA.

    Parameters
    ----------
    operation : str
        As of `_cpu.xla_handler`.
    """
    cdef void* handler = <void*>bcy_cuda_xla_handler(operation.encode())
    return None if handler == NULL else PyCapsule_New(handler, NULL, NULL)
