# SPDX-License-Identifier: Apache-2.0
"""The main job on the CPU with nothing but NumPy: `make wheel` runs it in an empty environment."""

import sys

import numpy as np

import baracuda_cy as bcy
from baracuda_cy import _cpu, _cuda


def main():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((48, 512), np.float32)
    x = rng.standard_normal((3, 512), np.float32)
    exact = x @ weight.T
    for block_format in ("Q8_0", "Q6_K", "Q4_K", "Q4_0"):
        packed = bcy.quantize(weight, block_format)
        product = bcy.linear(x, packed)
        dense = x @ np.asarray(bcy.dequantize(packed, "float32")).T
        error = float(np.abs(product - dense).max() / np.abs(dense).max())
        loss = float(np.abs(product - exact).max() / np.abs(exact).max())
        if not (error < 0.02 and 0 < loss < 0.2):
            sys.exit(f"{block_format}: {error=:.4f} against its own weights, {loss=:.4f}")
    python = ".".join(map(str, sys.version_info[:3]))
    gpus = " ".join(_cuda.architectures()) or "none"
    print(
        f"baracuda-cy {bcy.__version__}: Python {python}, CPU {_cpu.isa()}, GPU code {gpus}: works"
    )


if __name__ == "__main__":
    main()
