# SPDX-License-Identifier: Apache-2.0
"""First steps with PyTorch, on the GPU if there is one: tensors in, a tensor out, no copy between.

python examples/torch_linear.py
"""

import baracuda_cy as bcy

try:
    import torch
except ImportError:
    raise SystemExit("This example needs PyTorch: pip install torch") from None

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
layer = torch.nn.Linear(4096, 1024)
weight = bcy.quantize(layer.weight.detach(), "Q4_K").to(device)
bias = layer.bias.detach().to(device)

x = torch.randn(2, 4, 4096, device=device)
with torch.no_grad():
    y = bcy.linear(x, weight, bias=bias)  # torch's current stream, torch's allocator
    expected = layer.to(device)(x)

error = (y - expected).norm() / expected.norm()
print(f"{type(y).__name__} {tuple(y.shape)} on {y.device}, {error:.3f} from the float32 layer")

# For a loop, select a plan once and lend it everything it needs: a run then allocates nothing.
plan = bcy.GgufMmvqMultiMPlan.select(
    device,
    bcy.GgufMmvqMultiMDescriptor(nrows=1024, ncols=4096, m=8, block_format="Q4_K"),
)
scratch = bcy.Workspace(plan.workspace_size, device=device)
out = torch.empty(8, 1024, device=device)
plan.run(weight.data, x.view(8, 4096), out, workspace=scratch)
assert torch.equal(out + bias, y.view(8, 1024))
print(plan)
