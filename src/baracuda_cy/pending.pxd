# SPDX-License-Identifier: Apache-2.0
from baracuda_cy.view cimport ArrayView

# Moves what the views keep alive, and a reference to `owners` (the arrays), into a list that is
# released once the work now on `stream` is done. Leaves the views zeroed. While `stream` is
# capturing a graph nothing is held: events cannot be queried then, and a replay needs the arrays as
# long as the graph lives, which only the caller knows.
cdef int hold_until_done(
    ArrayView* views, int count, tuple owners, int device, void* stream) except -1
# How many launches still hold arrays. Where there are any, whoever acquires an array first calls
# this, with the stream its work will run on: now and then it releases those whose kernels are done.
cdef int pending_count
cdef int collect_now_and_then(void* stream, bint on_cuda_stream) except -1
