# SPDX-License-Identifier: Apache-2.0
"""First steps with CuPy: GPU arrays, a stream of our own, a result that equals the CPU's.

python examples/cupy_linear.py
"""

import numpy as np

import baracuda_cy as bcy

try:
    import cupy
except ImportError:
    raise SystemExit("This example needs CuPy: pip install 'cupy-cuda13x[ctk]'") from None

rng = np.random.default_rng(0)
weight = bcy.quantize(rng.standard_normal((1024, 4096), dtype=np.float32), "Q4_0")
x = rng.standard_normal((8, 4096), dtype=np.float32)

on_gpu = weight.to("cuda")
with cupy.cuda.Stream(non_blocking=True) as stream:
    y = bcy.linear(cupy.asarray(x), on_gpu)  # runs on CuPy's current stream
    stream.synchronize()

# Not merely close: the GPU and the CPU add in one order, so the bits are the same.
assert np.array_equal(y.get(), bcy.linear(x, weight))
print(f"{type(y).__name__} {y.shape} on {y.device}, bit for bit what the CPU gives")
print(on_gpu.plan(m=8))
