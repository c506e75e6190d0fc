# SPDX-License-Identifier: Apache-2.0
"""Weights as objects: parts of them, copies, pickles, devices."""

import copy
import pickle

import numpy as np
import pytest
from problems import BACKENDS, FLOATS, Backend, block_size, random_weight

import baracuda_cy as bcy
from baracuda_cy import DeviceArray, GgufTensor, InvalidProblem, NestedAbsmax, Nf4Tensor

FORMATS = ("Q8_0", "Q4_K", "Q6_K", "Q8_K", "MXFP4")


@pytest.fixture(params=BACKENDS)
def device(request):
    return Backend(request.param).device


def experts_of(name, *shape):
    ncols = 2 * block_size(name)
    nrows = int(np.prod(shape))
    return GgufTensor(random_weight(name, nrows, ncols), name, (*shape, ncols))


def values(w):
    return w.to("cpu").dequantize()


def nf4(*shape, block_size=32, **how):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return bcy.quantize(array, "nf4", block_size=block_size, **how)


# ---- parts ---------------------------------------------------------------------------------------

INDICES = (0, -1, np.int64(3), slice(1, 4), slice(None), slice(3, 1), slice(-2, 100))


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_parts_of_experts(device, name, index):
    w = experts_of(name, 6, 4)
    there = w.to(device)
    part = there[index]
    want = values(w)[index]
    assert (part.shape, part.format, part.device) == (want.shape, w.format, there.device)
    assert part.nbytes == w.nbytes // 6 * (want.size // w[0].nrows // w.ncols)
    np.testing.assert_array_equal(values(part), want)
    if want.ndim == 3 and len(want):
        np.testing.assert_array_equal(values(part[0][1:3]), want[0][1:3])


def test_rows_are_views_of_any_length_of_data():
    w = experts_of("Q4_K", 4)
    longer = GgufTensor(np.concatenate([w.data, w.data]), "Q4_K", w.shape)
    assert np.shares_memory(longer[1:3].data, longer.data)
    np.testing.assert_array_equal(values(longer[3]), values(w)[3])
    buffer = GgufTensor(w.data.tobytes(), "Q4_K", w.shape)
    np.testing.assert_array_equal(values(buffer[3]), values(w)[3])


def test_rows_of_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    w = experts_of("Q6_K", 4)
    data = torch.from_numpy(w.data).reshape(4, -1)
    row = GgufTensor(data, "Q6_K", w.shape)[2]
    assert row.data.data_ptr() == data[2].data_ptr()
    np.testing.assert_array_equal(row.dequantize().numpy(), values(w)[2])


def test_rows_one_after_the_other():
    w = experts_of("Q8_0", 5)
    np.testing.assert_array_equal(np.stack([values(row) for row in w]), values(w))


def test_a_product_with_a_part_is_that_of_its_rows(device):
    w = experts_of("Q4_K", 3, 8)
    x = np.random.default_rng(1).standard_normal((2, w.ncols)).astype(np.float32)
    backend = Backend(device)
    whole = backend.get(bcy.linear(backend.put(x), w.to(device)))
    part = backend.get(bcy.linear(backend.put(x), w.to(device)[1]))
    np.testing.assert_array_equal(part, whole[:, 8:16])


# ---- weights joined ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_joined_experts(device, name):
    one, other = experts_of(name, 6, 4), experts_of(name, 2, 4)
    there = one.to(device)
    both = bcy.concatenate([there, other.to(device)])
    assert (both.shape, both.format, both.device) == ((8, 4, one.ncols), one.format, there.device)
    np.testing.assert_array_equal(values(both[:6]), values(one))
    np.testing.assert_array_equal(values(both[6:]), values(other))


@pytest.mark.parametrize("how", [{}, {"nested": True}, {"layout": "row_pair"}], ids=str)
def test_joined_4_bit_weights(device, how):
    how = dict(how)
    layout = how.pop("layout", "bitsandbytes")
    parts = [nf4(rows, 96, **how).to_layout(layout) for rows in (4, 2, 6)]
    there = [part.to(device) for part in parts]
    joined = bcy.concatenate(iter(there))
    assert (joined.shape, joined.device, joined.nested) == ((12, 96), there[0].device, None)
    assert (joined.layout, joined.dtype) == (parts[0].layout, parts[0].dtype)
    np.testing.assert_array_equal(values(joined), np.concatenate([values(it) for it in parts]))


