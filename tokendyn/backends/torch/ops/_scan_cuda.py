"""The cuda engine: launches of the kernels in ``_scan_cuda.cu`` (general A) and ``_scan_cuda_scalar.cu``.

No value is looked at, so that CUDA graphs can capture it.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from tokendyn.backends.cuda import _scan_cuda_layout
from tokendyn.backends.cuda._scan_cuda_layout import ARGUMENTS, PLACES
from tokendyn.backends.cuda._scan_cuda_plan import CHANNEL_RUNS, ELEMENTS, SINGLE, TOKEN_RUNS, Plan, divide
from tokendyn.backends.torch.ops._scan_operator import register

_ELEMENTS = {getattr(torch, name): number for name, number in ELEMENTS.items()}
_Arguments = ctypes.c_int64 * ARGUMENTS


def launch(
    kernels: str, name: str, variant: tuple[str, ...], threads: int, shared: int, blocks: int,
    arguments: ctypes.Array, device: torch.device,
) -> None:  # fmt: skip
    """Run a kernel on the current stream of ``device``."""
    from tokendyn.backends.torch.ops import _nvrtc

    _nvrtc.launch(_scan_cuda_layout.source(kernels), variant, name, threads, shared, blocks, arguments, device)


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """A device's multiprocessors and compute capability, the whole number."""
    if device.type == "cpu":
        return 1, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major


