# SPDX-License-Identifier: Apache-2.0
"""The PyTorch layer: its bits, gradients, graphs, and what modules do to their buffers."""

import copy
import gc
import io
import warnings
import weakref

import ml_dtypes
import numpy as np
import pytest

import baracuda_cy as bcy

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from baracuda_cy.torch import _WEIGHTS, Linear, _dequantize_op, _linear_op  # noqa: E402

ROWS, COLUMNS = 48, 256
PACKED = {
    "Q4_K": {},
    "Q8_0": {},
    "nf4": {},
    "fp4": {"nested": True, "block_size": 128},
    "row_pair": {},
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu(real="of torch"))])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    return request.param


@pytest.fixture(params=PACKED)
def weight(request, device):
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32)
    if request.param == "row_pair":
        return bcy.quantize(values, "nf4").to_layout("row_pair").to(device)
    return bcy.quantize(values, request.param, **PACKED[request.param]).to(device)


@pytest.fixture
def compiling():
    """Nothing is compiled yet, and torch may warn of what it does itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.reset()
        yield


def activations(device, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, COLUMNS, generator=generator).to(device, dtype)


def unpacked(weight):
    return torch.as_tensor(weight.to("cpu").dequantize())


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 5), (0,)])
def test_a_layer_has_the_bits_of_linear(device, weight, shape, dtype):
    x = activations(device, *shape, dtype=dtype)
    bias = torch.linspace(-1, 1, ROWS, device=device)
    layer = Linear(weight, bias)
    expected = bcy.linear(x, weight, bias.to(dtype))
    assert torch.equal(layer(x), expected)
    followed = layer(x.clone().requires_grad_())
    assert followed.requires_grad
    assert torch.equal(followed, expected)
    assert torch.equal(Linear(weight)(x), bcy.linear(x, weight))


def test_the_preference_is_that_of_the_layer(device):
    weight = bcy.quantize(np.eye(COLUMNS, dtype=np.float32), "Q8_0").to(device)
    x = activations(device, 3)
    preference = bcy.PlanPreference(activations="float")
    layer = Linear(weight, preference=preference)
    expected = bcy.linear(x, weight, preference=preference)
    assert not torch.equal(expected, bcy.linear(x, weight))
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x.clone().requires_grad_()), expected)


def test_any_strides(device, weight):
    x = activations(device, 6)
    layer = Linear(weight)
    for view in (x.t().contiguous().t(), x[::2], x.expand(2, 6, COLUMNS), x.view(2, 3, -1)[:, 1]):
        assert torch.equal(layer(view), layer(view.contiguous()))
        assert torch.equal(layer(view.requires_grad_()), layer(view.contiguous()))


@pytest.mark.usefixtures("compiling")
def test_autocast_rounds_activations(device, weight):
    x = activations(device, 3)
    layer = Linear(weight, torch.linspace(-1, 1, ROWS, device=device))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for dtype in (torch.bfloat16, torch.float16):
        expected = layer(x.to(dtype))
        with torch.autocast(device, dtype):
            assert torch.equal(layer(x), expected)
            assert torch.equal(layer(x.clone().requires_grad_()), expected)
            assert torch.equal(compiled(x), expected)


def test_weights_over_tensors_are_shared(device):
    data = torch.from_numpy(np.array(bcy.quantize(np.ones((4, 32), np.float32), "Q8_0").data))
    data = data.to(device)
    weight = bcy.GgufTensor(torch.cat([data.ravel(), data.ravel()]), "Q8_0", (4, 32))
    layer = Linear(weight)
    assert layer.data.data_ptr() == weight.data.data_ptr()
    assert layer.data.numel() == weight.nbytes


# ---- gradients -----------------------------------------------------------------------------------


def test_gradients_are_those_of_the_unpacked_weight(device, weight):
    x = activations(device, 2, 5).requires_grad_()
    layer = Linear(weight, torch.nn.Parameter(torch.zeros(ROWS, device=device)))
    toward = torch.randn(2, 5, ROWS, device=device)
    layer(x).backward(toward)
    of_x = toward.cpu().double() @ unpacked(weight).double()
    torch.testing.assert_close(x.grad.cpu().double(), of_x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, toward.sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_a_bias_learns_alone(device, weight):
    layer = Linear(weight, torch.nn.Parameter(torch.zeros(ROWS, device=device)))
    layer(activations(device, 7)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 7))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer.requires_grad_(False)
    assert not layer(activations(device, 7)).requires_grad


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_are_what_torch_takes_them_for(device, weight, dtype):
    layer = Linear(weight, torch.zeros(ROWS, device=device))
    x = activations(device, 2, 3, dtype=dtype)
    arrays, how = layer._arrays(), (layer._offset, layer._spec)
    bias = layer.bias.detach().to(dtype)
    torch.library.opcheck(_linear_op, (x, arrays, *how, bias))
    torch.library.opcheck(_dequantize_op, (arrays, *how, dtype))


@pytest.mark.parametrize("name", ["Q8_0", "nf4"])
def test_operators_see_what_tensors_hold_now(device, name):
    rng = np.random.default_rng(0)
    one, other = (
        Linear(bcy.quantize(rng.standard_normal((ROWS, COLUMNS), np.float32), name).to(device))
        for _ in range(2)
    )
    x = activations(device, 3)
    expected = other(x)

    def product(layer):
        return _linear_op(x, layer._arrays(), layer._offset, layer._spec, None)

    assert torch.equal(product(one), one(x))
    for mine, theirs in zip(one.buffers(), other.buffers(), strict=True):
        mine.data = theirs.clone()
    assert torch.equal(product(one), expected)
    for mine in one.buffers():
        mine.zero_()
    assert not product(one).any()


def test_a_layer_sees_what_its_tensors_hold_now(device, weight):
    layer = Linear(weight, torch.zeros(ROWS, device=device))
    x = activations(device, 3)
    with torch.no_grad():
        alone = layer(x)
        layer.half()  # gives the parameter other memory
        layer.bias += 100
        torch.testing.assert_close(layer(x), alone + 100)
        layer.bias.data = torch.full((ROWS,), 7.0, device=device)
        assert torch.equal(layer(x), bcy.linear(x, weight, layer.bias.detach()))
        for array in layer.buffers():
            array.data = torch.zeros_like(array)
        assert torch.equal(layer(x), torch.full_like(alone, 7))


def test_operators_keep_no_weight():
    layer = Linear(bcy.quantize(np.ones((ROWS, COLUMNS), np.float32), "nf4"))
    layer(torch.ones(1, COLUMNS, requires_grad=True)).sum().backward()
    kept = weakref.ref(layer.absmax)
    assert _WEIGHTS.get(layer.data) is not None
    del layer
    gc.collect()
    assert kept() is None


def test_without_gradients_of_what_requires_them(device, weight):
    layer = Linear(weight)
    x = activations(device, 3)
    expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x.clone().requires_grad_()), expected)
    for reentrant in (True, False):
        again = x.clone().requires_grad_()
        y = checkpoint(layer, again, use_reentrant=reentrant)
        assert torch.equal(y, expected)
        y.sum().backward()
        assert again.grad is not None


def test_gradients_of_no_outputs():
    layer = Linear(
        bcy.GgufTensor(np.zeros(0, np.uint8), "Q8_0", (0, 32)), torch.nn.Parameter(torch.zeros(0))
    )
    for shape in ((32,), (3, 32), (0, 32)):
        x = torch.ones(shape, requires_grad=True)
        layer(x).sum().backward()
        assert not x.grad.any()


# ---- graphs --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiling")
def test_compiled_whole(device, weight):
    layer = Linear(weight, torch.linspace(-1, 1, ROWS, device=device))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (1, 3, 20):
        x = activations(device, rows)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
        x, same = x.requires_grad_(), x.detach().clone().requires_grad_()
        compiled(x).sum().backward()
        layer(same).sum().backward()
        assert torch.equal(x.grad, same.grad)


@pytest.mark.usefixtures("compiling")
def test_layers_that_differ_in_their_bytes_share_a_graph():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x, rng = torch.ones(2, COLUMNS), np.random.default_rng(0)
    for _ in range(6):
        values = rng.standard_normal((ROWS, COLUMNS), np.float32)
        layer = Linear(bcy.quantize(values, "nf4", nested=True))
        compiled = torch.compile(layer, fullgraph=True, backend=count)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 2  # one for numbers that are constants, one for any


@pytest.mark.gpu(real="of torch")
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("name", ["Q4_K", "nf4"])
def test_compiled_into_a_cuda_graph(name):
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    model = torch.nn.Sequential(
        *(torch.nn.Linear(COLUMNS, COLUMNS, dtype=torch.float16, device="cuda") for _ in range(3))
    )
    packed = torch.nn.Sequential(*(Linear.from_linear(layer, name) for layer in model))
    compiled = torch.compile(packed, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(8, COLUMNS, dtype=torch.float16, device="cuda")
            assert torch.equal(compiled(x).clone(), packed(x))


def test_traced(device, weight):
    layer = Linear(weight)
    x = activations(device, 3)
    traced = make_fx(lambda x: layer(x) + 0)(torch.zeros_like(x))
    assert torch.equal(traced(x), layer(x))


def test_shapes_alone(weight):
    layer = Linear(weight).to("meta")
    y = layer(torch.ones(2, 3, COLUMNS, dtype=torch.float16, device="meta"))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, ROWS), torch.float16, "meta")


@pytest.mark.usefixtures("compiling")
def test_exported(device, weight):
    layer = Linear(weight, torch.linspace(-1, 1, ROWS, device=device)).eval()
    x = activations(device, 4)
    program = torch.export.export(layer, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), layer(x))


# ---- where torch looks at weights ----------------------------------------------------------------


def test_layers_of_a_transformer(device):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(COLUMNS, 4, 512, batch_first=True, device=device)
    layer.eval()
    x = activations(device, 2, 5)
    with torch.no_grad():
        expected = layer(x)
        layer.linear1 = Linear.from_linear(layer.linear1, "Q8_0")
        layer.linear2 = Linear.from_linear(layer.linear2, "Q8_0")
        error = torch.dist(layer(x), expected) / expected.norm()
    assert 0 < error < 0.01


def test_a_weight_stands_for_a_tensor_in_linear_alone(device, weight):
    x, bias = activations(device, 3), torch.linspace(-1, 1, ROWS, device=device)
    functional = torch.nn.functional.linear
    assert torch.equal(functional(x, weight, bias), bcy.linear(x, weight, bias))
    assert torch.equal(functional(input=x, weight=weight), bcy.linear(x, weight))
    with pytest.raises(TypeError, match=r"torch\.matmul"):
        torch.matmul(x, weight)
    with pytest.raises(bcy.InvalidProblem, match="w: expected a GgufTensor or an Nf4Tensor"):
        functional(weight, x)


def test_inside_of_torch_func():
    weight = bcy.quantize(np.eye(COLUMNS, dtype=np.float32), "Q8_0")
    x = torch.ones(3, COLUMNS)
    with pytest.raises(bcy.InvalidProblem, match="output: expected memory of torch"):
        torch.func.grad(lambda b: (bcy.linear(x, weight) * b).sum())(torch.zeros(COLUMNS))


# ---- modules -------------------------------------------------------------------------------------


def test_a_change_of_dtype_leaves_the_bytes_alone(device, weight):
    layer = Linear(weight, torch.linspace(-1, 1, ROWS, device=device))
    x = activations(device, 3)
    expected = layer(x)
    layer.to(torch.float16)
    assert layer.bias.dtype == torch.float16
    assert {array.dtype for array in layer.buffers()} == {torch.uint8}
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(layer(x.half()), bcy.linear(x.half(), weight, layer.bias.detach()))


def test_what_is_stored_is_loaded_into_the_same_memory(device, weight):
    layer = Linear(weight, torch.linspace(-1, 1, ROWS, device=device))
    x = activations(device, 3)
    expected = layer(x)
    other = copy.deepcopy(layer)
    for array in (*other.buffers(), other.bias.detach()):
        array.zero_()
    assert torch.equal(layer(x), expected)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


def test_what_is_stored_says_what_it_is(tmp_path):
    save = pytest.importorskip("safetensors.torch")
    rng = np.random.default_rng(0)
    layers = [
        Linear(bcy.quantize(rng.standard_normal((64, 512), np.float32), name, **options))
        for name, options in (
            ("Q4_0", {}),
            ("IQ4_NL", {}),
            ("nf4", {"nested": True}),
            ("nf4", {"nested": True}),
        )
    ]
    # As many bytes, of another format.
    before = layers[0].data.clone()
    with pytest.raises(RuntimeError, match=r"state_dict: expected a weight of .*Q4_0.*IQ4_NL"):
        layers[0].load_state_dict(layers[1].state_dict())
    garbage = {**layers[0].state_dict(), "_extra_state": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="got one of None"):
        layers[0].load_state_dict(garbage)
    assert torch.equal(layers[0].data, before)
    x = activations("cpu", 3).repeat(1, 2)
    expected = layers[3](x)
    layers[2](x)
    save.save_file(layers[3].state_dict(), tmp_path / "layer.safetensors")
    layers[2].load_state_dict(save.load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(layers[2](x), expected)


def test_a_pickle_holds_the_weight_once():
    layer = Linear(bcy.quantize(np.ones((256, 1024), np.float32), "Q8_0"))
    layer(torch.ones(1, 1024))
    file = io.BytesIO()
    torch.save(layer, file)
    assert file.getbuffer().nbytes < 1.2 * layer.data.numel()


@pytest.mark.gpu(real="of torch")
def test_a_layer_moves_with_its_module():
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    layer = Linear(bcy.quantize(np.eye(COLUMNS, dtype=np.float32), "nf4"), torch.ones(COLUMNS))
    x = activations("cpu", 3)
    expected = layer(x)
    layer.to("cuda")
    assert layer.weight.device.startswith("cuda")
    torch.testing.assert_close(layer(x.to("cuda")).cpu(), expected)
    layer.cpu()
    assert torch.equal(layer(x), expected)


def test_memory_that_cannot_be_written_is_copied():
    packed = bcy.quantize(np.eye(COLUMNS, dtype=np.float32), "Q8_0")
    weight = bcy.GgufTensor(packed.data.tobytes(), "Q8_0", packed.shape)
    layer = Linear(weight)
    layer.data.zero_()
    assert np.array_equal(weight.dequantize(), packed.dequantize())
    assert not layer(torch.ones(COLUMNS)).any()


def test_arrays_of_others_are_copied_where_they_cannot_be_written():
    jnp = pytest.importorskip("jax.numpy", reason="JAX is not installed")
    packed = bcy.quantize(np.eye(COLUMNS, dtype=np.float32), "Q8_0")
    weight = bcy.GgufTensor(jnp.asarray(packed.data), "Q8_0", packed.shape)
    Linear(weight).data.zero_()
    assert np.array_equal(np.asarray(weight.data), packed.data)


def test_codes_stored_as_bfloat16():
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32)
    w = bcy.quantize(values, "nf4")
    stored = w.data.view(ml_dtypes.bfloat16)
    x = activations("cpu", 3)
    expected = Linear(w)(x)
    assert torch.equal(Linear(bcy.Nf4Tensor(stored, w.absmax, w.shape))(x), expected)
    # As of a file that lies in memory as it is.
    layer = Linear(w)
    moved = torch.zeros(layer.absmax.numel() + 1, dtype=torch.uint8)[1:]
    layer.absmax = moved.copy_(layer.absmax)
    assert torch.equal(layer(x), expected)
    layer.absmax.zero_()
    assert not layer(x).any()


@pytest.mark.parametrize("name", ["Q5_K", "NF4", bcy.Codebook.FP4, bcy.GgufBlockFormat.Q6_K])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_of_a_layer(device, name, dtype):
    dense = torch.nn.Linear(COLUMNS, ROWS, dtype=dtype, device=device)
    layer = Linear.from_linear(dense, name)
    assert layer.bias is dense.bias
    values = dense.weight.detach().cpu().float()
    rounded = unpacked(bcy.quantize(dense.weight.detach().cpu(), name))
    assert torch.equal(unpacked(layer.weight), rounded)
    assert torch.dist(rounded, values) < 0.2 * values.norm()
    assert layer.weight.device.startswith(device)


def test_options_of_packing_are_passed_on():
    dense = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    layer = Linear.from_linear(dense, "nf4", block_size=128, nested=True, threads=1)
    assert layer.bias is None
    assert (layer.weight.block_size, layer.weight.nested is not None) == (128, True)
    assert repr(layer) == "Linear(in_features=256, out_features=48, bias=False, NF4)"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Linear(torch.zeros(4, 32)), "weight: expected a GgufTensor or an Nf4Tensor, got"),
        (
            lambda: Linear(bcy.quantize(np.ones((2, 4, 32), np.float32), "Q8_0")),
            r"weight: expected shape \(out_features, in_features\), got GgufTensor",
        ),
        (
            lambda: Linear(bcy.quantize(np.ones((4, 32), np.float32), "Q8_0"), torch.zeros(1, 4)),
            r"bias: expected shape \(4,\), got \(1, 4\)",
        ),
        (
            lambda: Linear(bcy.quantize(np.ones((4, 32), np.float32), "Q8_0"), [0.0] * 4),
            r"bias: expected a torch\.Tensor, got list",
        ),
        (
            lambda: Linear.from_linear(torch.nn.Linear(33, 4), "Q8_0"),
            "expected a multiple of 32",
        ),
    ],
)
def test_layers_that_there_are_not(make, match):
    with pytest.raises(bcy.InvalidProblem, match=match):
        make()


def test_activations_that_do_not_fit():
    layer = Linear(bcy.quantize(np.ones((4, 32), np.float32), "Q8_0"))
    for x in (torch.ones(3, 31), torch.ones(3, 31, requires_grad=True)):
        with pytest.raises(bcy.InvalidProblem, match=r"x: expected .*32"):
            layer(x)
