# SPDX-License-Identifier: Apache-2.0
from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint64_t

from baracuda_cy.view cimport ArrayView

# The arguments of a call, each with a slot of its own.
cdef enum:
    WEIGHT = 0
    ACTIVATIONS = 1
    OUTPUT = 2
    BIAS = 3
    WORKSPACE = 4
    COMMON_SLOTS = 5
    ABSMAX = 5
    NESTED_ABSMAX = 6
    NESTED_CODE = 7
    SLOTS = 8

cdef enum:
    HOST = 1
    CUDA = 2

cdef enum:
    WORKSPACE_ALIGNMENT = 256

cdef enum Role:
    ABSENT    # not an argument of this plan
    MATRIX    # rows x cols, rows may be padded; one row may be given as a vector
    VECTOR    # cols elements
    # The others are contiguous, of any rank.
    PACKED    # `cols` bytes or more
    SCRATCH   # `cols` writable bytes or more
    CODES     # exactly `cols` bytes, of any type that bitsandbytes stores them as
    SCALES    # exactly `cols` elements
    NESTED    # exactly one element for every `nested_block` of `cols`

# What an argument must be, fixed when the plan is selected.
cdef struct Operand:
    Role role
    int32_t element       # ElementKind; PACKED, SCRATCH and CODES look at bytes only
    bint written
    int64_t rows
    int64_t cols
    int64_t offset        # bytes before the first one used
    int64_t alignment     # of the first byte used

# What messages call the arguments.
cdef enum Names:
    OF_PLANS
    OF_OPERATIONS

# One call, filled after `begin`: its arguments, and what they turned out to be.
cdef struct Call:
    PyObject* arrays[SLOTS]   # borrowed; NULL where an argument was not given
    char* data[SLOTS]         # first byte used
    uint64_t span[SLOTS]      # bytes from there to the last one used
    int64_t stride[SLOTS]     # MATRIX: elements from row to row
    int32_t nested_block
    float nested_offset
    Names names
    void* stream
    ArrayView views[SLOTS]


cdef class Plan:
    cdef readonly object descriptor
    cdef readonly object preference
    cdef readonly object sku
    cdef readonly int64_t workspace_size
    cdef Operand operands[SLOTS]
    cdef int slots            # of them, those that a call may fill
    cdef int32_t device_type
    cdef int32_t device_id
    cdef int threads
    cdef bint idle            # there is nothing to compute
    cdef bint needs_workspace

    # The steps of `select`: what does not depend on the operation, the operands of a product, the
    # kernel's description.
    cdef int bind(self, object device, object descriptor, object preference) except -1
    cdef int bind_product(
        self, object m, object nrows, object ncols, object activation, object output) except -1
    cdef int bind_workspace(self, int64_t size, bint required) except -1
    cdef int lend_workspace(self, Call* call, object workspace) except -1
    cdef object describe_kernel(
        self, object op, object element, object output, object activations,
        object block_format=*, object layout=*, object epilogue=*, object math=*)
    cdef str problem(self)
    cdef str machine(self)
    # Refuses what came out of `__new__` alone; every entry asks this first.
    cdef int require_selected(self) except -1
    # Notes the arrays of a weight that this plan is for. What it gives keeps them alive, to be held
    # for the call: a subclass may make its arrays anew whenever it is asked.
    cdef object lend(self, Call* call, object weight)
    # Starts the work of a call that was found valid.
    cdef int launch(self, Call* call) except -1 nogil
    cdef int run_arrays(self, Call* call, object stream, bint start) except -1
    # The steps of it, for callers that acquire and release the views themselves.
    cdef int check(self, Call* call) except -1
    cdef int start(self, Call* call) except -1
    cdef object explain(self, Call* call, int slot, int fault, int other)


cdef str name_of(Names names, int slot)
cdef str message(str argument, str expected, str given, str remedy)
cdef object invalid(str argument, str expected, str given, str remedy)
cdef void begin(Call* call, int slots) noexcept nogil
# In two passes over the slots: all views but the borrowed ones, each by `acquire`, then those at
# once, after which no code of others runs: it could take the memory from a borrowed view.
cdef int acquire(Plan plan, Call* call, int slot) except -1
cdef int borrow(Plan plan, Call* call) except -1
cdef int release_views(Call* call, int slots) noexcept
# Keeps what was queued alive until it is done, where the arrays' owners do not order that.
cdef int hold_foreign(Call* call, int slots, int device) except -1
# The CUDA stream of a call: the one asked for, else the one that an array's framework works on,
# else the legacy default.
cdef int find_stream(
    int32_t device_type, int32_t device_id, PyObject** arrays, object stream, void** handle
) except -1
cdef int resolve_device(object device, int32_t* device_type, int32_t* device_id) except -1
cdef bint collapse_rows(ArrayView* view) noexcept nogil
cdef bint has_single_columns(const ArrayView* view) noexcept nogil
cdef int64_t elements_of(const ArrayView* view) noexcept nogil
cdef bint contiguous(const ArrayView* view) noexcept nogil
cdef int64_t checked(object value, str argument) except -1
cdef int check_floating(object element, str argument) except -1
cdef int check_descriptor(object descriptor, object expected, str fields) except -1
# What is no matrix: `count` elements or bytes.
cdef int set_operand(
    Operand* operand, Role role, int element, object count, int64_t alignment) except -1
cdef int set_matrix(
    Operand* operand, object rows, object cols, object element, bint written, str argument
) except -1
