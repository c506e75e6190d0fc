# SPDX-License-Identifier: Apache-2.0
"""NF4 and FP4 against genuine bitsandbytes on the CPU: stored files and vectors of it
(`golden/make_bitsandbytes.py`), and, where torch and bitsandbytes are installed, itself.

bitsandbytes is asked to unpack a weight as one row: on a matrix its AVX-512 path takes the wrong
absmax where the columns are no multiple of the block size.
"""

import copy
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import baracuda_cy as bcy

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CODEBOOKS = ["nf4", "fp4"]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def stored(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files if key != "versions"}


VECTORS = stored("vectors")
CHECKPOINTS = stored("checkpoints")
WEIGHTS = sorted({key.rpartition("/")[0] for key in CHECKPOINTS})


def same_values(ours, theirs, codebook="nf4"):
    """Bit for bit; FP4 has two zeros, and bitsandbytes' paths do not agree on which they give."""
    assert ours.dtype == theirs.dtype
    if codebook == "fp4":
        np.testing.assert_array_equal(ours.astype(np.float32), theirs.astype(np.float32))
    else:
        size = {2: np.int16, 4: np.int32}[ours.dtype.itemsize]
        np.testing.assert_array_equal(ours.view(size), theirs.view(size))


# ---- what was stored -----------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_codebook(codebook):
    theirs = VECTORS[f"{codebook}/codebook"].view(np.float32)
    codes = np.arange(16, dtype=np.uint8)
    w = bcy.Nf4Tensor(codes[::2] << 4 | codes[1::2], np.ones(1, np.float32), (16,), 64, codebook)
    same_values(w.dequantize(), theirs, codebook)
    if codebook == "nf4":
        same_values(np.array(bcy.NF4_CODEBOOK, np.float32), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_quantize(codebook, block_size, dtype):
    key = f"{codebook}/{block_size}/{dtype}"
    w = bcy.quantize(VECTORS[f"{key}/input"].view(DTYPES[dtype]), codebook, block_size=block_size)
    same_values(np.asarray(w.absmax), VECTORS[f"{key}/absmax"].view(np.float32))
    np.testing.assert_array_equal(np.asarray(w.data).reshape(-1), VECTORS[f"{key}/codes"])


@pytest.mark.parametrize("label", ["zero tail", "one", "two", "block"])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_quantize_few(codebook, label):
    key = f"{codebook}/{label}"
    w = bcy.quantize(VECTORS[f"{key}/input"].view(np.float32), codebook)
    same_values(np.asarray(w.absmax), VECTORS[f"{key}/absmax"].view(np.float32))
    np.testing.assert_array_equal(np.asarray(w.data).reshape(-1), VECTORS[f"{key}/codes"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_dequantize(codebook, block_size, dtype):
    key = f"{codebook}/{block_size}"
    codes = VECTORS[f"{key}/float32/codes"]
    absmax = VECTORS[f"{key}/float32/absmax"].view(np.float32)
    theirs = VECTORS[f"{key}/values/{dtype}"].view(DTYPES[dtype])
    w = bcy.Nf4Tensor(codes, absmax, theirs.shape, block_size, codebook)
    same_values(w.dequantize(dtype), theirs, codebook)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_on_the_gpu(codebook, block_size, dtype):
    key = f"{codebook}/{block_size}"
    weight = bcy.DeviceArray.from_host(VECTORS[f"{key}/{dtype}/input"].view(DTYPES[dtype]))
    w = bcy.quantize(weight, codebook, block_size=block_size)
    assert w.device == "cuda:0"
    host = w.to("cpu")
    same_values(np.asarray(host.absmax), VECTORS[f"{key}/{dtype}/absmax"].view(np.float32))
    np.testing.assert_array_equal(host.data, VECTORS[f"{key}/{dtype}/codes"])
    if dtype == "float32":
        for output, kind in DTYPES.items():
            theirs = VECTORS[f"{key}/values/{output}"].view(kind)
            same_values(bcy.dequantize(w, output).to_host(), theirs, codebook)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_nested(codebook):
    part = {
        key.removeprefix(f"{codebook}/nested/"): array
        for key, array in VECTORS.items()
        if key.startswith(f"{codebook}/nested/")
    }
    f32 = {key: array.view(np.float32) for key, array in part.items() if array.dtype == np.int32}
    weight = part["input"].view(ml_dtypes.bfloat16)
    w = bcy.quantize(weight, codebook, block_size=32, nested=True)
    assert w.nested.offset == f32["offset"].item()
    same_values(np.asarray(w.nested.code), f32["nested_code"])
    same_values(np.asarray(w.nested.absmax), f32["nested_absmax"])
    np.testing.assert_array_equal(np.asarray(w.absmax), part["absmax"])
    np.testing.assert_array_equal(np.asarray(w.data).reshape(-1), part["codes"])
    same_values(w.dequantize(), f32["values/float32"], codebook)


@pytest.fixture(scope="module")
def checkpoints():
    names = {weight.partition("/")[0] for weight in WEIGHTS}
    return {name: bcy.open_bitsandbytes(GOLDEN / name) for name in names}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_checkpoint(checkpoints, weight):
    checkpoint, _, name = weight.partition("/")
    model = checkpoints[checkpoint]
    w = model[name]
    codebook, block_size, dtype = CHECKPOINTS[f"{weight}/about"].tolist()
    assert isinstance(w, bcy.Nf4Tensor)
    assert (model.types[name], model.dtypes[name]) == (codebook.upper(), dtype)
    assert w.block_size == int(block_size)
    assert w.shape == tuple(CHECKPOINTS[f"{weight}/shape"].tolist())
    for output, kind in DTYPES.items():
        if f"{weight}/{output}" in CHECKPOINTS:
            theirs = CHECKPOINTS[f"{weight}/{output}"].view(kind).reshape(w.shape)
            same_values(w.dequantize(output), theirs, codebook)


def test_checkpoints_hold_every_weight(checkpoints):
    found = {
        f"{name}/{key}"
        for name, model in checkpoints.items()
        for key in model
        if isinstance(model[key], bcy.Nf4Tensor)
    }
    assert found == set(WEIGHTS)
    assert len(found) == 38


@pytest.mark.parametrize("weight", [it for it in WEIGHTS if it.startswith("linear4bit")])
def test_product_with_a_checkpoint(checkpoints, weight):
    checkpoint, _, name = weight.partition("/")
    w = checkpoints[checkpoint][name]
    theirs = CHECKPOINTS[f"{weight}/float32"].view(np.float32).reshape(w.shape).astype(np.float64)
    x = np.random.default_rng(0).normal(size=(5, w.ncols)).astype(np.float32)
    exact = x.astype(np.float64) @ theirs.T
    assert np.linalg.norm(bcy.linear(x, w) - exact) <= 5e-7 * np.linalg.norm(exact)


# ---- bitsandbytes itself -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live():
    """torch, and what is called of bitsandbytes."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about what they import
        pytest.importorskip("bitsandbytes")
        from bitsandbytes import functional, nn
    # What bitsandbytes compiles it would compile anew for every shape.
    torch.compiler.set_stance("force_eager")
    yield SimpleNamespace(
        torch=torch,
        dtypes={name: getattr(torch, name) for name in DTYPES},
        quantize=functional.quantize_4bit,
        dequantize=functional.dequantize_4bit,
        state=functional.QuantState,
        linear=nn.Linear4bit,
        parameter=nn.Params4bit,
    )
    torch.compiler.set_stance("default")


def as_torch(live, array):
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return live.torch.from_numpy(array.view(np.int16)).view(live.torch.bfloat16)
    return live.torch.from_numpy(array)


def as_numpy(live, tensor):
    if tensor.dtype == live.torch.bfloat16:
        return tensor.contiguous().view(live.torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def unpacked(live, codes, state, dtype):
    state = copy.copy(state)
    shape = tuple(state.shape)
    state.shape, state.dtype = live.torch.Size((1, state.shape.numel())), live.dtypes[dtype]
    return as_numpy(live, live.dequantize(codes, state)).reshape(shape)


shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 400)),
    st.tuples(st.integers(1, 3), st.integers(1, 9000)),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 100)),
)
scales = st.sampled_from([1e-39, 1e-20, 1e-4, 0.02, 1.0, 1e4])


def drawn(shape, dtype, scale, seed):
    """Weights, some of whose blocks are zero, some of whose values are very large."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, scale, shape)
    weight[rng.random(shape) < 0.01] *= 50
    flat = weight.reshape(-1)
    start = rng.integers(0, flat.size)
    flat[start : start + rng.integers(0, 200)] = 0
    return np.clip(weight, -60000, 60000).astype(DTYPES[dtype])


@settings(max_examples=200)
@given(
    shapes,
    st.sampled_from(BLOCK_SIZES),
    st.sampled_from(CODEBOOKS),
    st.sampled_from(list(DTYPES)),
    scales,
    st.integers(0, 2**32),
)
def test_live_quantize_and_dequantize(live, shape, block_size, codebook, dtype, scale, seed):
    weight = drawn(shape, dtype, scale, seed)
    ours = bcy.quantize(weight, codebook, block_size=block_size)
    codes, state = live.quantize(as_torch(live, weight), blocksize=block_size, quant_type=codebook)
    same_values(np.asarray(ours.absmax), state.absmax.numpy())
    np.testing.assert_array_equal(np.asarray(ours.data).reshape(-1), codes.numpy().reshape(-1))
    for output in DTYPES:
        values, theirs = ours.dequantize(output), unpacked(live, codes, state, output)
        if output == "bfloat16":
            # The AVX-512 instruction that bitsandbytes rounds with takes subnormals for zero.
            tiny = abs(ours.dequantize("float32")) < 2.0**-126
            values, theirs = (np.where(tiny, it * 0, it) for it in (values, theirs))
        same_values(values, theirs, codebook)


@settings(max_examples=40)  # bitsandbytes makes its table anew each time
@given(
    st.tuples(st.integers(1, 60), st.integers(1, 700)),
    st.sampled_from([32, 64]),
    st.sampled_from(CODEBOOKS),
    st.sampled_from([1e-4, 0.02, 1.0]),
    st.integers(0, 2**32),
)
def test_live_nested(live, shape, block_size, codebook, scale, seed):
    weight = drawn(shape, "float32", scale, seed)
    codes, state = live.quantize(
        as_torch(live, weight),
        blocksize=block_size,
        quant_type=codebook,
        compress_statistics=True,
    )
    tables = bcy.NestedAbsmax(
        state.state2.code.numpy(), state.state2.absmax.numpy(), state.offset.item()
    )
    theirs = bcy.Nf4Tensor(
        codes.numpy(), state.absmax.numpy(), shape, block_size, codebook, nested=tables
    )
    for output in DTYPES:
        same_values(theirs.dequantize(output), unpacked(live, codes, state, output), codebook)
    ours = bcy.quantize(weight, codebook, block_size=block_size, nested=True)
    same_values(np.asarray(ours.nested.code), state.state2.code.numpy())
    # torch sums in an order of its own: the same tables where the same mean came out.
    assert ours.nested.offset == pytest.approx(state.offset.item(), rel=1e-6)
    if ours.nested.offset == state.offset.item():
        same_values(np.asarray(ours.nested.absmax), state.state2.absmax.numpy())
        np.testing.assert_array_equal(np.asarray(ours.absmax), state.absmax.numpy())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes,
    st.sampled_from(BLOCK_SIZES),
    st.sampled_from(CODEBOOKS),
    st.booleans(),
    st.sampled_from(list(DTYPES)),
    st.integers(0, 2**32),
)
def test_live_bitsandbytes_reads_what_is_saved(
    live, tmp_path, shape, block_size, codebook, nested, dtype, seed
):
    safetensors = pytest.importorskip("safetensors.torch")
    ours = bcy.quantize(
        drawn(shape, "float32", 0.02, seed), codebook, block_size=block_size, nested=nested
    )
    path = tmp_path / "ours.safetensors"
    bcy.save_bitsandbytes(path, {"w": ours}, dtype=dtype)
    parts = safetensors.load_file(path)
    codes = parts.pop("w")
    parts = {name.removeprefix("w."): tensor for name, tensor in parts.items()}
    state = live.state.from_dict(parts, device=live.torch.device("cpu"))
    assert (tuple(state.shape), state.blocksize, state.dtype) == (
        shape,
        block_size,
        live.dtypes[dtype],
    )
    same_values(ours.dequantize(dtype), unpacked(live, codes, state, dtype), codebook)


@pytest.mark.parametrize("storage", ["uint8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_live_layer_there_and_back(live, tmp_path, codebook, nested, storage):
    """A Linear4bit saved by them is read by us, saved by us, and loaded by them."""
    safetensors = pytest.importorskip("safetensors.torch")
    torch = live.torch
    torch.manual_seed(0)

    def layer(weight):
        made = live.linear(96, 40, bias=True)
        made.weight = live.parameter(
            weight,
            quant_type=codebook,
            compress_statistics=nested,
            quant_storage=getattr(torch, storage),
            module=made,
        )
        return made.to("cpu")

    theirs = layer(torch.randn(40, 96))
    safetensors.save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    model = bcy.open_bitsandbytes(tmp_path / "theirs.safetensors")
    same_values(
        model["weight"].dequantize(),
        unpacked(live, theirs.weight.data, theirs.weight.quant_state, "float32"),
        codebook,
    )
    bcy.save_bitsandbytes(tmp_path / "ours.safetensors", model, quant_storage=storage)
    loaded = safetensors.load_file(tmp_path / "ours.safetensors")
    for name, tensor in theirs.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8)), name
    again = live.linear(96, 40, bias=True)
    again.bias.data = loaded.pop("bias")
    again.weight = live.parameter.from_prequantized(
        loaded.pop("weight"), loaded, device="cpu", module=again
    )
    x = torch.randn(3, 96)
    assert torch.equal(again(x), theirs(x))


def test_live_transformers_loads_what_is_saved(live, tmp_path):
    """A checkpoint of ours in place of theirs gives the same model."""
    torch = live.torch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        source, folder = GOLDEN / "llama_nf4", tmp_path / "model"
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
        with bcy.open_bitsandbytes(source) as model:
            bcy.save_bitsandbytes(folder / "model.safetensors", model)
        load = transformers.AutoModelForCausalLM.from_pretrained
        theirs, ours = (load(it, device_map={"": "cpu"}) for it in (source, folder))
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(name)
        assert torch.equal(parameter, other), name
        if state := getattr(other, "quant_state", None):
            same_values(
                unpacked(live, parameter.data, parameter.quant_state, "bfloat16"),
                unpacked(live, other.data, state, "bfloat16"),
            )
            assert parameter.quant_state.dtype == state.dtype
    assert sum(hasattr(it, "quant_state") for it in ours.parameters()) == 14
