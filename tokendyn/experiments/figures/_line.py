"""Figures 1, 2 and 3 of paper 1: the three regimes on the line, with the laws beside the tokens."""

from __future__ import annotations

import numpy as np

from tokendyn import classify, simulate
from tokendyn.core._plot import colour, law
from tokendyn.experiments.figures._style import Drawn, heat_maps, new_figure, thinned, two_rows

CONVERGENCE = {"mu": -1.5, "s_delta": -0.4, "a": 1.0, "x0": [1.8, -1.2, 0.9, -0.6, 1.5]}
SLOW = {"mu": 1.0, "s_delta": -0.8, "a": 1.0, "x0": [2.65, 2.9, 3.2, 3.6, 4.1]}
FAST = {"mu": 1.0, "s_delta": 0.7, "a": 1.0, "x0": [0.3, -1.0, 1.2]}


def convergence() -> Drawn:
    """Figure 1: tokens shrink like t^(-1/2), whatever their start; hidden attention like 1/t."""
    regime = classify(**CONVERGENCE)
    early = simulate(**CONVERGENCE, t_end=4.0)
    late = simulate(**CONVERGENCE, t_end=1e8)
    figure = new_figure(10, 6)
    above, below = two_rows(figure, 3, 2.2)
    left, right = above.subplots(1, 2)
    early.plot(left, laws=False)
    left.set_title("tokens at first")
    shown = late.times > 1e-2
    for l in range(late.tokens.shape[1]):
        right.loglog(late.times[shown], np.abs(late.tokens[shown, l]), color=colour(l))
        right.loglog(
            late.times[shown], law(regime, l, late.times[shown], np.inf), "--", color=colour(l), linewidth=1, alpha=0.8
        )
    right.plot([], [], "--", color="#666666", linewidth=1, label="c t^(-1/2), c as predicted")
    right.set_xlabel("depth t")
    right.set_ylabel("|x|")
    right.set_title(f"and later: √t |x| → {regime.constants[0]:.3f} (token 1), {regime.constants[1]:.3f} (all others)")
    right.legend()
    times = [0.0, 0.3, 3.0, 1e3]
    heat = simulate(**CONVERGENCE, t_end=1e3, times=times)
    attentions = [heat.attention(i) for i in range(len(times))]
    heat_maps(below, attentions, times)
    end = np.abs(late.tokens[-1]) * np.sqrt(late.times[-1])
    return figure, {
        "parameters": CONVERGENCE,
        "early": thinned(early),
        "late": thinned(late),
        "constants": {"predicted": regime.constants, "measured at t_end": end, "t_end": late.times[-1]},
        "attention": {"times": times, "P": attentions},
    }


def slow_divergence() -> Drawn:
    """Figure 2: every token grows like ln t, in a constant ratio to the first; attention gathers on token 1."""
    regime = classify(**SLOW)
    ratios = regime.ratios()
    early = simulate(**SLOW, t_end=40.0)
    late = simulate(**SLOW, t_end=1e32)
    figure = new_figure(10, 6)
    above, below = two_rows(figure, 3, 2.2)
    left, right = above.subplots(1, 2)
    early.plot(left, laws=False)
    left.set_title("tokens at first")
    shown = late.times > 1e-1
    first = law(regime, 0, late.times[shown], np.inf)
    for l, ratio in enumerate(ratios):
        right.semilogx(late.times[shown], late.tokens[shown, l], color=colour(l), label=f"r = {ratio:.4f}")
        right.semilogx(late.times[shown], ratio * first, "--", color=colour(l), linewidth=1, alpha=0.8)
    right.plot([], [], "--", color="#666666", linewidth=1, label="r (ln t + 3 ln ln t + c)/|S|")
    right.set_ylim(0, 1.05 * late.tokens[-1].max())
    right.set_xlabel("depth t")
    right.set_title("and to t = 10^32: each like ln t, in a ratio r to token 1")
    right.legend(ncols=2)
    times = [0.0, 10.0, 1e3, 1e8]
    heat = simulate(**SLOW, t_end=1e8, times=times)
    attentions = [heat.attention(i) for i in range(len(times))]
    heat_maps(below, attentions, times)
    return figure, {
        "parameters": SLOW,
        "early": thinned(early),
        "late": thinned(late),
        "ratios": ratios,
        "attention": {"times": times, "P": attentions},
    }


def fast_divergence() -> Drawn:
    """Figure 3: a token blows up in finite time, those before it live on; only the diagonal of its row diverges."""
    regime = classify(**FAST)
    whole = simulate(**FAST, t_end=7.0, rtol=1e-11)
    figure = new_figure(10, 6)
    above, below = two_rows(figure, 3, 2.2)
    left, right = above.subplots(1, 2)
    whole.plot(left)
    left.set_xscale("symlog", linthresh=0.3)
    left.set_xticks([0, 0.1, 0.2, 0.3, 1, 6], ["0", "0.1", "0.2", "0.3", "1", "6"])
    left.set_xlim(0, 8)
    left.set_ylim(-8, 8)
    left.set_title("token 3 ends at T = 0.2127, tokens 1 and 2 at 6.2013")
    ends = {}
    for l in (0, 2):
        T = whole.ended_at[l]
        near = (whole.times < T * (1 - 1e-12)) & (np.abs(whole.tokens[:, l]) < 1e4)
        remaining = T - whole.times[near]
        right.loglog(remaining, np.abs(whole.tokens[near, l]), color=colour(l), label=f"token {l + 1}")
        right.loglog(remaining, law(regime, l, whole.times[near], T), "--", color=colour(l), linewidth=1)
        ends[f"token {l + 1}"] = {"T": T, "left": remaining, "x": whole.tokens[near, l]}
    right.plot([], [], "--", color="#666666", linewidth=1, label="(3 μ |S| (T - t))^(-1/3)")
    right.invert_xaxis()
    right.set_xlabel("time left, T - t")
    right.set_ylabel("|x|")
    right.set_title("the blow-ups and their law")
    right.legend()
    times = [0.0, 0.15, 0.21, 0.2127]
    heat = simulate(**FAST, t_end=0.2127, times=times)
    attentions = [heat.attention(i) for i in range(len(times))]
    heat_maps(below, attentions, times)
    return figure, {
        "parameters": FAST,
        "trajectory": thinned(whole),
        "bounds": regime.blow_up_bounds,
        "blow-ups": ends,
        "attention": {"times": times, "P": attentions},
    }
