# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint64_t

from baracuda_cy.view cimport ArrayView

# A capsule over memory that `owner` keeps alive. `flags` are those of DLManagedTensorVersioned.
cdef object make_capsule(object owner, ArrayView* view, uint64_t flags, object max_version)
