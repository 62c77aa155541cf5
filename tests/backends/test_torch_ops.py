"""Every PyTorch operation under gradcheck, torch.func, torch.compile and in every dtype; values are compared with the
spec elsewhere (tests/equivalence)."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import tokendyn
from tokendyn._operations import OPERATIONS

# PyTorch's own, on the first use of forward mode, and where its compiler meets an autograd function.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script.*deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]


@dataclass(frozen=True)
class Subject:
    """One operation with fixed options and random arguments; ``linear``: in SoftSort's form for long sequences."""

    operation: str
    sizes: dict[str, Any]
    options: dict[str, Any]
    linear: bool = False

    def arguments(self, dtype: str = "float64", device: str = "cpu") -> dict[str, Any]:
        seed = zlib.crc32(repr((self.operation, self.sizes, self.options)).encode())
        with tokendyn.backend("torch"):
            made = tokendyn.random_inputs(self.operation, seed=seed, dtype=dtype, **self.sizes)
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in made.items()}

    def split(self, dtype: str = "float64", device: str = "cpu") -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The operation as a function of its differentiable arguments alone, all outputs real; and these."""
        arguments = self.arguments(dtype, device)
        wanted = [name for name in OPERATIONS[self.operation].differentiable if name in arguments]
        fixed = {name: value for name, value in arguments.items() if name not in wanted} | self.options

        def call(*values: Any) -> Any:
            out = getattr(tokendyn, self.operation)(**dict(zip(wanted, values, strict=True)), **fixed)
            if self.operation == "io_spectrum":
                return torch.view_as_real(out.eigenvalues), out.symmetric
            return out

        return call, tuple(arguments[name] for name in wanted)


SMALL_SCAN = {"batch": 2, "channels": 4, "length": 5, "state": 2}
SMALL_STEP = {"batch": 2, "channels": 4, "state": 2}
SMALL_ORDER = {"batch": 2, "channels": 2, "length": 5}
SMALL_SCORES = {"batch": 2, "length": 5}
MAPS = {"channels": 7, "state": 3}
SUBJECTS = {
    "scan": Subject("selective_scan", {**SMALL_SCAN, "with_state": True}, {"return_last_state": True}),
    "scan, scalar A, groups": Subject("selective_scan", {**SMALL_SCAN, "scalar_a": True, "groups": 2}, {}),
    "scan, packed and padded": Subject(
        "selective_scan",
        {**SMALL_SCAN, "with_state": True, "packed": True, "padded": True},
        {"return_last_state": True},
    ),
    "scan, plain": Subject("selective_scan", {**SMALL_SCAN, "with_state": True}, {"engine": "plain"}),
    "step": Subject("selective_state_update", SMALL_STEP, {}),
    "step, scalar A, groups": Subject("selective_state_update", {**SMALL_STEP, "scalar_a": True, "groups": 2}, {}),
    "attention": Subject("hidden_attention", {**SMALL_SCAN, "packed": True}, {}),
    "attention, rows": Subject("hidden_attention", {**SMALL_SCAN, "scalar_a": True}, {"rows": (2, 4), "channel": 1}),
    "attention, mean": Subject("hidden_attention", {**SMALL_SCAN, "groups": 2}, {"aggregate": "mean_abs"}),
    "score": Subject("importance_score", {**SMALL_ORDER, "rank": 3}, {}),
    "softsort": Subject("softsort", SMALL_ORDER, {"tau": 0.7}),
    "softsort, linear": Subject("softsort", SMALL_ORDER, {"tau": 0.7, "ascending": False}, linear=True),
    "softsort, power 2": Subject("softsort", SMALL_ORDER, {"tau": 0.7, "power": 2, "ascending": False}),
    "restore": Subject("softsort_restore", SMALL_ORDER, {"tau": 0.7, "ascending": False}),
    "restore, linear": Subject("softsort_restore", SMALL_ORDER, {"tau": 0.7}, linear=True),
    "restore, power 1.5": Subject("softsort_restore", SMALL_ORDER, {"power": 1.5}),
    "matrix": Subject("softsort_matrix", SMALL_SCORES, {"tau": 0.7}),
    "effective tokens": Subject("effective_tokens", SMALL_SCORES, {}),
    "effective tokens, linear": Subject("effective_tokens", SMALL_SCORES, {}, linear=True),
    "hard order": Subject("hard_order", SMALL_SCORES, {}),
    "take": Subject("take_tokens", SMALL_ORDER, {}),
    "put": Subject("put_tokens", SMALL_ORDER, {}),
    "projections, free": Subject("io_projections", MAPS, {}),
    "projections, mixed": Subject("io_projections", {**MAPS, "regime": "mixed"}, {"regime": "mixed"}),
    "spectrum": Subject("io_spectrum", MAPS, {}),
}
DIFFERENTIABLE = [name for name, subject in SUBJECTS.items() if OPERATIONS[subject.operation].differentiable]


@pytest.fixture(autouse=True)
def _form_of_softsort(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear form of SoftSort where the subject asks for it, in chunks so small that there are several."""
    from tokendyn.backends.torch.ops import _laplace, _softsort_plain

    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name is not None and SUBJECTS[name].linear:
        monkeypatch.setattr(_softsort_plain, "_DENSE_UP_TO", {"cpu": 0, "cuda": 0})
        monkeypatch.setattr(_laplace, "_CHUNK", 2)