def test_the_last_4_bit_weight_may_end_in_a_block():
    parts = [nf4(2, 48), nf4(1, 48)]
    joined = bcy.concatenate(parts)
    np.testing.assert_array_equal(values(joined), np.concatenate([values(it) for it in parts]))
    parts.reverse()
    with pytest.raises(InvalidProblem, match=r"weights\[0\]: expected a weight that ends with"):
        bcy.concatenate(parts)


@pytest.mark.parametrize("m", [1, 4, 20])
@pytest.mark.parametrize("make", [lambda *n: experts_of("Q4_K", *n), lambda *n: nf4(*n, 512)])
def test_a_product_with_joined_weights_is_theirs_side_by_side(device, make, m):
    parts = [make(rows).to(device) for rows in (40, 8, 8)]
    backend = Backend(device)
    x = backend.put(np.random.default_rng(1).standard_normal((m, 512)).astype(np.float16))
    apart = [backend.get(bcy.linear(x, w)) for w in parts]
    joined = bcy.linear(x, bcy.concatenate(parts))
    np.testing.assert_array_equal(backend.get(joined), np.concatenate(apart, axis=1))


def test_joined_data_is_a_copy_of_what_belongs_to_the_weight():
    w = experts_of("Q4_K", 4)
    longer = GgufTensor(np.concatenate([w.data, w.data]), "Q4_K", w.shape)
    joined = bcy.concatenate([longer])
    assert joined.data.nbytes == w.nbytes
    assert not np.shares_memory(joined.data, longer.data)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (list, "weights: expected one or more, got none"),
        (lambda: experts_of("Q4_K", 4), r"weights: expected several, got GgufTensor"),
        (lambda: 5, "weights: expected several, got int"),
        (lambda: [experts_of("Q4_K", 4), 3], r"weights\[1\]: expected a GgufTensor or an Nf4"),
        (lambda: [experts_of("Q4_K", 4)[0]], r"weights\[0\]: expected two dimensions or more"),
        (
            lambda: [experts_of("Q4_K", 4), experts_of("Q6_K", 4)],
            r"weights\[1\]: expected Q4_K, shape \(any number, 512\), on cpu, as weights\[0\]",
        ),
        (lambda: [experts_of("Q4_K", 4), experts_of("Q4_K", 4, 4)], r"weights\[1\]: expected Q4_K"),
        (lambda: [nf4(4, 64), experts_of("Q4_K", 4)], r"weights\[1\]: expected NF4, block_size=32"),
        (lambda: [nf4(4, 64), nf4(4, 64, block_size=64)], r"weights\[1\]: expected NF4, block"),
        (lambda: [nf4(4, 64), nf4(4, 64).to_layout("row_pair")], r"weights\[1\]: expected NF4"),
    ],
)
def test_weights_that_cannot_be_joined(weights, match):
    with pytest.raises(InvalidProblem, match=match):
        bcy.concatenate(weights())


