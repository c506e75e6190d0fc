# SPDX-License-Identifier: Apache-2.0
"""Arrays of libraries that do not exist: DLPack capsules and exchange tables made by hand."""

import ctypes
import gc
import time
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
    py_object,
)

from baracuda_cy.memory import live_bytes
from baracuda_cy.pending import pending

CPU, CUDA, PINNED, ROCM = 1, 2, 3, 10
READ_ONLY, IS_COPIED = 1, 2


def held(kind):
    """Bytes of "device" or "pinned" memory in use, once what is under way is done."""
    gc.collect()
    while pending():
        time.sleep(0.001)
    return live_bytes()[kind]


class DLTensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", c_void_p),
        ("strides", c_void_p),
        ("byte_offset", c_uint64),
    ]


class Legacy(Structure):
    _fields_ = [("tensor", DLTensor), ("context", c_void_p), ("deleter", c_void_p)]


class Versioned(Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("context", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("tensor", DLTensor),
    ]


# Deleters run with the GIL held, as the protocol has them.
Deleter = ctypes.PYFUNCTYPE(None, c_void_p)

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = py_object
_new_capsule.argtypes = [c_void_p, c_char_p, c_void_p]
# Capsule names are not copied: these live as long as the process.
_NAMES = {False: c_char_p(b"dltensor"), True: c_char_p(b"dltensor_versioned")}

_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}


class Account:
    """What a producer has exported, apart from it: deleters are called after it is gone."""

    def __init__(self):
        self.exported = 0
        self.deleted = 0
        self.alive = {}
        self.then = lambda: None
        self.deleter = Deleter(self.delete)
        # A library's deleter is code, which stays callable to the end of the process.
        ctypes.pythonapi.Py_IncRef(py_object(self.deleter))

    def delete(self, address):
        del self.alive[address]
        self.deleted += 1
        self.then()


class Producer:
    """A NumPy array that a library of its own exports.

    ``exported`` and ``deleted`` count tensors; what a capsule points to lives until it is deleted.
    """

    versioned = True

    def __init__(self, array, *, deleter=True, strides=True, version=(1, 1), flags=0, **fields):
        self.array = array
        self.version = version
        self.flags = flags
        self.calls = []
        self.account = Account()
        self._deleter = self.account.deleter if deleter else None
        self._strides = strides
        self._fields = {
            "data": array.ctypes.data,
            "device_type": CPU,
            "device_id": 0,
            "ndim": array.ndim,
            "code": _CODES[array.dtype.kind],
            "bits": 8 * array.itemsize,
            "lanes": 1,
            "byte_offset": 0,
        } | fields

    @property
    def exported(self):
        return self.account.exported

    @property
    def deleted(self):
        return self.account.deleted

    def tensor(self):
        """Make a DLTensor and the arrays it points to."""
        shape = (c_int64 * max(1, self.array.ndim))(*self.array.shape)
        strides = (c_int64 * max(1, self.array.ndim))(
            *(step // self.array.itemsize for step in self.array.strides)
        )
        fields = {"shape": ctypes.addressof(shape), "strides": ctypes.addressof(strides)}
        if not self._strides:
            fields["strides"] = None
        return DLTensor(**(fields | self._fields)), shape, strides

    def managed(self, versioned=None):
        """Export: the address of a managed tensor that this object now owes its consumer."""
        versioned = self.versioned if versioned is None else versioned
        tensor, *memory = self.tensor()
        deleter = ctypes.cast(self._deleter, c_void_p) if self._deleter else None
        if versioned:
            managed = Versioned(*self.version, None, deleter, self.flags, tensor)
        else:
            managed = Legacy(tensor, None, deleter)
        address = ctypes.addressof(managed)
        self.account.alive[address] = managed, memory
        self.account.exported += 1
        return address

    def __dlpack_device__(self):
        return self._fields["device_type"], self._fields["device_id"]

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        self.calls.append({"stream": stream, "max_version": max_version})
        versioned = self.versioned and max_version is not None
        return _new_capsule(self.managed(versioned), _NAMES[versioned], None)


class LegacyProducer(Producer):
    """A producer that knows max_version but still answers with legacy capsules."""

    versioned = False


class OldProducer(LegacyProducer):
    """A producer that is older than max_version."""

    def __dlpack__(self, *, stream=None):
        self.calls.append({"stream": stream})
        return _new_capsule(self.managed(False), _NAMES[False], None)


class Exchange(Structure):
    pass


FromObject = ctypes.PYFUNCTYPE(c_int, py_object, POINTER(c_void_p))
BorrowedFromObject = ctypes.PYFUNCTYPE(c_int, py_object, POINTER(DLTensor))
CurrentStream = ctypes.PYFUNCTYPE(c_int, c_int32, c_int32, POINTER(c_void_p))

Exchange._fields_ = [
    ("major", c_uint32),
    ("minor", c_uint32),
    ("previous", c_void_p),
    ("allocator", c_void_p),
    ("managed_from_object", FromObject),
    ("managed_to_object", c_void_p),
    ("borrowed_from_object", BorrowedFromObject),
    ("current_stream", CurrentStream),
]


@FromObject
def _managed_from_object(producer, out):
    producer.calls.append("managed")
    out[0] = producer.managed(True)
    return 0


@BorrowedFromObject
def _borrowed_from_object(producer, out):
    producer.calls.append("borrowed")
    out[0], *producer.memory = producer.tensor()
    return 0


@CurrentStream
def _current_stream(_device_type, _device_id, out):
    out[0] = None
    return 0


def exchange_table(*, version=(1, 3), previous=None, borrowed=True):
    """Make an exchange table, which must outlive every type that shows it."""
    return Exchange(
        *version,
        ctypes.addressof(previous) if previous is not None else None,
        None,
        _managed_from_object,
        None,
        _borrowed_from_object if borrowed else BorrowedFromObject(),
        _current_stream,
    )


_EXCHANGE_NAME = c_char_p(b"dlpack_exchange_api")


def exchange_capsule(table):
    return _new_capsule(ctypes.addressof(table), _EXCHANGE_NAME, None)
