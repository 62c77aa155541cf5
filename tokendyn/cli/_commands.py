"""The commands: what they take and what they print."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tokendyn import Trajectory, __version__
from tokendyn._dispatch import current_backend, kind_of, load_backend
from tokendyn._dynamics import as_float64
from tokendyn.cli._animate import expect_drawable, require_matplotlib, save_animation, save_plot
from tokendyn.cli._tables import regime_json, regime_table, sphere_json, sphere_table, trajectory_json, trajectory_table
from tokendyn.errors import DataError, OptionError

_NUMBERS = ("mu", "s_delta", "a", "bias")
#: What a problem file may hold: the arguments of simulate and simulate_sphere.
_KEYS = (*_NUMBERS, "x0", "M", "S_B", "S_C", "W", "Q", "K", "V", "kind", "causal", "phi")

_EXAMPLES = """examples:
  tokendyn classify --mu 1 --s-delta 0.7 --a 1 --x0 0.3 -1 1.2
  tokendyn simulate --mu -1.5 --s-delta -0.4 --a 1 --x0 1.8 -1.2 0.9 --t-end 1e6 --plot tokens.png
  tokendyn simulate --problem plane.json --t-end 10 --animate tokens.gif
  tokendyn figures fig1_convergence counter_examples

A problem file is JSON with the arguments of tokendyn.simulate by name, for example
  {"M": [[-1, 0.4], [0, -0.6]], "s_delta": [[0.4, -0.3], [0.2, 0.5]], "a": 1, "x0": [[1, 0.5], [-0.6, 1.1]]}
Token 1 is the first, in tables, words and pictures. TOKENDYN_BACKEND=jax (or torch) has JAX (PyTorch) simulate; they
do not follow tokens past a blow-up."""

#: Commands that one backend runs, whichever is chosen.
_FIXED = {"figures": "numpy", "diagnose": "torch"}
#: Times at which a backend's solver is asked for tokens where the user names none.
_TIMES = 241


def run(arguments: list[str]) -> int:
    """Parse and run."""
    chosen = current_backend()  # a wrong name is a mistake whatever the command
    fixed = _FIXED.get(arguments[0]) if arguments else None
    if fixed is not None and chosen not in ("numpy", fixed):
        print(f"tokendyn {arguments[0]}: runs on {fixed}, though {chosen} is chosen", file=sys.stderr)
    if arguments[:1] == ["figures"]:
        require_matplotlib()
        from tokendyn.experiments.figures._command import main

        return main(arguments[1:], prog="tokendyn figures")
    if arguments[:1] == ["diagnose"]:
        from tokendyn.cli._diagnose import run as diagnose

        return diagnose(arguments[1:])
    options = _parser().parse_args([_number_or_word(word) for word in arguments])
    problem = _problem(options)
    with _precision(chosen):
        arrays = _on_backend(problem, chosen)
        return _classify(arrays, options) if options.command == "classify" else _simulate(arrays, options, chosen)


def _number_or_word(word: str) -> str:
    """Numbers such as -1e-3 with a blank in front, by which argparse tells them from options."""
    try:
        for number in filter(None, word.split(",")):
            float(number)
    except ValueError:
        return word
    return f" {word}" if word.startswith("-") else word


def _precision(backend: str) -> contextlib.AbstractContextManager[Any]:
    """Float64 on JAX too while this command runs; a library leaves that to its user, here we are the program."""
    if backend != "jax":
        return contextlib.nullcontext()
    load_backend("jax")
    import jax

    return jax.enable_x64(True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokendyn",
        description="The token dynamics of selective state space models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tokendyn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in (("classify", "what becomes of every token, and why"), ("simulate", "the tokens over depth")):
        command = commands.add_parser(
            name, help=text, description=text, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        line = command.add_argument_group("one channel")
        line.add_argument("--mu", type=float, help="input-output factor μ")
        line.add_argument("--s-delta", type=float, dest="s_delta", help="S_Δ in Δ = softplus(S_Δ x + bias)")
        line.add_argument("--a", type=float, help="decay rate a > 0 (A = -a)")
        line.add_argument("--bias", type=float, help="bias in Δ (default 0)")
        line.add_argument("--x0", nargs="+", metavar="x", help="initial tokens")
        command.add_argument("--problem", metavar="FILE", help="a problem in JSON instead, - for stdin")
        command.add_argument("--sphere", action="store_true", help="on the unit sphere; tokens are normalised")
        command.add_argument("--json", action="store_true", help="print JSON")
        if name == "simulate":
            command.add_argument("--t-end", type=float, required=True, dest="t_end", help="end of the simulation")
            command.add_argument("--times", nargs="+", metavar="t", help="print tokens at these times")
            command.add_argument("--rtol", type=float, default=1e-9, help="error allowed in a step (default 1e-9)")
            command.add_argument("--plot", type=Path, metavar="FILE", help="draw the tokens (.png, .svg, .pdf)")
            command.add_argument("--animate", type=Path, metavar="FILE", help="tokens moving over depth (.gif, .mp4)")
    commands.add_parser("figures", help="draw the papers' figures; see tokendyn figures --help")
    commands.add_parser("diagnose", help="a trained model's regimes, attention and sinks; see tokendyn diagnose --help")
    return parser


def _floats(option: str, words: list[str]) -> list[float]:
    """Numbers separated by blanks or commas."""
    try:
        return [float(word) for part in words for word in part.split(",") if word]
    except ValueError:
        raise OptionError(f"{option} is {' '.join(words)!r}, expected numbers") from None


def _problem(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of simulate, from the options or from a file."""
    given = {key: value for key in _NUMBERS if (value := getattr(options, key)) is not None}
    if options.x0 is not None:
        given["x0"] = _floats("--x0", options.x0)
    if options.problem is None:
        missing = [f"--{key.replace('_', '-')}" for key in ("mu", "s_delta", "a", "x0") if key not in given]
        if missing:
            raise OptionError(f"{', '.join(missing)} missing, expected one channel's parameters or --problem FILE")
        return given
    try:
        text = sys.stdin.read() if options.problem == "-" else Path(options.problem).read_text(encoding="utf-8")
        problem = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{options.problem} is not JSON: {error}") from None
    if not isinstance(problem, dict) or not set(problem) <= set(_KEYS):
        wrong = sorted(set(problem) - set(_KEYS)) if isinstance(problem, dict) else type(problem).__name__
        raise DataError(f"{options.problem} holds {wrong}, expected some of {', '.join(_KEYS)}")
    problem.update(given)
    if "x0" not in problem:
        raise DataError(f"{options.problem} holds no x0")
    if options.sphere:
        x0 = as_float64(options.problem, "x0", problem["x0"])
        norms = np.linalg.norm(x0, axis=-1, keepdims=True)
        if not norms.all():
            raise DataError(f"{options.problem} holds a token x0 of norm 0, expected one that has a direction")
        problem["x0"] = x0 / norms
    return problem


