"""Pictures of a trajectory: one that stands, and one that moves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from tokendyn import Trajectory
from tokendyn.core._plot import colour, draw_ball
from tokendyn.errors import EngineError, OptionError

FRAMES, SECONDS = 120, 8.0


def require_matplotlib() -> None:
    """Raise an EngineError, before any work, where nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EngineError("drawing needs matplotlib; run: pip install 'tokendyn[experiments]'")


def expect_drawable(plot: Path | None, animation: Path | None) -> None:
    """Say what no picture can be written to, before the simulation that it is of.

    Raises:
        OptionError: a suffix that is no format, or a folder that is not there.
        EngineError: matplotlib is missing, or ffmpeg for an MP4.
    """
    if plot is None and animation is None:
        return
    require_matplotlib()
    from matplotlib.animation import FFMpegWriter

    formats = {"--plot": sorted(_figure().canvas.get_supported_filetypes()), "--animate": ["gif", "mp4"]}
    for option, path in (("--plot", plot), ("--animate", animation)):
        if path is None:
            continue
        suffix = path.suffix.lower().removeprefix(".")
        if suffix not in formats[option]:
            names = ", ".join(f".{name}" for name in formats[option])
            raise OptionError(f"{option} {path}: expected a name that ends in one of {names}")
        if not path.parent.is_dir():
            raise OptionError(f"{option} {path}: there is no folder {path.parent}; make it first")
        if suffix == "mp4" and not FFMpegWriter.isAvailable():
            raise EngineError(f"--animate {path}: MP4 needs ffmpeg, which is not installed; use a .gif instead")


def _figure() -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(6, 4.5), layout="constrained")


def save_plot(trajectory: Trajectory, path: Path) -> None:
    """Draw the trajectory into ``path``, which :func:`expect_drawable` has let pass; its suffix is the format."""
    figure = _figure()
    trajectory.plot(figure.add_subplot(projection="3d" if _on_ball(trajectory) else None))
    figure.savefig(path, dpi=150)


def save_animation(trajectory: Trajectory, path: Path) -> None:
    """Tokens moving over depth, as a GIF or, where ffmpeg is installed, an MP4.

    Frames follow the integrator's steps, so that time runs slowly where much happens.
    """
    from matplotlib.animation import FFMpegWriter, FuncAnimation, PillowWriter

    figure = _figure()
    frames = np.unique(np.linspace(0, len(trajectory) - 1, min(FRAMES, len(trajectory))).astype(int))
    draw = _scene(trajectory, figure)
    rate = max(1, round(len(frames) / SECONDS))
    writer = PillowWriter(fps=rate) if path.suffix.lower() == ".gif" else FFMpegWriter(fps=rate)
    FuncAnimation(figure, draw, frames=frames.tolist(), blit=False, cache_frame_data=False).save(path, writer, dpi=90)


def _on_ball(trajectory: Trajectory) -> bool:
    return trajectory.sphere and trajectory.tokens.shape[2] == 3


def _scene(trajectory: Trajectory, figure: Any) -> Any:
    """Axes with the tokens as points and their paths so far; returns what moves them to a row."""
    tokens = np.where(np.isfinite(trajectory.tokens), trajectory.tokens, np.nan)
    length = tokens.shape[1]
    if _on_ball(trajectory):
        ax, places = figure.add_subplot(projection="3d"), tokens
        draw_ball(ax)
    else:
        ax = figure.add_subplot()
        if trajectory.one_channel:
            places = np.stack([np.broadcast_to(np.arange(length) + 1.0, tokens.shape), tokens], axis=-1)
            ax.set(xlabel="token", ylabel="x", xlim=(0.5, length + 0.5))
            ax.set_xticks(range(1, length + 1))
        else:
            places = tokens[..., :2]
            ax.set(xlabel="channel 1", ylabel="channel 2")
        reach = 1.1 * min(np.nanmax(np.abs(places[..., 1:])), 4 * np.abs(trajectory.start).max())
        ax.set_ylim(-reach, reach)
        if not trajectory.one_channel:
            ax.set_xlim(-reach, reach)
            ax.set_aspect("equal")
        ax.axhline(0, color="#999999", linewidth=0.6)
    paths = [ax.plot(*places[:1, l].T, color=colour(l), linewidth=1, alpha=0.7)[0] for l in range(length)]
    points = [ax.plot(*places[:1, l].T, "o", color=colour(l), markersize=6)[0] for l in range(length)]

    def draw(row: int) -> list[Any]:
        for l in range(length):
            for artist, rows in ((paths[l], slice(0, row + 1)), (points[l], slice(row, row + 1))):
                artist.set_data(*places[rows, l].T[:2])
                if places.shape[-1] == 3:
                    artist.set_3d_properties(places[rows, l, 2])
        ended = int((trajectory.ended_at <= trajectory.times[row]).sum())
        ax.set_title(f"t = {trajectory.times[row]:.4g}" + (f", {ended} of {length} tokens ended" if ended else ""))
        return [*paths, *points]

    return draw
