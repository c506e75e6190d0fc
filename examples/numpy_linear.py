# SPDX-License-Identifier: Apache-2.0
"""First steps with NumPy: quantize a matrix, multiply with it, and see what ran.

python examples/numpy_linear.py
"""

import numpy as np

import baracuda_cy as bcy

rng = np.random.default_rng(0)
dense = rng.standard_normal((1024, 4096), dtype=np.float32)
x = rng.standard_normal((8, 4096), dtype=np.float32)

weight = bcy.quantize(dense, "Q4_K")
y = bcy.linear(x, weight)  # as torch.nn.functional.linear: [8, 4096] -> [8, 1024]
print(f"{dense.nbytes / 1e6:.1f} MB of float32 became {weight.data.nbytes / 1e6:.1f} MB of Q4_K")


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


exact = x.astype(np.float64) @ bcy.dequantize(weight, "float32").T
print(f"relative error of the product: {distance(y, exact):.1e}")
print(f"with what Q4_K itself costs:   {distance(y, x @ dense.T):.1e}")

# One token alone has the very bits that it has in a batch.
assert np.array_equal(bcy.linear(x[3:4], weight), y[3:4])

print(weight.plan(m=8))
