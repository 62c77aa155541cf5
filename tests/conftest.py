"""Set-up common to all tests: JAX with float64, one thread, the same examples on every run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator

import pytest

# The float64 columns need JAX's x64 mode. It is a switch of the process, read when jax is imported; the library
# never touches it, so the test session turns it on here, before anything else can import jax.
if "jax" in sys.modules and not sys.modules["jax"].config.jax_enable_x64:
    raise pytest.UsageError(
        "jax was imported without x64 before the tests' conftest could ask for it; "
        "set JAX_ENABLE_X64=1 in the environment of this run"
    )
os.environ["JAX_ENABLE_X64"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
# Without a GPU, Triton's interpreter runs the kernels; Triton reads this when it is imported.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

settings.register_profile("tokendyn", derandomize=True, deadline=None, max_examples=25, database=None)
settings.load_profile("tokendyn")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backends",
        default="numpy,torch,jax",
        help="the backends that the equivalence tests run, by commas; those left out are not missed",
    )


@pytest.fixture(scope="session")
def backends(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The backends that the equivalence tests run."""
    return chosen_backends(request.config)


def chosen_backends(config: pytest.Config) -> tuple[str, ...]:
    from tokendyn._dispatch import BACKENDS

    chosen = tuple(config.getoption("--backends").split(","))
    unknown = [name for name in chosen if name not in BACKENDS]
    if unknown:
        raise pytest.UsageError(f"--backends: unknown {unknown}, choose among {', '.join(BACKENDS)}")
    return chosen


@pytest.fixture(autouse=True)
def _own_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the backend that another test, or the caller's environment, chose."""
    from tokendyn import _dispatch

    monkeypatch.setattr(_dispatch, "_process_default", None)
    monkeypatch.delenv("TOKENDYN_BACKEND", raising=False)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill everything that torch allocates with NaN first, so that an element which no kernel writes shows."""
    import torch

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)

        def filled(*args, _make=make, **options):
            made = _make(*args, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(owner, name, filled)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: small tensors only lose by more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """JAX, if there is one, without most of XLA's optimisations: for tests whose time is its compilation and whose
    results do not depend on it."""
    if importlib.util.find_spec("jax") is None:
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
