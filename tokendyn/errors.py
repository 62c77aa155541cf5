"""The errors of tokendyn.

Every message says what was given, what was expected and what to do about it. The classes derive from
the built-in exception a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

__all__ = [
    "BackendBroken",
    "BackendError",
    "BackendMissing",
    "BackendUnknown",
    "CausalityError",
    "CheckpointError",
    "DTypeError",
    "DataError",
    "EngineError",
    "NonFiniteError",
    "NotImplementedForBackend",
    "OptionError",
    "RegimeError",
    "ShapeError",
    "TokendynError",
]


class TokendynError(Exception):
    """Base class of every error raised on purpose by tokendyn."""


class ShapeError(TokendynError, ValueError):
    """An array has the wrong shape, or the shapes of two arrays contradict each other."""


class DTypeError(TokendynError, TypeError):
    """An array has the wrong dtype, is of the wrong kind, or kinds are mixed in one call."""


class OptionError(TokendynError, ValueError):
    """An option has a value that is not among its choices."""


class NonFiniteError(TokendynError, ValueError):
    """A value is NaN or infinite where a finite one is needed."""


class RegimeError(TokendynError, ValueError):
    """A spectrum regime (free, positive, negative, mixed) cannot be had as asked."""


class CausalityError(TokendynError, ValueError):
    """A model whose outputs see later tokens is used where none may."""


class DataError(TokendynError, ValueError):
    """A data set, file or folder cannot be used as given."""


class CheckpointError(TokendynError, ValueError):
    """A checkpoint or run folder is damaged, of an unsafe format, or does not belong to this run."""


class EngineError(TokendynError, RuntimeError):
    """The engine asked for cannot take this call; the message says why."""


class BackendError(TokendynError):
    """Base class of the errors about choosing a backend."""


class BackendUnknown(BackendError, ValueError):
    """No backend has this name."""


class BackendMissing(BackendError, ImportError):
    """The backend's package is not installed."""


class BackendBroken(BackendError, ImportError):
    """The backend's package is installed but cannot be imported; the cause is chained."""


class NotImplementedForBackend(BackendError, TypeError):
    """The backend exists, but this operation or layer is not implemented on it."""