@pytest.mark.parametrize("make", [lambda: experts_of("Q8_0", 4), lambda: nf4(4, 64)])
def test_parts_that_there_are_not(make):
    w = make()
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"index: expected -4 to 3, got {index}"):
            w[index]
    for index in ("a", 1.0, (0, 1), None, ..., True):
        with pytest.raises(InvalidProblem, match="index: expected an integer or a slice, got"):
            w[index]
    with pytest.raises(InvalidProblem, match="index: expected a slice of step 1"):
        w[::2]
    with pytest.raises(InvalidProblem, match="index: expected a weight of two dimensions or more"):
        w[0][0]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize(
    "how", ["plain", "nested", "row_pair", "floats", "last block is short", "crossing"]
)
def test_parts_of_4_bit_weights(device, how, index):
    w = {
        "plain": lambda: nf4(6, 2, 32),
        "nested": lambda: nf4(6, 256, 64, block_size=64, nested=True),
        "row_pair": lambda: nf4(6, 4, 7).to_layout("row_pair"),
        "floats": lambda: nf4(6, 64),
        "last block is short": lambda: nf4(6, 48, block_size=64),
        "crossing": lambda: nf4(6, 5, 7),
    }[how]()
    if how == "floats":
        w = Nf4Tensor(w.data.view(np.float32), w.absmax, w.shape, w.block_size, dtype="f16")
    want, there = values(w)[index], w.to(device)
    unit = {"last block is short": 64 * 48 // 48, "crossing": 32}.get(how)
    places = np.arange(w.nrows * w.ncols).reshape(w.shape)[index]
    if unit and want.size:
        first, last = places.min(), places.max() + 1
        if first % unit or (last % unit and last != w.nrows * w.ncols):
            with pytest.raises(InvalidProblem, match=f"multiples of {unit} elements, got elements"):
                there[index]
            return
    part = there[index]
    assert (part.shape, part.layout, part.device) == (want.shape, w.layout, there.device)
    assert (part.block_size, part.dtype) == (w.block_size, w.dtype)
    np.testing.assert_array_equal(values(part), want)


def test_parts_of_nested_scales_end_with_theirs():
    w = nf4(8, 1024, block_size=64, nested=True)  # 16 of 256 scales in a row
    with pytest.raises(InvalidProblem, match=r"multiples of 16384 elements, .* unnest\(\)"):
        w[1]
    np.testing.assert_array_equal(values(w.unnest()[1]), values(w)[1])


def test_odd_rows_of_pairs_are_no_part():
    w = nf4(6, 64).to_layout("row_pair")
    with pytest.raises(InvalidProblem, match="multiples of 128 elements"):
        w[1:3]
    np.testing.assert_array_equal(values(w[2:4]), values(w)[2:4])


def test_data_that_cannot_be_sliced():
    class Whole:
        def __init__(self, array):
            self.array = array

        def __dlpack_device__(self):
            return 1, 0

        def __dlpack__(self, **arguments):
            if "max_version" not in arguments:
                raise BufferError("no")
            return self.array.__dlpack__(max_version=(1, 0))

    w = experts_of("Q8_0", 4)
    np.testing.assert_array_equal(
        values(GgufTensor(Whole(w.data), "Q8_0", w.shape)[1]), values(w)[1]
    )

    class Closed(Whole):
        opened = 0

        def __dlpack__(self, **arguments):
            self.opened += 1
            if self.opened > 1:
                raise BufferError("no")
            return super().__dlpack__(**arguments)

    closed = GgufTensor(Closed(w.data), "Q8_0", w.shape)
    with pytest.raises(
        InvalidProblem, match=r"^data: expected an array that can be sliced, got .*C"
    ):
        closed[1]


# ---- copies and pickles --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: experts_of("Q8_0", 4), lambda: nf4(4, 64, nested=True)])
def test_a_copy_stays_where_the_weight_is(device, make):
    w = make().to(device)
    things = [w, w.plan()] + ([w.nested] if isinstance(w, Nf4Tensor) else [])
    for thing in things:
        assert copy.copy(thing) is thing
        assert copy.deepcopy([thing])[0] is thing


@pytest.mark.gpu
def test_a_weight_in_pinned_memory_is_copied():
    w = experts_of("Q8_0", 4)
    pinned = bcy.PinnedBuffer(w.nbytes)
    np.frombuffer(pinned, np.uint8)[:] = w.data
    lent = GgufTensor(pinned, "Q8_0", w.shape)
    assert copy.deepcopy(lent) is lent
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(lent)).data, w.data)


def test_a_pickle_is_as_long_as_the_weight():
    w = experts_of("Q8_0", 4)
    longer = GgufTensor(np.concatenate([w.data, np.zeros(10**6, np.uint8)]), "Q8_0", w.shape)
    assert len(pickle.dumps(longer)) < w.nbytes + 1000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(longer)).dequantize(), values(w))


def test_a_pickle_of_a_part_of_a_torch_tensor_is_that_part():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    w, n = experts_of("Q8_0", 4), nf4(4, 64, nested=True)
    room = torch.zeros(10**6, dtype=torch.uint8)
    packed, codes = room[: w.nbytes], room[w.nbytes : w.nbytes + 128]
    packed.copy_(torch.from_numpy(w.data))
    codes.copy_(torch.from_numpy(n.data))
    for weight, want in (
        (GgufTensor(packed, "Q8_0", w.shape), w),
        (Nf4Tensor(codes, n.absmax, n.shape, n.block_size, nested=n.nested), n),
    ):
        pickled = pickle.dumps(weight)
        assert len(pickled) < want.nbytes + 1000
        np.testing.assert_array_equal(pickle.loads(pickled).dequantize(), values(want))


# ---- the type a weight had -----------------------------------------------------------------------


def test_the_type_before_packing_is_kept(device):
    w = nf4(4, 64, nested=True)
    assert w.dtype is bcy.ElementKind.F32
    assert Nf4Tensor(w.data, w.absmax, w.shape, 32, nested=w.nested).dtype is None
    w = Nf4Tensor(w.data, w.absmax, w.shape, 32, nested=w.nested, dtype="bfloat16").to(device)
    for other in (
        w,
        w.to("cpu"),
        w.unnest(),
        w.to_layout("row_pair"),
        w.unnest()[1:3],
        copy.copy(w),
        pickle.loads(pickle.dumps(w)),
    ):
        assert other.dtype is bcy.ElementKind.BF16
    assert w.plan().descriptor == nf4(4, 64, nested=True).plan().descriptor


