# SPDX-License-Identifier: Apache-2.0
"""First steps with NF4: quantize as bitsandbytes does, multiply, and see what the bits promise.

python examples/nf4_linear.py

NumPy is enough; with PyTorch and a GPU the same goes on there.
"""

import numpy as np

import baracuda_cy as bcy

rng = np.random.default_rng(0)
dense = rng.standard_normal((1024, 4096), dtype=np.float32)
x = rng.standard_normal((8, 4096), dtype=np.float32).astype(np.float16)

weight = bcy.quantize(dense, "nf4", nested=True)  # blocks of 64, their scales in 8 bits
y = bcy.linear(x, weight)  # the activations as they are: float16 [8, 4096] -> [8, 1024]
print(f"{dense.nbytes / 1e6:.1f} MB of float32 became {weight.nbytes / 1e6:.1f} MB: {weight}")


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


wide = x.astype(np.float64)
print(f"relative error of the product: {distance(y, wide @ weight.dequantize().T):.1e}")
print(f"with what NF4 itself costs:    {distance(y, wide @ dense.T):.1e}")

# One token alone has the very bits that it has in a batch.
assert np.array_equal(bcy.linear(x[3:4], weight), y[3:4])

# Another layout of the same values gives the same bits.
assert np.array_equal(bcy.linear(x, weight.to_layout("row_pair")), y)
print(weight.plan(m=8, activation=x.dtype))

try:
    import torch
except ImportError:
    torch = None

if torch is not None and torch.cuda.is_available():
    on_gpu, tokens = weight.to("cuda"), torch.from_numpy(x).to("cuda")
    fast = bcy.linear(tokens, on_gpu)  # tensor cores: the bits are this GPU's
    error = distance(fast.double().cpu().numpy(), wide @ weight.dequantize().T)
    print(f"{type(fast).__name__} {tuple(fast.shape)} on {fast.device}, relative error {error:.1e}")

    exact = bcy.PlanPreference(bit_stable_across_hardware=True)  # float32 multiply-adds
    assert np.array_equal(bcy.linear(tokens, on_gpu, preference=exact).cpu().numpy(), y)
    for preference in (None, exact):
        print(on_gpu.plan(8, x.dtype, preference=preference).precision_guarantee)
