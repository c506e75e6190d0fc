# SPDX-License-Identifier: Apache-2.0
"""First steps with checkpoints of bitsandbytes: write one, map it, multiply with what is in it.

    python examples/bitsandbytes_checkpoint.py
    python examples/bitsandbytes_checkpoint.py llama-bnb-4bit/

With a path it lists that checkpoint, as transformers or bitsandbytes wrote it. Neither is needed.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import baracuda_cy as bcy


def write_mlp(path):
    """Two layers, one in NF4 with nested absmax and one in FP4, and an array as it is."""
    rng = np.random.default_rng(0)
    up = rng.standard_normal((1024, 512), dtype=np.float32)
    down = rng.standard_normal((512, 1024), dtype=np.float32)
    tensors = {
        "up.weight": bcy.quantize(up, "nf4", nested=True),
        "down.weight": bcy.quantize(down, "fp4", block_size=128),
        "up.bias": rng.standard_normal(1024, dtype=np.float32).astype(np.float16),
    }
    bcy.save_bitsandbytes(path, tensors, dtype="float16")
    return tensors


def show(path):
    with bcy.open_bitsandbytes(path) as file:
        for name, kind in file.types.items():
            tensor = file[name]
            print(f"{name}: {tensor if name in file.dtypes else f'{kind} {tensor.shape}'}")


def main(arguments):
    if arguments:
        show(arguments[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        written = write_mlp(path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
        show(path)

        file = bcy.open_bitsandbytes(path)
        up, down, bias = (file[name] for name in ("up.weight", "down.weight", "up.bias"))
        x = np.random.default_rng(1).standard_normal((4, 512), dtype=np.float32).astype(np.float16)
        hidden = np.maximum(bcy.linear(x, up, bias=bias), 0)  # the weights are still mapped
        y = bcy.linear(hidden / 32, down)
        print(f"{x.shape} -> {hidden.shape} -> {y.shape}, {y.dtype}")

        # The bits went through the file unchanged.
        assert np.array_equal(y, bcy.linear(hidden / 32, written["down.weight"]))
        print(up.plan(m=4, activation=x.dtype, bias=True))


if __name__ == "__main__":
    main(sys.argv[1:])