@pytest.mark.parametrize("dtype", ["float64", "uint8"])
def test_a_type_that_no_weight_had(dtype):
    w = nf4(4, 64)
    with pytest.raises(InvalidProblem, match=f"dtype: expected float16, .* got {dtype}; choose"):
        Nf4Tensor(w.data, w.absmax, w.shape, 32, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_type_that_is_packed_is_known(device, dtype):
    array = np.ones((4, 64), FLOATS[dtype])
    if device != "cpu":
        array = bcy.DeviceArray.from_host(array)
    assert bcy.quantize(array, "nf4").dtype is bcy.ElementKind.of(dtype)


def test_an_enum_is_no_ordinal():
    with pytest.raises(InvalidProblem, match=r"device: expected .* an ordinal"):
        nf4(4, 64).to(bcy.Nf4Layout.BITSANDBYTES)


@pytest.mark.parametrize("index", [slice(None, None, 0), slice("a", None), slice(0, 1.5)])
def test_slices_that_are_none(index):
    with pytest.raises(InvalidProblem, match="index: expected a slice of"):
        nf4(4, 64)[index]


# ---- plans and dequantize ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: experts_of("Q8_0", 4), lambda: nf4(4, 64)])
def test_plans_of_all_weights_are_asked_for_alike(make):
    def types(plan):
        descriptor = getattr(plan.descriptor, "base", plan.descriptor)
        return descriptor.activation.dtype, descriptor.output.dtype

    w = make()
    assert types(w.plan()) == ("float32", "float32")
    assert types(w.plan(2, "bfloat16", bias=True)) == ("bfloat16", "bfloat16")
    assert types(w.plan(2, "float16", "float32", bcy.PlanPreference())) == ("float16", "float32")
    with pytest.raises(InvalidProblem, match="bias: expected True or False, got 1"):
        w.plan(bias=1)


@pytest.mark.parametrize("make", [lambda: experts_of("Q8_0", 4), lambda: nf4(4, 64)])
def test_dequantize_takes_what_the_function_takes(make):
    w = make()
    out = np.empty(w.shape, np.float16)
    assert w.dequantize(out=out) is out
    np.testing.assert_array_equal(out, bcy.dequantize(w, "float16"))
    preference = bcy.PlanPreference(threads=1)
    np.testing.assert_array_equal(w.dequantize(preference=preference), bcy.dequantize(w))
    with pytest.raises(InvalidProblem, match="stream: expected None on the CPU"):
        w.dequantize(stream=bcy.LEGACY_DEFAULT_STREAM)


# ---- devices -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_devices_by_number():
    array = DeviceArray.empty((3,), "float32")
    w, n = experts_of("Q8_0", 4), nf4(4, 64, nested=True)
    for ordinal in (0, np.int64(0), array.device):
        assert w.to(ordinal).device == n.to(ordinal).device == "cuda:0"
        assert n.nested.to(ordinal).device == "cuda:0"
        assert type(w.plan()).select(ordinal, w.plan().descriptor).device == "cuda:0"
    with pytest.raises(InvalidProblem, match="device: expected an ordinal from 0 to"):
        w.to(1000)
    with pytest.raises(InvalidProblem, match=r"device: expected .* an ordinal .* got -1"):
        w.to(-1)


# ---- what was never made -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GgufTensor, Nf4Tensor, NestedAbsmax])
def test_a_repr_says_that_nothing_was_made(kind):
    assert repr(kind.__new__(kind)) == f"{kind.__name__}(empty)"


@pytest.mark.parametrize("make", [lambda: experts_of("Q8_0", 4), lambda: nf4(4, 64)])
def test_a_weight_that_was_never_made_is_refused(make):
    w = make()
    empty = type(w).__new__(type(w))
    x, y = np.zeros((1, w.ncols), np.float32), np.empty((1, w.nrows), np.float32)
    given = rf"got {type(w).__name__}\(empty\)"
    for use in (
        lambda: bcy.linear(x, empty),
        lambda: bcy.dequantize(empty),
        lambda: w.plan().run(empty, x, y),
    ):
        with pytest.raises(InvalidProblem, match=given):
            use()
