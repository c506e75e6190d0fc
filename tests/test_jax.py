# SPDX-License-Identifier: Apache-2.0
"""Packed weights in JAX's transformations: the bits of `linear`, gradients, batches, bad input."""

import numpy as np
import pytest

import baracuda_cy as bcy
from baracuda_cy import _cpu, _cuda

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402

from baracuda_cy.jax import Weight, dequantize, linear  # noqa: E402

ROWS, COLUMNS = 48, 256
PACKED = {
    "Q4_K": {},
    "Q8_0": {},
    "nf4": {},
    "fp4": {"nested": True, "block_size": 128},
    "row_pair": {},
}
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu(real="of JAX"))])
def device(request):
    if request.param == "cuda" and jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU")
    kind = "gpu" if request.param == "cuda" else "cpu"
    with jax.default_device(jax.devices(kind)[0]):
        yield request.param


def packed(name, device, seed=0, rows=ROWS):
    values = np.random.default_rng(seed).standard_normal((rows, COLUMNS), np.float32)
    if name == "row_pair":
        return bcy.quantize(values, "nf4").to_layout("row_pair").to(device)
    return bcy.quantize(values, name, **PACKED.get(name, {})).to(device)


@pytest.fixture(params=PACKED)
def weight(request, device):
    return packed(request.param, device)


def activations(*shape, dtype="float32", seed=1):
    return jax.random.normal(jax.random.key(seed), (*shape, COLUMNS)).astype(dtype)


def unpacked(weight):
    return weight.to("cpu").dequantize()


def same(one, other):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 5), (0,), (3, 20)])
def test_compiled_as_outside(weight, shape, dtype):
    x, bias = activations(*shape, dtype=dtype), jnp.linspace(-1, 1, ROWS)
    w = Weight(weight)
    same(jax.jit(linear)(x, w), bcy.linear(x, weight))
    expected = bcy.linear(x, weight, bias.astype(dtype))
    same(jax.jit(linear)(x, w, bias), expected)
    same(linear(x, w, bias), expected)


def test_among_other_operations(weight):
    w, x = Weight(weight), activations(5)

    @jax.jit
    def both(x, w):
        return jnp.tanh(linear(x * 2, w)) + linear(x.astype(jnp.float16), w)

    expected = jnp.tanh(bcy.linear(x * 2, weight)) + bcy.linear(x.astype(jnp.float16), weight)
    np.testing.assert_allclose(both(x, w), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "preference",
    [
        bcy.PlanPreference(activations="float"),
        bcy.PlanPreference(bit_stable_across_hardware=True),
        bcy.PlanPreference(overlap=True),
        bcy.PlanPreference(threads=1),
    ],
    ids=str,
)
def test_preferences(weight, preference):
    x = activations(3, dtype="float16")
    compiled = jax.jit(lambda x, w: linear(x, w, preference=preference))
    same(compiled(x, Weight(weight)), bcy.linear(x, weight, preference=preference))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacked(weight, dtype):
    expected = bcy.dequantize(weight.to("cpu"), dtype)
    same(dequantize(Weight(weight), dtype), np.asarray(expected))
    same(jax.jit(dequantize, static_argnums=1)(Weight(weight), dtype), np.asarray(expected))


def test_experts(device):
    values = np.random.default_rng(0).standard_normal((2, 3, 4, 32), np.float32)
    experts = bcy.quantize(values, "Q8_0").to(device)
    assert dequantize(Weight(experts)).shape == (2, 3, 4, 32)
    assert linear(jnp.ones((5, 32)), Weight(experts)).shape == (5, 24)
    same(linear(jnp.ones(32), Weight(experts[1])), bcy.linear(jnp.ones(32), experts[1]))


# ---- transformations -----------------------------------------------------------------------------