def states_shape(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> tuple[int, ...]:
    """Shape of the states that the forward pass keeps for the backward pass."""
    chunk, padded = _scan_cuda_layout.kept_states(A.shape[1] == 1, u.shape[2], B.shape[2])
    return u.shape[0], -(-u.shape[2] // chunk), u.shape[1], padded // 2 if _narrow(u, A) else padded


def _narrow(u: torch.Tensor, A: torch.Tensor) -> bool:
    """Whether states are kept in bfloat16, two in a word: products round them as much where u has 16 bits."""
    return A.shape[1] == 1 and u.dtype in (torch.bfloat16, torch.float16)


def _side_by_side(t: torch.Tensor, along: int, run: int) -> bool:
    """Whether ``run`` neighbours along a dimension are whole words (16 bytes or less) wherever such a run begins."""
    strides, size = t.stride(), t.element_size()
    in_word = min(run, 16 // size)
    if strides[along] != 1 or t.data_ptr() % (in_word * size):
        return False
    return not any(stride % in_word for axis, stride in enumerate(strides) if axis != along)


def _longest(runs: tuple[int, ...], along: int, *tensors: torch.Tensor) -> int:
    """The first of ``runs`` that is whole words in all tensors, or 0."""
    return next((run for run in runs if all(_side_by_side(t, along, run) for t in tensors)), 0)


def _near(t: torch.Tensor, rows: int = 96) -> torch.Tensor:
    """The tensor, such that ``rows`` rows and 128 tokens of it are within 2 GiB: with channels last where it is not."""
    return t if 4 * (rows * t.stride(-2) + 128 * t.stride(-1)) < 2**31 else t.mT.contiguous().mT


def _float(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.float().contiguous()


class _Plan(Plan):
    """A pass over tensors, whose addresses are the kernels' arguments."""

    def __init__(self, u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus, backward: bool) -> None:
        batch, channels, length = u.shape
        groups, state = B.shape[1], B.shape[2]
        sizes = batch, channels, length, groups, state
        layout = divide(A.shape[1] == 1, sizes, backward, *_gpu(u.device))
        mixed = delta.dtype != u.dtype or B.dtype != u.dtype or C.dtype != u.dtype
        narrow = _narrow(u, A)
        if mixed or (z is not None and z.dtype != u.dtype) or u.dtype not in _ELEMENTS:
            u, delta, B, C = (t.float() for t in (u, delta, B, C))
            z = None if z is None else z.float()
        u, delta, B, C = _near(u), _near(delta), _near(B, 32), _near(C, 32)
        self.u, self.delta = u, delta
        self.z = z = None if z is None else _near(z)
        self.run, matrix_run = _longest(layout.token_runs, 2, u, delta), _longest(layout.token_runs, 3, B, C)
        if self.run:
            self.owner = TOKEN_RUNS
        elif channels // groups % layout.channel_run == 0 and _longest((layout.channel_run,), 1, u, delta):
            self.owner = CHANNEL_RUNS
        else:
            self.owner = SINGLE
        gated = backward and z is not None
        options = layout.options(
            _ELEMENTS[u.dtype], gated, seq_idx is not None, self.owner, (self.run, matrix_run), narrow
        )
        self.arguments = _Arguments()
        super().__init__(sizes, layout, options, gated, softplus, bool(matrix_run))
        self.kept: list[torch.Tensor] = []  # until the launches are under way
        self.like = {"A": A, "B": B, "C": C, "D": D, "bias": bias}
        self.totals: dict[str, torch.Tensor] = {}
        self.give(
            A=_float(A), D=_float(D), bias=_float(bias),
            seq_idx=None if seq_idx is None else seq_idx.long().contiguous(),
            lengths=None if lengths is None else lengths.long().contiguous(),
        )  # fmt: skip
        self.give_activations(u=u, delta=delta, z=z)
        for name, t in (("B", B), ("C", C)):
            self.give(**{name: t})
            place = PLACES[name]
            self.arguments[place + 1 : place + 5] = t.stride()

    def give(self, **tensors: torch.Tensor | None) -> None:
        for name, t in tensors.items():
            if t is not None:
                self.arguments[PLACES[name]] = t.data_ptr()
                self.kept.append(t)

    def give_activations(self, **tensors: torch.Tensor | None) -> None:
        along, run = (2, self.run) if self.owner == TOKEN_RUNS else (1, self.layout.channel_run)
        for name, t in tensors.items():
            if t is not None:
                runs = self.owner != SINGLE and _side_by_side(t, along, run)
                place = PLACES[name]
                self.arguments[place : place + 5] = (t.data_ptr(), *t.stride(), runs)
                self.kept.append(t)

    def floats(self, name: str, *shape: int) -> torch.Tensor:
        t = torch.empty(shape, dtype=torch.float32, device=self.u.device)
        self.give(**{name: t})
        return t

    def zeros(self, name: str, count: int) -> None:
        self.give(**{name: torch.zeros(count, dtype=torch.int32, device=self.u.device)})

    def total(self, name: str, place: int) -> bool:
        like = self.like[name]
        dtype = like.dtype if like.dtype in (torch.float32, self.u.dtype) else torch.float32
        out = self.totals[name] = torch.empty(like.shape, dtype=dtype, device=like.device)
        self.arguments[place] = out.data_ptr()
        return dtype != torch.float32

    def address(self, place: int, name: str, offset: int) -> None:
        self.arguments[place] = self.arguments[PLACES[name]] + 4 * offset

    def launch(self, name: str, shared: int, blocks: int) -> None:
        layout = self.layout
        launch(layout.kernels, name, self.options, layout.threads, shared, blocks, self.arguments, self.u.device)


def forward(u, delta, A, B, C, D, z, bias, initial_state, seq_idx, lengths, softplus, return_last_state, keep_states):
    """y, the last state and the states every CHUNK tokens."""
    plan = _Plan(u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus, backward=False)
    y = torch.empty_like(plan.u)
    last = plan.floats("last_state", u.shape[0], u.shape[1], B.shape[2]) if return_last_state else None
    states = plan.floats("states", *states_shape(u, A, B)) if keep_states else None
    plan.give_activations(y=y)
    plan.give(first_state=_float(initial_state))
    plan.set(keep=int(keep_states))
    plan.outputs()
    return y.to(u.dtype), last, states


def backward(
    dy, dlast, states, u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus, initial_gradient
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, bias and the initial state."""
    plan = _Plan(u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus, backward=True)
    du, ddelta = torch.empty_like(plan.u), torch.empty_like(plan.delta)
    dz = None if plan.z is None else torch.empty_like(plan.z)
    dfirst = plan.floats("dfirst", u.shape[0], u.shape[1], B.shape[2]) if initial_gradient else None
    plan.give_activations(dy=_near(dy.to(plan.u.dtype)), du=du, ddelta=ddelta, dz=dz)
    plan.give(last_gradient=_float(dlast), states=states)
    plan.gradients(*(name for name in ("D", "bias") if plan.like[name] is not None))
    dA, dB, dC, dD, dbias = (None if t is None else plan.totals[name].to(t.dtype) for name, t in plan.like.items())
    dz = None if dz is None else dz.to(z.dtype)
    return du.to(u.dtype), ddelta.to(delta.dtype), dA, dB, dC, dD, dz, dbias, dfirst


run = register("cuda", forward, backward, states_shape)