def leaves(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else (out,)


def close(actual: Any, expected: Any, tolerance: float = 1e-11) -> None:
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def requiring_grad(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.clone().requires_grad_() for value in values)


def scalar(call: Callable[..., Any]) -> Callable[..., Any]:
    """A loss with a gradient of its own for every output element."""

    def loss(*values: Any) -> Any:
        outs = leaves(call(*values))
        return sum(
            (out.square() * (1 + torch.arange(out.numel(), device=out.device).view_as(out))).sum() for out in outs
        )

    return loss


def test_every_operation_is_a_subject() -> None:
    flows = {"flow_rhs", "sphere_flow", "attention_flow", "autoregressive_flow"}  # scans and products: tests/core
    on_torch = {name for name, operation in OPERATIONS.items() if "torch" in operation.backends}
    assert {subject.operation for subject in SUBJECTS.values()} >= on_torch - flows


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_first_derivatives(name: str) -> None:
    """Reverse and forward mode against finite differences."""
    call, values = SUBJECTS[name].split()
    assert torch.autograd.gradcheck(call, requiring_grad(values), check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives(name: str) -> None:
    call, values = SUBJECTS[name].split()
    assert torch.autograd.gradgradcheck(call, requiring_grad(values), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", SUBJECTS)
def test_vmap_is_a_loop(name: str) -> None:
    subject = SUBJECTS[name]
    arguments = subject.arguments()
    arrays = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    others = {key: value for key, value in arguments.items() if key not in arrays} | subject.options
    floats = [key for key, value in arrays.items() if value.is_floating_point()]

    def call(*values: Any) -> Any:
        out = getattr(tokendyn, subject.operation)(**dict(zip(arrays, values, strict=True)), **others)
        return tuple(out)[::-1] if subject.operation == "io_spectrum" else out

    for mapped in (floats, floats[:1]):  # all of them; one of them
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        stacks = [
            torch.stack([value * scale for scale in rng.uniform(0.5, 1.5, 3)], 1) if key in mapped else value
            for key, value in arrays.items()
        ]
        dims = tuple(1 if key in mapped else None for key in arrays)
        batched = torch.func.vmap(call, in_dims=dims)(*stacks)
        for i in range(3):
            one = call(*(stack if dim is None else stack[:, i] for stack, dim in zip(stacks, dims, strict=True)))
            close(tuple(out[i] for out in leaves(tuple(batched) if isinstance(batched, list) else batched)), one)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_transforms_agree_with_autograd(name: str) -> None:
    call, values = SUBJECTS[name].split()
    loss, where = scalar(call), tuple(range(len(values)))
    inputs = requiring_grad(values)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    close(torch.func.grad(loss, where)(*values), expected)
    out, pull = torch.func.vjp(call, *values)
    pulled = torch.autograd.grad(sum((o.square() / 2).sum() for o in leaves(call(*inputs))), inputs)
    cotangents = tuple(torch.stack([o, 2 * o]) for o in leaves(out))
    batched = torch.func.vmap(pull)(cotangents if isinstance(out, tuple) else cotangents[0])
    close(tuple(gradient[1] / 2 for gradient in batched), pulled)
    rng = np.random.default_rng(len(name))
    tangents = tuple(torch.from_numpy(rng.standard_normal(value.shape)) for value in values)
    _, slope = torch.func.jvp(loss, values, tangents)
    close(slope, sum((t * g).sum() for t, g in zip(tangents, expected, strict=True)))
    each = torch.func.vmap(torch.func.grad(loss, where))(*(torch.stack([value, value]) for value in values))
    close(tuple(gradient[1] for gradient in each), expected)


# The others run the same code: "scan, plain" is what "scan" is under the compiler, and so on.
COMPILED = sorted(SUBJECTS.keys() - {"scan, plain", "attention", "restore", "restore, power 1.5", "hard order", "put"})


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(name: str) -> None:
    call, values = SUBJECTS[name].split()
    torch.compiler.reset()  # the subjects share their code, and so would share the limit on recompilations
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    close(compiled(*values), call(*values), 1e-13)
    if name in DIFFERENTIABLE:
        inputs = requiring_grad(values)
        gradients = torch.autograd.grad(scalar(compiled)(*inputs), inputs)
        close(gradients, torch.autograd.grad(scalar(call)(*inputs), inputs), 1e-13)


def test_orders_compile_and_transform() -> None:
    rng = np.random.default_rng(5)
    scores = torch.from_numpy(rng.standard_normal((2, 6)))
    x = torch.from_numpy(rng.standard_normal((2, 6, 3)))

    for method in ("softsort", "hard", "straight_through"):

        def there_and_back(scores: Any, x: Any, method: str = method) -> Any:
            order = tokendyn.token_order(scores, method)
            return order.restore(torch.tanh(order.apply(x))) + order.matrix().sum()

        compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
        close(compiled(scores, x), there_and_back(scores, x))
        stacked = torch.func.vmap(there_and_back)(torch.stack([scores, -scores]), torch.stack([x, x]))
        close(stacked[1], there_and_back(-scores, x))
        gradient = torch.func.grad(lambda x, s=scores, f=there_and_back: f(s, x).square().sum())(x)
        inputs = x.clone().requires_grad_()
        close(gradient, torch.autograd.grad(there_and_back(scores, inputs).square().sum(), inputs)[0])


def test_compiling_first_thing_in_a_process() -> None:
    """The backend is loaded inside the trace, and nothing that the trace changed makes it trace again."""
    code = """
        import torch, tokendyn
        torch.set_num_threads(1)
        count = 0
        def backend(graph, inputs):
            global count
            count += 1
            return graph
        def f(scores, x):
            order = tokendyn.token_order(scores, "straight_through")
            y = order.restore(order.apply(x)).mT
            return tokendyn.selective_scan(y, y, -torch.ones(3, 2), y[:, :2], y[:, 1:], delta_softplus=True)
        compiled = torch.compile(f, fullgraph=True, backend=backend)
        scores, x = torch.linspace(0, 1, 8).view(2, 4), torch.linspace(-1, 1, 24).view(2, 4, 3)
        first = compiled(scores, x)
        import colorsys  # noqa: a module more or less must not matter either
        assert torch.equal(first, compiled(scores, x))
        torch.testing.assert_close(first, f(scores, x))
        assert count == 1, count
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


#: Each subject with the dtypes that its operation takes.
TAKEN = [
    (name, dtype)
    for name, subject in SUBJECTS.items()
    for dtype in ("float64", "float32", *(() if subject.operation == "io_spectrum" else ("bfloat16", "float16")))
]


@pytest.mark.parametrize(("name", "dtype"), TAKEN)
def test_keeps_the_dtype(name: str, dtype: str) -> None:
    subject = SUBJECTS[name]
    call, values = subject.split(dtype)
    wanted = getattr(torch, dtype)
    inputs = requiring_grad(values)
    out = leaves(call(*inputs))
    for i, value in enumerate(out):
        if subject.operation == "selective_scan" and i == 1:
            assert value.dtype == (torch.float32 if wanted.itemsize == 2 else wanted)
        elif subject.operation == "hard_order":
            assert value.dtype == torch.int64
        else:
            assert value.dtype == wanted
    if name in DIFFERENTIABLE:
        for gradient, value in zip(torch.autograd.grad(sum(o.sum() for o in out), inputs), inputs, strict=True):
            assert gradient.dtype == value.dtype
            assert gradient.shape == value.shape


@pytest.mark.parametrize("name", SUBJECTS)
def test_autocast_changes_nothing(name: str) -> None:
    """A bfloat16 product inside a scan or a sort would be another scan, another order."""
    call, values = SUBJECTS[name].split("float32")
    expected = leaves(call(*values))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = leaves(call(*values))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_forward_mode_inside_forward_mode_is_refused() -> None:
    """PyTorch would give 0 for it."""
    call, values = SUBJECTS["scan"].split()
    with pytest.raises(NotImplementedError, match=r"jacfwd\(torch\.func\.jacrev"):
        torch.func.jacfwd(torch.func.jacfwd(lambda u: scalar(call)(u, *values[1:])))(values[0])


@pytest.mark.parametrize("regime", ["free", "positive", "negative", "mixed"])
def test_hessian_of_the_symmetric_spectrum(regime: str) -> None:
    """Against that of tr H³, which needs no eigenvalues; LDLᵀ projections have a defective 2N x 2N product."""
    rng = np.random.default_rng(31)
    weight = torch.from_numpy(rng.standard_normal((3, 8)))
    other = torch.from_numpy(rng.standard_normal((3, 8) if regime == "free" else 3))

    def projections(weight: Any) -> Any:
        if regime == "free":
            return tokendyn.io_projections(weight, other)
        return tokendyn.io_projections(weight, None, other, regime=regime)

    def by_spectrum(weight: Any) -> Any:
        return tokendyn.io_spectrum(*projections(weight)).symmetric.pow(3).sum()

    def by_trace(weight: Any) -> Any:
        S_B, S_C = projections(weight)
        H = (S_C.mT @ S_B + S_B.mT @ S_C) / 2
        return torch.trace(H @ H @ H)

    close(by_spectrum(weight), by_trace(weight), 1e-10)
    close(torch.func.grad(by_spectrum)(weight), torch.func.grad(by_trace)(weight), 1e-10)
    if regime == "free":  # else N eigenvalues are 0 together, and eigenvectors have no derivative
        expected = torch.func.hessian(by_trace)(weight)
        close(torch.func.hessian(by_spectrum)(weight), expected, 1e-9)
        close(torch.func.jacrev(torch.func.jacrev(by_spectrum))(weight), expected, 1e-9)


def test_conversions() -> None:
    from tokendyn.backends.torch import ops

    values = np.random.default_rng(2).standard_normal((2, 3))
    assert np.array_equal(ops.to_numpy(ops.from_numpy(values)), values)
    assert ops.from_numpy(values, "bfloat16").dtype is torch.bfloat16
    assert ops.to_numpy(ops.from_numpy(values, "bfloat16")).dtype == np.float32
    assert ops.to_numpy(ops.from_numpy(values, "float16").requires_grad_()).dtype == np.float16
    source = values.copy()
    tensor = ops.from_numpy(source)
    source[:] = 0
    assert np.array_equal(ops.to_numpy(tensor), values), "from_numpy must copy"
    indices = torch.tensor([[2, 0, 1]])
    x = torch.arange(6.0).view(1, 3, 2)
    assert torch.equal(ops.permutation_matrix(indices, x) @ x, tokendyn.take_tokens(x, indices))
    assert not ops.stop_gradient(x.requires_grad_()).requires_grad
