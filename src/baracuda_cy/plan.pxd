# SPDX-License-Identifier: Apache-2.0
from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint64_t

from baracuda_cy.dlpack cimport ArrayView

cdef enum:
    SLOTS = 5

# The arguments of a call, each with a slot of its own.
cdef enum:
    WEIGHT = 0
    ACTIVATIONS = 1
    OUTPUT = 2
    BIAS = 3
    WORKSPACE = 4

cdef enum:
    HOST = 1
    CUDA = 2

cdef enum Role:
    ABSENT    # not an argument of this plan
    PACKED    # contiguous bytes of any rank, `cols` of them or more
    MATRIX    # rows x cols, rows may be padded; one row may be given as a vector
    VECTOR    # cols elements
    SCRATCH   # contiguous writable bytes, `cols` of them or more

# What an argument must be, fixed when the plan is selected.
cdef struct Operand:
    Role role
    int32_t element       # ElementKind; PACKED and SCRATCH look at bytes only
    bint written
    int64_t rows
    int64_t cols
    int64_t offset        # bytes before the first one used
    int64_t alignment     # of the first byte used

# One call: what its arguments turned out to be.
cdef struct Call:
    ArrayView views[SLOTS]
    char* data[SLOTS]         # first byte used
    uint64_t span[SLOTS]      # bytes from there to the last one used
    int64_t stride[SLOTS]     # MATRIX: elements from row to row
    void* stream


# What messages call the arguments.
cdef enum Names:
    OF_PLANS
    OF_OPERATIONS

cdef str name_of(Names names, int slot)


cdef class Plan:
    cdef readonly object descriptor
    cdef readonly object preference
    cdef readonly object sku
    cdef readonly int64_t workspace_size
    cdef Operand operands[SLOTS]
    cdef int32_t device_type
    cdef int32_t device_id
    cdef int threads
    cdef bint idle            # there is nothing to compute

    cdef int bind(self, object device, object descriptor, object preference) except -1
    cdef str problem(self)
    cdef str machine(self)
    # Starts the work of a call that was found valid.
    cdef int launch(self, Call* call) except -1 nogil
    # Arrays are borrowed, NULL where an argument was not given.
    cdef int run_arrays(self, PyObject** arrays, object stream, bint start) except -1
    # The steps of it, for callers that acquire and release the views themselves.
    cdef int check(self, Call* call, PyObject** arrays, Names names) except -1
    cdef int start(self, Call* call, PyObject** arrays) except -1
    cdef object explain(
        self, Call* call, PyObject** arrays, Names names, int slot, int fault, int other)


cdef str message(str argument, str expected, str given, str remedy)
cdef object invalid(str argument, str expected, str given, str remedy)
# The CUDA stream of a call: the one asked for, else the one that an array's framework works on,
# else the legacy default.
cdef int find_stream(
    int32_t device_type, int32_t device_id, PyObject** arrays, object stream, void** handle
) except -1
cdef int resolve_device(object device, int32_t* device_type, int32_t* device_id) except -1
cdef bint collapse_rows(ArrayView* view) noexcept nogil
cdef int64_t elements_of(const ArrayView* view) noexcept nogil
cdef bint contiguous(const ArrayView* view) noexcept nogil
cdef int64_t checked(object value, str argument) except -1