def test_gradients_are_those_of_the_unpacked_weight(weight):
    w, x, toward = Weight(weight), activations(2, 5), activations(2, 5, seed=3)[..., :ROWS]

    @jax.jit
    def loss(x, bias, w):
        return (linear(x, w, bias) * toward).sum()

    of_x, of_bias = jax.grad(loss, (0, 1))(x, jnp.zeros(ROWS), w)
    exact = np.asarray(toward, np.float64) @ unpacked(weight).astype(np.float64)
    np.testing.assert_allclose(of_x, exact, rtol=1e-2, atol=1e-2)
    error = np.linalg.norm(of_x - exact) / np.linalg.norm(exact)
    assert error < 1e-3  # GPUs may multiply float32 by tensor cores, of 10 bits
    np.testing.assert_allclose(of_bias, toward.sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_leaves_have_no_gradient(weight):
    w = Weight(weight)
    of_w = jax.grad(lambda w: linear(activations(2), w).sum(), allow_int=True)(w)
    assert {leaf.dtype for leaf in jax.tree.leaves(of_w)} == {jax.dtypes.float0}
    assert [leaf.shape for leaf in jax.tree.leaves(of_w)] == [leaf.shape for leaf in w.arrays]


def test_batches(weight):
    w, x, bias = Weight(weight), activations(4, 3), jnp.linspace(-1, 1, ROWS)
    expected = bcy.linear(x, weight, bias)
    same(jax.vmap(linear, in_axes=(0, None, None))(x, w, bias), expected)
    same(jax.jit(jax.vmap(linear, in_axes=(1, None, None), out_axes=1))(x, w, bias), expected)
    same(jax.vmap(jax.vmap(lambda x: linear(x, w, bias)))(x), expected)
    # One product, whatever the size of the batch.
    text = str(jax.make_jaxpr(jax.vmap(lambda x: linear(x, w)))(x))
    assert text.count("ffi_call[") == 1
    assert "while" not in text


def test_batches_of_nothing(weight):
    w = Weight(weight)
    assert jax.vmap(lambda x: linear(x, w))(jnp.ones((0, 3, COLUMNS))).shape == (0, 3, ROWS)
    none = Weight(bcy.GgufTensor(np.zeros(0, np.uint8), "Q8_0", (0, COLUMNS)))
    assert jax.vmap(lambda x: linear(x, none))(jnp.ones((2, 3, COLUMNS))).shape == (2, 3, 0)
    grad = jax.grad(lambda x: linear(x, none, jnp.ones(0)).sum())(jnp.ones((2, COLUMNS)))
    assert not grad.any()


@pytest.mark.parametrize("name", ["Q4_K", "nf4", "fp4"])
def test_stacked_weights(device, name):
    weights = [packed(name, device, seed) for seed in range(3)]
    x, biases = activations(2), jnp.arange(3.0 * ROWS).reshape(3, ROWS)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(Weight, weights))
    expected = jnp.stack([bcy.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)])
    same(jax.vmap(linear, in_axes=(None, 0, 0))(x, stacked, biases), expected)

    def step(carried, layer):
        return carried, linear(x, *layer)

    same(jax.jit(lambda s, b: jax.lax.scan(step, 0, (s, b))[1])(stacked, biases), expected)
    gradient = jax.grad(lambda x: jax.vmap(linear, in_axes=(None, 0))(x, stacked).sum())(x)
    exact = np.ones((2, ROWS)) @ sum(unpacked(w).astype(np.float64) for w in weights)
    assert np.linalg.norm(gradient - exact) / np.linalg.norm(exact) < 1e-3


def test_weights_alike_share_a_program(device):
    traces = []

    @jax.jit
    def product(x, w):
        traces.append(1)
        return linear(x, w)

    for name in ("Q4_K", "fp4"):
        traces.clear()
        for seed in range(3):
            product(activations(2), Weight(packed(name, device, seed)))
        assert len(traces) == 1


# ---- weights -------------------------------------------------------------------------------------


def test_a_weight_is_a_pytree_of_bytes(weight):
    w = Weight(weight)
    leaves, tree = jax.tree.flatten(w)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("uint8")}
    assert sum(leaf.nbytes for leaf in leaves) == getattr(weight, "unnest", lambda: weight)().nbytes
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(w)]
    assert paths == [".data", ".absmax"][: len(leaves)]
    again = jax.tree.unflatten(tree, leaves)
    assert repr(again) == repr(w)
    assert again.shape == weight.shape
    jax.tree.map(lambda leaf: None, w)  # any objects may stand for the leaves


