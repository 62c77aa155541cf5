"""The project's tasks: ``nox -s SESSION``; ``nox -l`` lists them.

All sessions share one environment, ``.nox/shared``: frameworks are large, and installing them once is
enough. It is made anew when ``pyproject.toml`` or ``constraints.txt`` changes. ``TOKENDYN_NOX_ENV`` names
an environment to use as it is instead (on a GPU machine, say, one that already holds CUDA builds).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import venv
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "docs", "tests", "equivalence", "equivalence-selftest"]

ROOT = Path(__file__).parent
SHARED = ROOT / ".nox" / "shared"
#: What torch's CUDA builds bring and its CPU build does not: Triton, whose interpreter runs kernels on a CPU, and
#: NVIDIA's run-time compiler, which needs no GPU.
_WHERE = "platform_system == 'Linux' and platform_machine == 'x86_64'"
GPU_COMPILERS = [f"{name}; {_WHERE}" for name in ("triton", "cuda-bindings", "nvidia-cuda-nvrtc")]
#: Versions that fit each other.
VISION = ("torch==2.14.1", "torchvision==0.29.1", "timm==1.0.31")
#: XLA's newer code generator for CPUs sets up a compiler for each of the dozens of kernels of a program, 25 ms apiece,
#: which are most of the time of the tests on JAX. tests/equivalence/test_golden.py has it all the same, as users do.
#: And nothing is gained by dividing a program for threads where tests have a process for each core.
QUICK_XLA = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
IN_PARALLEL = ("-n", "2", "--dist")
ELSEWHERE = ("--ignore=tests/equivalence", "--ignore=tests/equivalence_selftest")  # sessions of their own


def shared_python(session: nox.Session) -> str:
    """The Python of the shared environment, made or renewed if need be."""
    given = os.environ.get("TOKENDYN_NOX_ENV")
    root = Path(given) if given else SHARED
    python = root / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if given:
        return str(python)
    wanted = hashlib.sha256(
        b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
        + f"{GPU_COMPILERS} {sys.version}".encode()
    ).hexdigest()
    stamp = root / "tokendyn-stamp"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        shutil.rmtree(root, ignore_errors=True)
        venv.create(root, with_pip=True)
        # Not compiled: Python does so where a module is loaded, which most of those installed never are.
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        pip += ["-c", "constraints.txt"]
        session.run(*pip, "--upgrade", "pip", external=True)  # Python's own reads indices in three times the time
        session.run(*pip, "-e", ".[all]", *GPU_COMPILERS, external=True)
        stamp.write_text(wanted)
    return str(python)


def run(session: nox.Session, *arguments: str, **variables: str) -> None:
    """Run the shared Python with ``arguments``."""
    # Threads that wait by sleeping: ten times faster where other work shares the cores; one of them, as tests have
    # a process for each core.
    environment = {"MPLBACKEND": "Agg", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "1"}
    # Where it is set (in many containers), each process would compile PyTorch's sources again: 3 s each.
    environment["PYTHONDONTWRITEBYTECODE"] = ""
    if not os.environ.get("TOKENDYN_NOX_ENV"):  # a given environment may hold another XLA, which ends on unknown flags
        environment["XLA_FLAGS"] = QUICK_XLA
    environment |= variables
    session.run(shared_python(session), *arguments, env=environment, external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Unit, backend, experiment and reliability tests; arguments go to pytest."""
    # In the order of collection: files of few, long tests would else come last, and one process wait for the other.
    in_order = (*IN_PARALLEL, "loadfile", "--no-loadscope-reorder")
    run(session, "-m", "pytest", "tests", *in_order, *ELSEWHERE, "--durations=10", *session.posargs)


@nox.session
def equivalence(session: nox.Session) -> None:
    """Every operation on every backend against the spec, and the table of the worst errors."""
    run(session, "-m", "pytest", "tests/equivalence", *IN_PARALLEL, "loadgroup", *session.posargs, JAX_ENABLE_X64="1")


@nox.session(name="equivalence-selftest")
def equivalence_selftest(session: nox.Session) -> None:
    """Plant faults one at a time; fail if the equivalence tests let any survive."""
    run(
        session,
        "-m",
        "pytest",
        "tests/equivalence_selftest",
        *IN_PARALLEL,
        "loadgroup",
        *session.posargs,
        JAX_ENABLE_X64="1",
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    run(session, "-m", "ruff", "check", ".")
    run(session, "-m", "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Pyright over the package."""
    run(session, "-m", "pyright", "--pythonpath", shared_python(session))


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, warnings as errors."""
    run(session, "-m", "sphinx", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html", *session.posargs)


@nox.session(default=False)
def linkcheck(session: nox.Session) -> None:
    """Whether the documentation's links to other sites answer; needs a network."""
    run(session, "-m", "sphinx", "-b", "linkcheck", "docs", "docs/_build/linkcheck", *session.posargs)


@nox.session(default=False)
def vision(session: nox.Session) -> None:
    """The recipe at full scale with timm and torchvision, a minute; its environment takes 5.5 GB.

    Its torch is newer than the constraints': torchvision's and timm's wheels do not load beside that CPU build.
    """
    given = os.environ.get("TOKENDYN_NOX_ENV")
    root = Path(given) if given else ROOT / ".nox" / "vision"
    python = root / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not given:
        if not python.exists():
            venv.create(root, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        session.run(*pip, *VISION, "-e", ".[experiments,dev]", external=True)
    run = [str(python), "-m", "pytest", "tests/experiments/test_full_scale.py", *session.posargs]
    session.run(*run, env={"TOKENDYN_EXPECT_TIMM": "1"}, external=True)


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on embedded real images: a baseline and a reordered vision Mamba, three seeds each."""
    run(session, "-m", "tokendyn.experiments.imagenet", *session.posargs)
