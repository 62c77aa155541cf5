"""CUDA kernels on XLA's buffers and stream: a handler of XLA's foreign function interface, written in Python.

A call is described when it is traced (:class:`Call`) and travels in the compiled program as text. XLA hands the handler
the addresses of the buffers; it puts them where the description says and launches. Only C structures are read that
XLA keeps stable (``xla/ffi/api/c_api.h``, which jaxlib brings), so nothing has to be built.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

TARGET = "tokendyn_cuda"
_EXECUTE, _METADATA, _INTERNAL_ERROR = 3, 1, 13


class _Version(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    ]


class _Metadata(ctypes.Structure):
    """What XLA asks of a handler once: the version of the interface it was written for."""

    _fields_ = [("size", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32)]


class _Extension(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),
    ]


class _ErrorArguments(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    ]


class _StreamArguments(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    ]


class _Api(ctypes.Structure):
    """The first of XLA's functions."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("version", _Version),
        ("internal", ctypes.c_void_p),
        ("error_create", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorArguments))),
        ("error_message", ctypes.c_void_p),
        ("error_destroy", ctypes.c_void_p),
        ("register", ctypes.c_void_p),
        ("stream_get", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_StreamArguments))),
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
    ]


class _Buffers(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("each", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    ]

    def addresses(self) -> list[int]:
        return [self.each[i].contents.data or 0 for i in range(self.count)]


class _Text(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _Attributes(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("each", ctypes.POINTER(ctypes.POINTER(_Text))),
    ]


class _Frame(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("inputs", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    ]


@dataclass
class Call:
    """Kernels of one source, launched one after the other on the same structure of 64-bit integers.

    Attributes:
        kernels: the source's name.
        arguments: the structure.
        pointers: (place in it, buffer, offset in bytes); buffers are numbered, inputs before results.
        launches: (kernel, compiler's options, threads, bytes of shared memory, blocks).
    """

    kernels: str
    arguments: list[int]
    pointers: list[tuple[int, int, int]] = field(default_factory=list)
    launches: list[tuple[str, tuple[str, ...], int, int, int]] = field(default_factory=list)

    def __call__(
        self, inputs: list[jax.Array], results: list[jax.ShapeDtypeStruct], zeroed: Mapping[int, int]
    ) -> list[jax.Array]:
        """The results; ``zeroed`` maps inputs of zeros to the results that lie in their place."""
        text = json.dumps([self.kernels, self.arguments, self.pointers, self.launches], separators=(",", ":"))
        call = jax.ffi.ffi_call(TARGET, results, vmap_method="sequential", input_output_aliases=dict(zeroed))
        return list(call(*inputs, call=text))


@functools.lru_cache(maxsize=4096)
def _read(text: bytes) -> tuple[str, Any, list[list[int]], list[Any]]:
    kernels, arguments, pointers, launches = json.loads(text)
    for launch in launches:
        launch[1] = tuple(launch[1])
    return kernels, (ctypes.c_int64 * len(arguments))(*arguments), pointers, launches


def stream_of(frame: _Frame) -> int:
    """The CUDA stream that XLA wants the work on."""
    arguments = _StreamArguments(ctypes.sizeof(_StreamArguments), None, frame.context, None)
    if frame.api.contents.stream_get(ctypes.byref(arguments)):
        raise RuntimeError("XLA has no stream for this call")
    return arguments.stream or 0


def launch(*given: Any) -> None:
    """Run a kernel: see :func:`._cuda_kernels.launch`, whose imports need a GPU's packages."""
    from tokendyn.backends.jax.ops import _cuda_kernels

    _cuda_kernels.launch(*given)


def _run(frame: _Frame) -> None:
    text = frame.attributes.each[0].contents
    kernels, template, pointers, launches = _read(ctypes.string_at(text.data, text.length))
    addresses = frame.inputs.addresses() + frame.results.addresses()
    arguments = type(template).from_buffer_copy(template)
    for place, buffer, offset in pointers:
        arguments[place] = addresses[buffer] + offset
    stream = stream_of(frame)
    for name, options, threads, shared, blocks in launches:
        launch(kernels, name, options, threads, shared, blocks, arguments, stream)


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Frame))
def _handle(pointer: Any) -> Any:
    frame = pointer.contents
    if frame.extension:
        version = frame.extension.contents.metadata.contents.version
        if frame.extension.contents.type == _METADATA:
            known = frame.api.contents.version if frame.api else _Version(major=0, minor=3)
            version.major, version.minor = known.major, known.minor
        return None
    if frame.stage != _EXECUTE:
        return None
    try:
        _run(frame)
    except Exception as error:  # XLA raises it where the result is waited for
        message = f"{type(error).__name__}: {error}".encode()
        given = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, message, _INTERNAL_ERROR)
        return frame.api.contents.error_create(ctypes.byref(given))
    return None


def register(platform: str) -> None:
    """Tell XLA who handles calls on a platform."""
    handler = jax.ffi.pycapsule(ctypes.cast(_handle, ctypes.c_void_p).value)
    jax.ffi.register_ffi_target(TARGET, handler, platform=platform)


register("CUDA")


def wide(v: jax.Array) -> jax.Array:
    """Integers as 64 bits: (..., 2) of 32 bits, the lower half first. JAX itself has none unless told to."""
    v = v.astype(jnp.int32)
    return jnp.stack([v, v >> 31], -1)
