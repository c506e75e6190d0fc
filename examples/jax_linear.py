# SPDX-License-Identifier: Apache-2.0
"""First steps with JAX, on whichever device JAX computes: a jax.Array in, a jax.Array out.

python examples/jax_linear.py
"""

import numpy as np

import baracuda_cy as bcy

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    raise SystemExit("This example needs JAX: pip install jax") from None

dense = np.random.default_rng(0).standard_normal((1024, 4096), dtype=np.float32)
x = jax.random.normal(jax.random.key(0), (8, 4096))
device = "cuda" if x.device.platform == "gpu" else "cpu"
weight = bcy.quantize(dense, "Q6_K").to(device)

y = bcy.linear(x, weight)
expected = x @ jnp.asarray(dense).T
error = jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)
print(f"{y.dtype}{list(y.shape)} on {y.device}, {error:.3f} from the float32 product")

# bfloat16 activations give a bfloat16 result.
print(bcy.linear(x.astype(jnp.bfloat16), weight).dtype)
print(weight.plan(m=8))