def _expect(name: str, function: Any, problem: dict[str, Any]) -> Any:
    """Call ``function``; arguments that it does not have are a mistake of the file."""
    try:
        return function(**problem)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise OptionError(f"{name}: {str(error).split('() ')[-1]}") from None


def _on_backend(problem: dict[str, Any], chosen: str) -> dict[str, Any]:
    """The problem with its lists as arrays of the backend chosen; NumPy takes lists."""
    if chosen == "numpy":
        return problem
    make = load_backend(chosen).from_numpy
    return {
        key: make(as_float64("the problem", key, value), "float64") if isinstance(value, (list, np.ndarray)) else value
        for key, value in problem.items()
    }


def _as_numpy(trajectory: Trajectory) -> Trajectory:
    """The trajectory with its tokens as NumPy arrays, for printing and drawing."""
    kind = kind_of(trajectory.tokens)
    if kind in ("numpy", None):
        return trajectory
    to_numpy = load_backend(kind).to_numpy
    return dataclasses.replace(trajectory, tokens=to_numpy(trajectory.tokens), start=to_numpy(trajectory.start))


def _classify(problem: dict[str, Any], options: argparse.Namespace) -> int:
    from tokendyn import classify, classify_sphere

    if options.sphere:
        regime = _expect("classify on the sphere", classify_sphere, problem)
        print(json.dumps(sphere_json(regime), indent=2) if options.json else sphere_table(regime))
    else:
        regime = _expect("classify", classify, problem)
        print(json.dumps(regime_json(regime), indent=2) if options.json else regime_table(regime))
    return 0


def _simulate(problem: dict[str, Any], options: argparse.Namespace, chosen: str) -> int:
    from tokendyn import simulate, simulate_sphere

    expect_drawable(options.plot, options.animate)
    asked: dict[str, Any] = {"t_end": options.t_end, "rtol": options.rtol}
    if chosen != "numpy" and options.t_end > 0:  # NumPy's integrator returns its own steps, these return what is asked
        asked["times"] = np.minimum(np.expm1(np.linspace(0, np.log1p(options.t_end), _TIMES)), options.t_end)
    times = None if options.times is None else sorted(_floats("--times", options.times))
    function = simulate_sphere if options.sphere else simulate
    wanted = asked if times is None else {**asked, "times": times}
    trajectory = _as_numpy(_expect("simulate", function, {**problem, **wanted}))
    print(json.dumps(trajectory_json(trajectory)) if options.json else trajectory_table(trajectory))
    drawn = trajectory
    if times is not None and (options.plot or options.animate):  # pictures want more points than were asked for
        drawn = _as_numpy(function(**problem, **asked))
    if options.plot:
        save_plot(drawn, options.plot)
        print(f"drawn: {options.plot}", file=sys.stderr)
    if options.animate:
        save_animation(drawn, options.animate)
        print(f"drawn: {options.animate}", file=sys.stderr)
    return 0
