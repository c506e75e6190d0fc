# SPDX-License-Identifier: Apache-2.0
"""Weights as objects: parts of them, copies, pickles, devices."""

import copy
import pickle

import numpy as np
import pytest
from problems import BACKENDS, Backend, block_size, random_weight

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
