# type: ignore  # triton.jit hides from type checkers what kernels are
"""The triton engine of the single step: one launch that reads the state once and writes it once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tokendyn.backends.torch.ops._scan_triton_tiles import LOG2E, sigmoid, softplus

#: Entries of the state a program (one warp): sixteen a lane, so four 16-byte loads of float32 under way together.
ENTRIES = 512


@triton.jit
def step_kernel(
    state, x, dt, A, B, C, D, z, bias, y, new_state,
    state_b, state_d, state_n, x_b, x_d, dt_b, dt_d, A_d, A_n, B_b, B_g, B_n, C_b, C_g, C_n, z_b, z_d,
    channels, group_size, size, blocks,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS channels of one batch entry. y and new_state are contiguous, everything else has strides."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, WIDTH)
    exists = rows < channels
    inside = exists[:, None] & (n < size)[None, :]
    group = rows // group_size

    at = state + batch * state_b + rows.to(tl.int64)[:, None] * state_d + n[None, :] * state_n
    h = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    rate = tl.load(A + rows[:, None] * A_d + n[None, :] * A_n, mask=inside, other=0.0).to(tl.float32)
    B_at = B + batch * B_b + group[:, None] * B_g + n[None, :] * B_n
    C_at = C + batch * C_b + group[:, None] * C_g + n[None, :] * C_n
    B_tile = tl.load(B_at, mask=inside, other=0.0).to(tl.float32)
    C_tile = tl.load(C_at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(x + batch * x_b + rows * x_d, mask=exists, other=0.0).to(tl.float32)
    step = tl.load(dt + batch * dt_b + rows * dt_d, mask=exists, other=0.0).to(tl.float32)
    if bias is not None:
        step += tl.load(bias + rows, mask=exists, other=0.0).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)

    h = tl.exp2(step[:, None] * (rate * LOG2E)) * h + (step * u)[:, None] * B_tile
    out = tl.sum(h * C_tile, axis=1)
    if D is not None:
        out += tl.load(D + rows, mask=exists, other=0.0).to(tl.float32) * u
    if z is not None:
        gate = tl.load(z + batch * z_b + rows * z_d, mask=exists, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    row = batch * channels + rows
    tl.store(y + row, out.to(y.dtype.element_ty), mask=exists)
    tl.store(new_state + row[:, None] * size + n[None, :], h.to(new_state.dtype.element_ty), mask=inside)


def launch(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus: bool):
    """y and the new state; A is (d, N) or (d, 1), B and C are (b, G, N)."""
    batch, channels, size = state.shape
    y, new_state = x.new_empty(x.shape), state.new_empty(state.shape)
    D, dt_bias = (None if t is None else t.contiguous() for t in (D, dt_bias))
    width = triton.next_power_of_2(size)
    rows = max(1, ENTRIES // width)
    blocks = triton.cdiv(channels, rows)
    step_kernel[(batch * blocks,)](
        state, x, dt, A, B, C, D, z, dt_bias, y, new_state,
        *state.stride(), *x.stride(), *dt.stride(), A.stride(0), A.stride(1) if A.shape[1] > 1 else 0,
        *B.stride(), *C.stride(), *((0, 0) if z is None else z.stride()),
        channels, channels // B.shape[1], size, blocks,
        SOFTPLUS=dt_softplus, ROWS=rows, WIDTH=width, num_warps=1,
    )  # fmt: skip
    return y, new_state


@torch.library.custom_op("tokendyn::selective_state_update", mutates_args=())
def update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`launch`."""
    return launch(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


@update.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    return x.new_empty(x.shape), state.new_empty(state.shape)


def run(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`tokendyn.selective_state_update`."""
    if B.ndim == 2:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    A = A.reshape(A.shape[0], -1)
    return torch.ops.tokendyn.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
