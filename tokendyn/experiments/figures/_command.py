"""The command that draws the figures."""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tokendyn.experiments.figures import _line, _rates, _space, _sphere
from tokendyn.experiments.figures._style import Drawn, save, styled

FIGURES: dict[str, Callable[[], Drawn]] = {
    "fig1_convergence": _line.convergence,
    "fig2_slow_divergence": _line.slow_divergence,
    "fig3_fast_divergence": _line.fast_divergence,
    "fig6_planes": _space.planes,
    "counter_examples": _space.counter_examples,
    "phase_diagram": _space.phase_diagram,
    "sphere_clusters": _sphere.clusters,
    "sphere_rates": _sphere.sphere_rates,
    "rates": _rates.measured_against_predicted,
}


def draw(names: list[str], folder: Path) -> list[Path]:
    """Draw the figures named into ``folder``; the paths written. Progress on stderr."""
    written = []
    with styled():
        for count, name in enumerate(names, 1):
            began = time.monotonic()
            print(f"[{count}/{len(names)}] {name} ...", end=" ", file=sys.stderr, flush=True)
            figure, data = FIGURES[name]()
            paths = save(folder, name, figure, {"figure": name, "shows": FIGURES[name].__doc__, **data})
            print(f"{time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
            written += paths
    return written


def main(arguments: list[str], prog: str = "python -m tokendyn.experiments.figures") -> int:
    """Draw what the arguments ask for; 2 if they cannot be understood."""
    listing = "\n".join(f"  {name:<22} {(make.__doc__ or '').splitlines()[0]}" for name, make in FIGURES.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Draw the figures of token dynamics: PNG, SVG and the data of each.",
        epilog=f"figures (all by default):\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="name", help="which figures")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder to write to (default: figures)")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in FIGURES:
            near = difflib.get_close_matches(name, FIGURES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f", choose from {', '.join(FIGURES)}"
            print(f"{prog}: no figure is called {name!r}{hint}", file=sys.stderr)
            return 2
    paths = draw(options.names or list(FIGURES), options.out)
    print(f"{len(paths)} files in {options.out}")
    return 0
