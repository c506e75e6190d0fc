# SPDX-License-Identifier: Apache-2.0
"""The exceptions this package raises.

Each derives from `BaracudaError` and from the built-in exception a caller would expect. A message
names what was wrong, what was expected, what was given and what to do about it.
"""


class BaracudaError(Exception):
    """Base of every error this package raises."""


class InvalidProblem(BaracudaError, ValueError):
    """Arguments that do not describe a problem: a dtype, shape, stride or device does not fit."""


class NotAnArray(InvalidProblem, TypeError):
    """An object that offers none of the array protocols."""


class ReadOnlyArray(InvalidProblem, BufferError):
    """An output that cannot be written: a read-only buffer or an immutable array."""


class Unsupported(BaracudaError, NotImplementedError):
    """A well-formed problem that this build or this machine cannot run."""


class WorkspaceTooSmall(InvalidProblem):
    """The lent workspace is smaller than the plan needs.

    Parameters
    ----------
    needed, got : int
        Bytes.
    """

    def __init__(self, needed: int, got: int) -> None:
        super().__init__(
            f"workspace: expected at least {needed} bytes, got {got}; "
            "lend Workspace(plan.workspace_size, device=...) or a larger array"
        )
        self.needed = needed
        self.got = got

    def __reduce__(self) -> tuple[type, tuple[int, int]]:
        return type(self), (self.needed, self.got)


class CudaError(BaracudaError, RuntimeError):
    """A CUDA call failed.

    Parameters
    ----------
    code : int
        The ``cudaError_t``.
    name : str
        Its name, such as ``cudaErrorInvalidValue``.
    message : str, optional
        What was being done and what to do about it.
    """

    def __init__(self, code: int, name: str, message: str = "") -> None:
        super().__init__(f"{name} ({code}): {message}" if message else f"{name} ({code})")
        self.code = code
        self.name = name
        self.message = message

    def __reduce__(self) -> tuple[type, tuple[int, str, str]]:
        return type(self), (self.code, self.name, self.message)


class OutOfMemory(CudaError, MemoryError):
    """The device or the host could not provide the memory that was asked for.

    Where it is the host's, and not CUDA's to give, `code` is negative: the native code's own.
    """


class FileFormatError(BaracudaError, ValueError):
    """A file that is truncated, corrupt or not of the format its reader expects."""
