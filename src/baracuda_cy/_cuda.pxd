# SPDX-License-Identifier: Apache-2.0
# The CUDA half of the native code. Every function raises on failure (0 otherwise) and takes the GIL
# only to do so; those marked noexcept return the status, for destructors and polling, and are named
# _quietly beside one that raises.
from libc.stdint cimport int32_t, int64_t

from baracuda_cy._native cimport (
    bcy_gguf_dequantize_args,
    bcy_gguf_matmul_args,
    bcy_nf4_dequantize_args,
    bcy_nf4_matmul_args,
    bcy_nf4_nest_args,
    bcy_nf4_quantize_args,
)

# `what` says what was being done, as in "launching the product": it becomes part of the message.
cdef int check(int status, str what) except -1

cdef int gguf_dequantize(const bcy_gguf_dequantize_args* args, void* stream) except -1 nogil
cdef int gguf_matvec(const bcy_gguf_matmul_args* args, void* stream) except -1 nogil
cdef int gguf_stage(const bcy_gguf_matmul_args* args, void* stream) except -1 nogil
cdef int gguf_matmul(const bcy_gguf_matmul_args* args, void* stream) except -1 nogil
# 1 where a staged product stages for itself, else 0.
cdef int gguf_needs_no_workspace(const bcy_gguf_matmul_args* args) except -1 nogil
# -1 beyond int64
cdef int64_t gguf_workspace_size(const bcy_gguf_matmul_args* args) except -2 nogil

# 1 where the product's bits are its own, 0 where they are those of the CPU backend.
cdef int nf4_uses_tensor_cores(const bcy_nf4_matmul_args* args) except -1 nogil
cdef int64_t nf4_workspace_size(const bcy_nf4_matmul_args* args) except -1 nogil
cdef int nf4_matmul(const bcy_nf4_matmul_args* args, void* stream) except -1 nogil
cdef int nf4_dequantize(const bcy_nf4_dequantize_args* args, void* stream) except -1 nogil
cdef int nf4_quantize(const bcy_nf4_quantize_args* args, void* stream) except -1 nogil
cdef int nf4_nest(const bcy_nf4_nest_args* args, void* stream) except -1 nogil

# Raise InvalidProblem unless there is such a device, and the other Unsupported, with the reason and
# the remedy, unless this build's kernels run on it; both where there is no CUDA at all.
cdef int require_ordinal(int device) except -1
cdef int require_usable_device(int device) except -1
cdef int get_device(int* device) except -1 nogil
cdef int get_device_quietly(int* device) noexcept nogil
cdef int set_device(int device) except -1 nogil

cdef int stream_create(int device, int priority, void** stream) except -1 nogil
cdef int stream_destroy(int device, void* stream) noexcept nogil
cdef int stream_synchronize(int device, void* stream) except -1 nogil
cdef int stream_synchronize_quietly(int device, void* stream) noexcept nogil
cdef int stream_query(int device, void* stream, int* done) except -1 nogil
cdef int stream_wait_event(int device, void* stream, void* event) except -1 nogil
cdef int stream_is_capturing(int device, void* stream, int* capturing) except -1 nogil
cdef int stream_device(void* stream, int* device) except -1 nogil
cdef int stream_priority(int device, void* stream, int* priority) except -1 nogil
cdef int stream_priority_range(int device, int* least, int* greatest) except -1 nogil

cdef int event_create(int device, int timing, void** event) except -1 nogil
cdef int event_destroy(int device, void* event) noexcept nogil
cdef int event_record(int device, void* event, void* stream) except -1 nogil
cdef int event_synchronize(void* event) except -1 nogil
cdef int event_synchronize_quietly(void* event) noexcept nogil
cdef int event_query(void* event, int* done) except -1 nogil
# No status: 1 when done (or beyond asking), 0 while pending.
cdef int event_is_done(void* event) noexcept nogil
cdef int event_elapsed_ms(void* start, void* end, float* ms) except -1 nogil

cdef int malloc_device(int device, int64_t nbytes, void* stream, void** pointer) except -1 nogil
cdef int free_device(int device, void* pointer, void* stream) noexcept nogil
cdef int malloc_pinned(int64_t nbytes, void** pointer) except -1 nogil
cdef int free_pinned(void* pointer) noexcept nogil
cdef int copy(
    int device, void* to, const void* source, int64_t nbytes, void* stream) except -1 nogil
cdef int fill(int device, void* to, int value, int64_t nbytes, void* stream) except -1 nogil
cdef int pointer_device(const void* pointer, int* device_type, int* device) noexcept nogil
