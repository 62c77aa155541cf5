"""Which backend a call goes to, and what is said when there is none."""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tokendyn
from tokendyn import _dispatch
from tokendyn._dispatch import BACKENDS, current_backend, kind_of
from tokendyn._operations import OPERATIONS
from tokendyn.errors import (
    BackendBroken,
    BackendError,
    BackendMissing,
    BackendUnknown,
    DTypeError,
    NotImplementedForBackend,
    OptionError,
)

ROOT = Path(__file__).parents[1]


def scores(kind: str) -> Any:
    values = np.random.default_rng(0).standard_normal((2, 5))
    return _dispatch.load_backend(kind).from_numpy(values)


def fresh(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``program`` in a new interpreter."""
    kept = {name: value for name, value in os.environ.items() if name != "TOKENDYN_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# ------------------------------------------------------------------------------------------------- rules 1 and 2


@pytest.mark.parametrize("kind", BACKENDS)
def test_the_arrays_decide_whatever_is_chosen(kind: str) -> None:
    for chosen in BACKENDS:
        tokendyn.use(chosen)
        with tokendyn.backend(chosen):
            assert kind_of(tokendyn.softsort_matrix(scores(kind))) == kind


@pytest.mark.parametrize("operation", [name for name, row in OPERATIONS.items() if set(row.backends) == set(BACKENDS)])
@pytest.mark.parametrize("kind", BACKENDS)
def test_every_operation_stays_with_its_arrays(operation: str, kind: str) -> None:
    with tokendyn.backend(kind):
        arguments = tokendyn.random_inputs(operation)
    with tokendyn.backend("numpy"):
        outputs = getattr(tokendyn, operation)(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert {kind_of(output) for output in outputs} == {kind}


def test_mixed_kinds_name_the_arguments() -> None:
    with pytest.raises(
        DTypeError, match=r"softsort: scores is a numpy array but x is a torch array of shape \(2, 5, 1\)"
    ):
        tokendyn.softsort(scores("numpy"), scores("torch")[:, :, None])
    with pytest.raises(TypeError, match="convert one of the two"):
        tokendyn.softsort(scores("jax"), scores("numpy")[:, :, None])


def test_explicit_modules_take_their_own_arrays_only() -> None:
    assert kind_of(tokendyn.torch.softsort_matrix(scores("torch"))) == "torch"
    assert kind_of(tokendyn.jax.softsort_matrix(scores("jax"))) == "jax"
    with pytest.raises(
        DTypeError, match=r"tokendyn\.torch\.softsort_matrix: scores is a numpy array .* expected a torch array"
    ):
        tokendyn.torch.softsort_matrix(scores("numpy"))
    with pytest.raises(DTypeError, match=r"tokendyn\.jax\.hard_order: scores is a torch array"):
        tokendyn.jax.hard_order(scores("torch"))


def test_explicit_modules_check_token_order_too() -> None:
    assert kind_of(tokendyn.torch.token_order(scores("torch")).indices) == "torch"
    with pytest.raises(DTypeError, match="expected a torch array"):
        tokendyn.torch.token_order(scores("numpy"))


@pytest.mark.parametrize("given", [[[1.0, 2.0]], 1.0, "scores", None])
def test_what_is_no_array_is_refused(given: object) -> None:
    with pytest.raises(DTypeError, match="hard_order"):
        tokendyn.hard_order(given)


def test_a_subclass_of_an_array_is_its_kind() -> None:
    class Tagged(np.ndarray):
        pass

    import torch

    assert kind_of(scores("numpy").view(Tagged)) == "numpy"
    assert kind_of(torch.nn.Parameter(scores("torch"))) == "torch"


def test_numpy_scalars_are_numpy_though_some_are_python_floats() -> None:
    assert isinstance(np.float64(1.0), float)
    assert kind_of(np.float64(1.0)) == "numpy"
    assert kind_of(np.float32(1.0)) == "numpy"
    assert kind_of(1.0) is None
    # As an option it is a number like any other.
    a = tokendyn.softsort_matrix(scores("numpy"), tau=np.float64(0.5))
    assert np.array_equal(a, tokendyn.softsort_matrix(scores("numpy"), tau=0.5))
    with pytest.raises(OptionError, match=r"tau is np\.float32\(0\.5\), expected a finite Python number above 0"):
        tokendyn.softsort_matrix(scores("numpy"), tau=np.float32(0.5))


# -------------------------------------------------------------------------------------------------- rules 3 to 6


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert current_backend() == "numpy"
    monkeypatch.setenv("TOKENDYN_BACKEND", "jax")
    assert current_backend() == "jax"
    tokendyn.use("torch")
    assert current_backend() == "torch"
    with tokendyn.backend("numpy") as name:
        assert name == current_backend() == "numpy"
        with tokendyn.backend("jax"):
            assert current_backend() == "jax"
        assert current_backend() == "numpy"
    assert current_backend() == "torch"
    monkeypatch.setenv("TOKENDYN_BACKEND", "")
    monkeypatch.setattr(_dispatch, "_process_default", None)
    assert current_backend() == "numpy"


@pytest.mark.parametrize("kind", BACKENDS)
def test_what_is_made_from_nothing_follows_the_choice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> Any:
        return tokendyn.random_inputs("selective_scan", packed=True, padded=True)

    def kinds() -> set[str | None]:
        return {kind_of(value) for value in made().values()} - {None}

    with tokendyn.backend(kind):
        assert kinds() == {kind}
    monkeypatch.setenv("TOKENDYN_BACKEND", kind)
    assert kinds() == {kind}
    monkeypatch.setenv("TOKENDYN_BACKEND", "numpy")
    tokendyn.use(kind)
    assert kinds() == {kind}


def test_a_seed_means_the_same_numbers_everywhere() -> None:
    made = {}
    for kind in BACKENDS:
        with tokendyn.backend(kind):
            made[kind] = tokendyn.random_inputs("selective_scan", seed=7)
    for kind in ("torch", "jax"):
        for name, value in made["numpy"].items():
            if isinstance(value, np.ndarray):
                assert np.array_equal(_dispatch.load_backend(kind).to_numpy(made[kind][name]), value)
    with tokendyn.backend("numpy"):
        other = tokendyn.random_inputs("selective_scan", seed=8)
    assert not np.array_equal(other["u"], made["numpy"]["u"])


def test_the_context_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), tokendyn.backend("torch"):
        raise KeyError
    assert current_backend() == "numpy"


def test_threads_do_not_see_each_others_context() -> None:
    seen: dict[str, list[str]] = {}
    inside = threading.Barrier(2)

    def work(name: str) -> None:
        with tokendyn.backend(name):
            inside.wait()  # both are in their blocks now
            seen[name] = [current_backend()]
            inside.wait()
        seen[name].append(current_backend())

    threads = [threading.Thread(target=work, args=(name,)) for name in ("torch", "jax")]
    with tokendyn.backend("jax"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert current_backend() == "jax"
    assert seen == {"torch": ["torch", "numpy"], "jax": ["jax", "numpy"]}


def test_tasks_do_not_see_each_others_context() -> None:
    async def work(name: str, mine: asyncio.Event, others: asyncio.Event) -> str:
        with tokendyn.backend(name):
            mine.set()
            await others.wait()
            return current_backend()

    async def both() -> list[str]:
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(work("torch", first, second), work("jax", second, first))

    assert asyncio.run(both()) == ["torch", "jax"]
    assert current_backend() == "numpy"


def test_a_context_copied_into_a_thread_goes_with_it() -> None:
    with tokendyn.backend("torch"):
        context = contextvars.copy_context()
    assert context.run(current_backend) == "torch"


# ------------------------------------------------------------------------------------------ the three messages apart


def test_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for choose in (tokendyn.use, lambda name: tokendyn.backend(name).__enter__()):
        with pytest.raises(
            BackendUnknown, match=r"unknown backend 'tensorflow'; choose one of 'numpy', 'torch', 'jax'"
        ):
            choose("tensorflow")
    with pytest.raises(BackendUnknown, match="unknown backend None"):
        tokendyn.use(None)  # type: ignore[arg-type]
    monkeypatch.setenv("TOKENDYN_BACKEND", "Torch")
    with pytest.raises(
        BackendUnknown, match=r"environment variable TOKENDYN_BACKEND is 'Torch'; choose one of 'numpy'"
    ):
        tokendyn.random_inputs("softsort")
    assert issubclass(BackendUnknown, ValueError)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else find_spec(n, *a))
    for choose in (tokendyn.use, lambda n: tokendyn.backend(n).__enter__()):
        with pytest.raises(BackendMissing, match=rf"not installed; run: pip install 'tokendyn\[{name}\]'$"):
            choose(name)
    assert current_backend() == "numpy"
    assert issubclass(BackendMissing, ImportError)


@pytest.mark.parametrize("error", [ImportError("libcudart.so.12: cannot open shared object file"), OSError("bad ELF")])
def test_installed_but_broken(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = importlib.import_module

    def broken(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise error
        return import_module(name, *rest)

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(BackendBroken) as raised:
        tokendyn.use("torch")
    assert type(error).__name__ in str(raised.value)
    assert str(error) in str(raised.value)
    assert "is installed but fails to import" in str(raised.value)
    assert raised.value.__cause__ is error


def test_really_missing_and_really_broken_packages(tmp_path: Path) -> None:
    """Not simulated: a package that fails on import, and an environment in which there is none."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('driver too old')\n")
    result = fresh("import tokendyn; tokendyn.torch", PYTHONPATH=str(tmp_path))
    assert "BackendBroken" in result.stderr
    assert "RuntimeError: driver too old" in result.stderr
    hide = (
        "import sys, importlib.abc\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'jax'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    without = "import tokendyn\ny = tokendyn.selective_scan(**tokendyn.random_inputs('selective_scan'))\nprint(y.shape)"
    result = fresh(hide + without)
    assert result.stdout.strip() == "(2, 8, 32)", result.stderr


def test_errors_of_backends_have_one_base() -> None:
    for error in (BackendUnknown, BackendMissing, BackendBroken, NotImplementedForBackend):
        assert issubclass(error, BackendError)


def test_an_operation_that_a_backend_lacks_says_who_has_it() -> None:
    with pytest.raises(NotImplementedForBackend, match="f is not implemented for jax; it is for numpy, torch"):
        _dispatch.implementation("f", ("numpy", "torch"), "jax")


def test_constructors_stand_for_their_classes() -> None:
    from tokendyn.errors import CheckpointError

    with tokendyn.backend("torch"):
        model = tokendyn.MambaLM(vocab_size=5, d_model=4, n_layer=1)
        assert isinstance(model, tokendyn.MambaLM)
        assert not isinstance(model, tokendyn.Mamba)
        with pytest.raises(CheckpointError, match="no folder /nope"):
            tokendyn.MambaLM.from_pretrained("/nope")
    assert isinstance(model, tokendyn.MambaLM)  # whatever backend is current
    assert "tokendyn.torch.MambaLM" in str(tokendyn.MambaLM.__doc__)
    with pytest.raises(NotImplementedForBackend, match=r"tokendyn\.use\('torch'\)"):
        _ = tokendyn.MambaLM.from_pretrained


def test_constructors_follow_the_choice_and_say_where_they_are() -> None:
    with pytest.raises(NotImplementedForBackend, match=r"Mamba .*'numpy'.*tokendyn\.use\('torch'\)"):
        tokendyn.Mamba(d_model=8)
    with tokendyn.backend("torch"):
        layer = tokendyn.Mamba(d_model=8)
    assert type(layer) is tokendyn.torch.Mamba


# -------------------------------------------------------------------------------------------------------- laziness

PROBE = """
import json, sys, time
start = time.perf_counter()
import tokendyn
seconds = time.perf_counter() - start
heavy = [m for m in ("torch", "jax", "jaxlib", "flax", "numpy", "scipy", "numba") if m in sys.modules]
names = dir(tokendyn)
print(json.dumps({"seconds": seconds, "heavy": heavy, "names": len(names)}))
"""


def test_import_is_free() -> None:
    probes = [json.loads(fresh(PROBE).stdout) for _ in range(5)]
    assert all(probe["heavy"] == [] for probe in probes)
    assert min(probe["seconds"] for probe in probes) < 0.2


def test_a_numpy_call_loads_no_other_framework() -> None:
    program = (
        "import sys, tokendyn\n"
        "tokendyn.selective_scan(**tokendyn.random_inputs('selective_scan'))\n"
        "tokendyn.core\n"
        "print(sorted({'torch', 'jax', 'flax'} & set(sys.modules)))"
    )
    result = fresh(program)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize(("mine", "other"), [("torch", "jax"), ("jax", "torch")])
def test_one_framework_does_not_load_the_other(mine: str, other: str) -> None:
    program = (
        "import sys, warnings, tokendyn\n"
        "warnings.simplefilter('error')\n"
        "with tokendyn.backend(sys.argv[1]):\n"
        "    tokendyn.selective_scan(**tokendyn.random_inputs('selective_scan', packed=True, padded=True))\n"
        "print(sys.argv[2] in sys.modules)"
    )
    result = fresh(program, mine, other)
    assert result.stdout.strip() == "False", result.stderr


def test_jax_stays_in_32_bits_unless_the_user_says_otherwise() -> None:
    """The library never switches x64 on; nothing it makes or computes needs it, and nothing warns for want of it."""
    program = (
        "import warnings, tokendyn\n"
        "warnings.simplefilter('error')\n"
        "tokendyn.use('jax')\n"
        "import jax\n"
        "for name in ('selective_scan', 'softsort', 'hard_order', 'take_tokens', 'io_spectrum', 'flow_rhs'):\n"
        "    outputs = getattr(tokendyn, name)(**tokendyn.random_inputs(name))\n"
        "    for leaf in jax.tree.leaves(outputs):\n"
        "        assert leaf.dtype.itemsize <= 4 or leaf.dtype == 'complex64', (name, leaf.dtype)\n"
        "print(jax.config.jax_enable_x64)"
    )
    result = fresh(program, JAX_ENABLE_X64="0")
    assert result.stdout.strip() == "False", result.stderr[-2000:]


def test_modules_are_attributes_and_load_when_touched() -> None:
    program = (
        "import sys, tokendyn\n"
        "print('tokendyn.core' in sys.modules, 'tokendyn.torch' in sys.modules)\n"
        "tokendyn.core.selective_scan; tokendyn.torch.selective_scan\n"
        "print('tokendyn.core' in sys.modules, 'tokendyn.torch' in sys.modules)"
    )
    assert fresh(program).stdout.split() == ["False", "False", "True", "True"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tokendyn' has no attribute 'selective_scam'"):
        tokendyn.selective_scam  # noqa: B018


# ---------------------------------------------------------------------------------------------- traced by frameworks


def test_jax_tracers_are_jax_arrays() -> None:
    import jax

    with tokendyn.backend("jax"):
        arguments = tokendyn.random_inputs("softsort")
    compiled = jax.jit(tokendyn.softsort)(**arguments)
    np.testing.assert_allclose(compiled, tokendyn.softsort(**arguments), rtol=1e-5, atol=1e-6)
    mapped = jax.vmap(lambda s, x: tokendyn.softsort(s[None], x[None])[0])(arguments["scores"], arguments["x"])
    np.testing.assert_allclose(mapped, tokendyn.softsort(**arguments), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda s: tokendyn.softsort(s, arguments["x"])[..., 0].sum() ** 2)(arguments["scores"])
    assert gradient.shape == arguments["scores"].shape
    with pytest.raises(DTypeError, match="scores is a numpy array but x is a jax array"):
        jax.jit(lambda x: tokendyn.softsort(np.zeros((2, 32), np.float32), x))(arguments["x"])


def test_tensors_of_torch_func_are_torch_arrays() -> None:
    import torch

    with tokendyn.backend("torch"):
        arguments = tokendyn.random_inputs("softsort", dtype="float64")
    s, x = arguments["scores"], arguments["x"]
    mapped = torch.func.vmap(lambda s, x: tokendyn.softsort(s[None], x[None])[0])(s, x)
    torch.testing.assert_close(mapped, tokendyn.softsort(s, x))
    gradient = torch.func.grad(lambda s: tokendyn.softsort(s, x)[..., 0].sum() ** 2)(s)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(tokendyn.softsort(s.requires_grad_(), x)[..., 0].sum() ** 2, s)[0]
    )


# --------------------------------------------------------------------------------------------------- calling at all


def test_wrong_calls_fail_as_python_calls_do() -> None:
    with pytest.raises(TypeError, match="softsort: missing a required argument"):
        tokendyn.softsort(scores("numpy"))
    with pytest.raises(TypeError, match="softsort_matrix: got an unexpected keyword argument 'temperature'"):
        tokendyn.softsort_matrix(scores("numpy"), temperature=1.0)
    with pytest.raises(TypeError, match=r"softsort: .* unexpected keyword argument 'score'; did you mean 'scores'\?"):
        tokendyn.softsort(score=scores("numpy"))
    with pytest.raises(TypeError, match="too many positional arguments"):
        tokendyn.softsort_matrix(scores("numpy"), 1.0)
    with pytest.raises(TypeError, match="multiple values for argument 'scores'"):
        tokendyn.softsort_matrix(scores("numpy"), scores=scores("numpy"))