@pytest.mark.parametrize(
    "change",
    [
        lambda leaf: jnp.stack([leaf, leaf]),
        lambda leaf: leaf[:16],
        lambda leaf: leaf.astype(jnp.bfloat16),
    ],
)
def test_leaves_that_are_not_the_weights_are_refused(weight, change):
    w = jax.tree.map(change, Weight(weight))
    for call in (lambda w: linear(activations(2), w), dequantize):
        with pytest.raises(bcy.InvalidProblem, match="w: expected leaves uint8"):
            jax.jit(call)(w)


def test_programs_belong_to_a_backend(device, weight):
    text = jax.jit(linear).lower(activations(2), Weight(weight)).as_text()
    assert f"baracuda_cy.{bcy.__version__}.{device}." in text


def test_codes_of_jax_are_shared(device):
    w = packed("nf4", device)
    data = jax.device_put(jnp.asarray(w.to("cpu").data), jax.local_devices(backend=device)[0])
    over = bcy.Nf4Tensor(data, w.absmax, w.shape)
    assert Weight(over).arrays[0].unsafe_buffer_pointer() == data.unsafe_buffer_pointer()


def test_longer_data_is_cut_to_the_weight():
    w = bcy.quantize(np.eye(32, dtype=np.float32), "Q8_0")
    longer = bcy.GgufTensor(np.concatenate([w.data, w.data]), "Q8_0", w.shape)
    assert Weight(longer).arrays[0].nbytes == w.nbytes


def test_weights_over_arrays_of_jax(device):
    w = packed("nf4", device)
    over = bcy.Nf4Tensor(jnp.from_dlpack(w.data), jnp.from_dlpack(w.absmax), w.shape)
    same(linear(activations(2), Weight(over)), bcy.linear(activations(2), w))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda w: linear(jnp.ones((2, 255)), w),
            r"x: expected shape \[..., 256\], got \[2, 255\]",
        ),
        (lambda w: linear(1.0, w), r"x: expected shape \[..., 256\], got \[\]"),
        (lambda w: linear(jnp.ones((2, 256), jnp.int32), w), "x: expected float32, float16 or bfl"),
        (
            lambda w: linear(jnp.ones(256), w, jnp.ones((1, 48))),
            r"bias: expected shape \[48\], got",
        ),
        (lambda w: linear(jnp.ones(256), w, preference="float"), "preference: expected a PlanPref"),
        (lambda w: linear(jnp.ones(256), packed("Q4_K", "cpu")), "w: expected a Weight, got Gguf"),
        (lambda w: dequantize(w, "int8"), "dtype: expected float32, float16 or bfloat16, got int8"),
        (lambda w: dequantize(w, "nonsense"), "dtype: expected"),
        (lambda w: Weight(np.ones((4, 32))), "weight: expected a GgufTensor or an Nf4Tensor, got"),
    ],
)
def test_calls_that_do_not_fit(call, match):
    w = Weight(packed("Q4_K", "cpu"))
    with pytest.raises(bcy.InvalidProblem, match=match):
        call(w)
    with pytest.raises(bcy.InvalidProblem, match=match):
        jax.jit(lambda: call(w))()


def test_arguments_of_another_problem_are_refused():
    """A handler trusts neither the size of its arguments nor the number of its buffers."""
    from baracuda_cy._xla import call_of
    from baracuda_cy.jax import _target

    plan = bcy.quantize(np.eye(32, dtype=np.float32), "Q8_0").plan(m=1)
    operation, problem = call_of(plan, False)
    y = jax.ShapeDtypeStruct((1, 32), jnp.float32)
    inputs = [jnp.zeros(32 * 34, jnp.uint8), jnp.ones((1, 32))]
    for attributes, given in (
        ({"problem": np.frombuffer(problem[:-1], np.uint8)}, inputs),
        ({"problem": 1}, inputs),
        ({}, inputs),
        ({"problem": np.frombuffer(problem, np.uint8)}, inputs),  # without the workspace
        ({"problem": np.frombuffer(problem, np.uint8)}, inputs[:1]),
    ):
        call = jax.ffi.ffi_call(_target("cpu", operation), y)
        with pytest.raises(jax.errors.JaxRuntimeError, match="trace the program again"):
            call(*given, **attributes).block_until_ready()


def test_handlers_of_both_backends():
    assert _cpu.xla_handler("gguf_matmul") is not None
    assert _cpu.xla_handler("anything") is None
    assert (_cuda.xla_handler("nf4_matmul") is None) == (not _cuda.built())
    assert _cuda.xla_handler("anything") is None
