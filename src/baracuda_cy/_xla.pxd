# SPDX-License-Identifier: Apache-2.0
# Nothing here is called from another Cython module.
