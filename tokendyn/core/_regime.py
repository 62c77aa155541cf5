"""Regimes of the token dynamics on the line: what each token does, how fast, and how far the boundary is.

Sources of each statement: paper 1, Theorems 4.1, 4.3, 4.4 and Lemma 4.2, and the sharp forms derived in the docs on
the dynamics, where each is checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from tokendyn.core._activations import sigmoid, softplus
from tokendyn.core._parallel import run_tiles
from tokendyn.core._regime_numba import (
    CONVERGENCE,
    FAST,
    SLOW,
    STATIONARY,
)
from tokendyn.errors import OptionError

#: What a whole sequence does. "mixed": some tokens go to 0, others to infinity.
KINDS = ("stationary", "convergence", "slow divergence", "fast divergence", "mixed", "undecided")
#: What one token does, by the same numbers. "ended": in R^D its equation ends when an earlier token, which it holds,
#: blows up; its own fate then is not known.
FATES = ("stationary", "convergence", "slow divergence", "blow-up", "ended", "undecided")
#: How a statement is known, from the strongest.
CERTAINTIES = ("theorem", "derived", "conjecture", "simulated")


@dataclass(frozen=True, eq=False)
class Regime:
    """The fate of every token; made by :func:`tokendyn.classify`. Of an ensemble, every array has b in front.

    On the line, with Δ₀ = softplus(bias), the asymptotic laws of tokens that are not 0 are ::

        convergence        |x_l| √t → ((1 - e^{-aΔ₀g}) / (2|μ|Δ₀))^½, for token 1 (2|μ|Δ₀)^{-½}
        slow divergence    |S_Δ| |x_1| = ln t + 3 ln ln t + ln(μ e^bias / S_Δ²) + o(1), x_l / x_1 → r_l
        blow-up            |x_l| (T - t)^⅓ → (3 μ |S_Δ|)^{-⅓}, where S_Δ = 0: |x_l| (T - t)^½ → (2 μ Δ₀)^{-½}

    g counts places back to the last token that is not 0 (1 if no token is 0).

    Attributes:
        kind_code: place of the kind in ``KINDS``.
        fate_codes: (L,) places of the fates in ``FATES``.
        certainty_codes: (L,) places of each fate's certainty in ``CERTAINTIES``.
        margin: on the line the smallest change of μ or of some S_Δ x_l that changes the kind; 0 on a boundary. In
            R^D see the boundary named in ``explain()``; 0 where no margin is known.
        tolerance: problems within this distance of a boundary have it named in ``boundaries``.
        problem: the parameters and x0, by name.
        notes: in R^D what was used to decide, in words.
        trajectory: in R^D the simulation that decided what could not be proved, if there was one.
        members: in R^D the regimes of an ensemble.
    """

    kind_code: Any
    fate_codes: np.ndarray
    certainty_codes: np.ndarray
    margin: Any
    tolerance: float
    problem: dict[str, Any] = field(repr=False)
    notes: tuple[str, ...] = ()
    trajectory: Any = field(default=None, repr=False)
    members: tuple[Regime, ...] = field(default=(), repr=False)

    @property
    def ensemble(self) -> bool:
        """Whether there is more than one problem."""
        return self.fate_codes.ndim == 2

    @property
    def one_channel(self) -> bool:
        """Whether tokens are real numbers."""
        return self.problem.get("mu") is not None

    @property
    def kind(self) -> Any:
        """One of ``KINDS``; of an ensemble an array."""
        return np.array(KINDS)[self.kind_code] if self.ensemble else KINDS[self.kind_code]

    @property
    def fates(self) -> Any:
        """One of ``FATES`` a token: a tuple, of an ensemble an array (b, L)."""
        return np.array(FATES)[self.fate_codes] if self.ensemble else tuple(FATES[code] for code in self.fate_codes)

    @property
    def certainty(self) -> Any:
        """How the weakest of the fates is known: "theorem" (published), "derived", or "simulated"."""
        worst = self.certainty_codes.max(axis=-1)
        return np.array(CERTAINTIES)[worst] if self.ensemble else CERTAINTIES[int(worst)]

    # ------------------------------------------------------------------------------------------ laws on the line

    @cached_property
    def rates(self) -> np.ndarray:
        """(L,) exponents p: ``|x_l| ~ constant · t^p, (ln t)^p, (T - t)^p`` under the three fates; 0 if stationary."""
        self._expect_line("rates")
        s_delta = self._column("s_delta")
        blow_up = np.where(s_delta == 0, -0.5, -1 / 3)
        return np.select(
            [self.fate_codes == code for code in (CONVERGENCE, SLOW, FAST)], [-0.5, 1.0, blow_up], default=0.0
        )

    @cached_property
    def constants(self) -> np.ndarray:
        """(L,) constants beside ``rates``: ``|x_l|`` over its power tends to them.

        Where ``|x_l|`` grows like ln t the constant is ``r_l / |S_Δ|``; r_l is 1 for token 1 and known only by
        simulation for the others (see :meth:`ratios`), for which ``1 / |S_Δ|`` stands here: their least if they begin
        farther out than token 1. A token's blow-up constant holds if it blows up by itself, before the tokens in front
        of it; if S_Δ x_l does not allow that, infinity stands here.
        """
        self._expect_line("constants")
        mu, s_delta, a, bias = (self._column(key) for key in ("mu", "s_delta", "a", "bias"))
        x0 = self.problem["x0"]
        step = softplus(bias)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(self._gap > 0, -np.expm1(-a * step * self._gap), 1.0)
            convergence = np.sqrt(share / (2 * np.abs(mu) * step))
            slow = 1 / np.abs(s_delta)
            blow_up = np.where(
                s_delta == 0,
                np.where(self._gap == 0, (2 * mu * step) ** -0.5, np.inf),
                np.where(s_delta * x0 > 0, (3 * mu * np.abs(s_delta)) ** (-1 / 3), np.inf),
            )
        fates = [self.fate_codes == code for code in (CONVERGENCE, SLOW, FAST)]
        return np.select(fates, np.broadcast_arrays(convergence, slow, blow_up), default=0.0)

    @cached_property
    def time_scales(self) -> np.ndarray:
        """(L,) time from which the laws hold to leading order; infinity where nothing moves.

        Convergence: token 1 forgets its start after ``1/(2|μ|Δ₀x²)``, with x the smaller of ``|x_1|`` and the size at
        which Δ differs from Δ₀; later tokens approach their law like ``t^{-(1-e^{-aΔ₀})}``, so ``e^{1/(1-e^{-aΔ₀})}``
        times later, which for the small Δ₀ of trained layers is beyond any depth. Slow divergence: the time in which
        token 1 alone would have come from near 0. Blow-up: the bound on the time itself.
        """
        self._expect_line("time_scales")
        mu, s_delta, a, bias = (self._column(key) for key in ("mu", "s_delta", "a", "bias"))
        x0 = np.abs(self.problem["x0"])
        step = softplus(bias)
        with np.errstate(all="ignore"):
            near = np.minimum(x0, step / (np.abs(s_delta) * sigmoid(bias)))
            near = np.minimum.accumulate(np.where(x0 > 0, near, np.inf), axis=-1)
            settled = 1 / (2 * np.abs(mu) * step * near**2)
            rate = -np.expm1(-a * step)
            convergence = np.where(self._gap > 0, settled * np.exp(1 / rate), settled)
            reach = np.abs(s_delta) * np.where(x0 > 0, x0, np.inf).min(axis=-1, keepdims=True)
            slow = s_delta**2 / (mu * np.exp(bias)) * np.exp(np.maximum(reach, 3.0)) / np.maximum(reach, 3.0) ** 3
        fates = [self.fate_codes == code for code in (CONVERGENCE, SLOW, FAST)]
        laws = np.broadcast_arrays(convergence, slow, self.blow_up_bounds)
        return np.select(fates, laws, default=np.inf)

    @cached_property
    def blow_up_bounds(self) -> np.ndarray:
        """(L,) times before which each token has gone to infinity: ∫ du/(μ u³ Δ(u)), the least so far in the sequence.

        Exact for token 1. Infinity where a token does not blow up. Derived; sharper than paper 1's 1/(2μΔ(x)x²).
        """
        self._expect_line("blow_up_bounds")
        from tokendyn.core._blow_up_numba import blow_up_bounds

        x0 = np.ascontiguousarray(np.atleast_2d(self.problem["x0"]))
        columns = [np.broadcast_to(self._column(key), (len(x0), 1))[:, 0].copy() for key in ("mu", "s_delta", "bias")]
        bounds = np.empty_like(x0)
        run_tiles(lambda i, j: blow_up_bounds(i, j, x0, *columns, bounds), len(x0), work=300.0 * x0.size)
        return np.where(self.fate_codes == FAST, bounds.reshape(self.fate_codes.shape), np.inf)

    @property
    def blow_up_time(self) -> Any:
        """The exact time at which token 1 goes to infinity: the integral; infinity if it does not."""
        times = self.blow_up_bounds[..., 0]
        return times if self.ensemble else float(times)

    @cached_property
    def decay_bounds(self) -> np.ndarray:
        """(L,) c with ``|x_l(t)| ≤ (2 c |μ| t + x_l0^{-2})^{-½}`` under convergence: the least Δ between 0 and x_l0."""
        self._expect_line("decay_bounds")
        s_delta, bias = self._column("s_delta"), self._column("bias")
        least = softplus(np.minimum(0.0, s_delta * self.problem["x0"]) + bias)
        return np.where(self.fate_codes == CONVERGENCE, least, 0.0)

    def ratios(self, t_end: float = 1e32) -> np.ndarray:
        """(L,) r_l = lim x_l / x_1 under slow divergence, by simulation to ``t_end``; NaN for tokens that are 0.

        Raises:
            OptionError: another regime, or an ensemble.
        """
        self._expect_line("ratios")
        if self.ensemble or self.kind_code != SLOW:
            raise OptionError(f"Regime.ratios: the regime is {self.kind}, expected one problem of slow divergence")
        from tokendyn.core._simulate import simulate

        x0 = self.problem["x0"]
        parameters = {key: self.problem[key] for key in ("mu", "s_delta", "a", "bias")}
        options = {"times": np.array([t_end]), "rtol": 1e-10, "points_per_step": 1, "max_steps": 10_000}
        end = simulate(x0, parameters, sphere=False, t_end=t_end, **options).tokens[0]
        first = end[np.flatnonzero(x0)[0]]
        return np.where(x0 != 0, end / first, np.nan)

    def attention_limit(self) -> tuple[str, np.ndarray]:
        """Where the hidden attention goes: a law in words, and the (L, L) limits that the law speaks of.

        Stationary: P itself. Convergence: ``t P_{lj} → c_l c_j μ Δ₀ e^{-aΔ₀(l-j)}`` with the tokens' signs. Slow
        divergence: ``t |S_Δ| x_1 P_{l1} → r_l``, everything else falls faster. Blow-up: ``P_ll → ∞`` for the token that
        blows up and ``P_lq → 0`` for q < l (paper 1's Theorem 4.4 has that score diverge too, which it does not); rows
        after it are not known.
        """
        self._expect_line("attention_limit")
        if self.ensemble:
            raise OptionError("Regime.attention_limit: this is an ensemble, take one problem with [i] first")
        x0, length = self.problem["x0"], self.fate_codes.shape[0]
        lower = np.tri(length)
        if self.kind_code == STATIONARY:
            return "P is constant", line_attention(x0, self.problem)
        if self.kind_code == CONVERGENCE:
            mu, a, step = float(self.problem["mu"]), float(self.problem["a"]), float(softplus(self.problem["bias"]))
            signed = self.constants * np.sign(x0)
            apart = np.maximum(np.subtract.outer(np.arange(length), np.arange(length)), 0)
            return "t · P → these limits", lower * mu * step * np.outer(signed, signed) * np.exp(-a * step * apart)
        if self.kind_code == SLOW:
            limits = np.zeros((length, length))
            first = int(np.flatnonzero(x0)[0])
            limits[:, first] = np.nan_to_num(self.ratios())
            return f"t · |S_Δ| |x_{first + 1}| · P → these limits", limits
        ends = int(np.argmin(self.blow_up_bounds))
        limits = np.where(lower > 0, np.nan, 0.0)
        limits[ends, :ends] = 0.0
        limits[ends, ends] = np.inf
        return f"P → these limits as token {ends + 1} blows up, if it is the first to; NaN: not known", limits

    # -------------------------------------------------------------------------------------------------- the rest

    @cached_property
    def boundaries(self) -> tuple[str, ...]:
        """Names of the boundaries on which the problem lies, or within ``tolerance``."""
        if self.ensemble:
            raise OptionError("Regime.boundaries: this is an ensemble, take one problem with [i] first")
        from tokendyn.core._regime_text import boundaries

        return boundaries(self)

    def explain(self) -> str:
        """The regime in words: what decides it, what each token does and how fast, and where that is stated."""
        if self.ensemble:
            raise OptionError("Regime.explain: this is an ensemble, take one problem with [i] first")
        from tokendyn.core._regime_text import explain

        return explain(self)

    def __str__(self) -> str:
        if self.ensemble:
            counts = np.bincount(self.kind_code, minlength=len(KINDS))
            parts = [f"{count} {kind}" for kind, count in zip(KINDS, counts, strict=True) if count]
            return f"{len(self.kind_code)} problems: {', '.join(parts)}"
        return f"{self.kind} ({self.certainty}); tokens: {', '.join(self.fates)}"

    def __len__(self) -> int:
        return len(self.fate_codes)

    def __getitem__(self, i: int) -> Regime:
        """Problem ``i`` of an ensemble."""
        if not self.ensemble:
            raise OptionError("Regime[i]: this is one problem, only an ensemble is indexed")
        if self.members:
            return self.members[i]
        from tokendyn.core._simulate import member_parameters

        size = len(self.fate_codes)
        return Regime(
            int(self.kind_code[i]),
            self.fate_codes[i],
            self.certainty_codes[i],
            float(self.margin[i]),
            self.tolerance,
            member_parameters(self.problem, i, size),
        )

    def _expect_line(self, what: str) -> None:
        if not self.one_channel:
            raise OptionError(f"Regime.{what}: laws with constants are known on the line only (mu was not given)")

    def _column(self, key: str) -> np.ndarray:
        """A parameter of the line in a shape that multiplies (…, L)."""
        value = np.asarray(self.problem[key])
        return value[:, None] if value.ndim else value

    @cached_property
    def _gap(self) -> np.ndarray:
        """Places back to the last token before l that is not 0, and 0 if there is none."""
        present = self.problem["x0"] != 0
        places = np.where(present, np.arange(present.shape[-1]), -1)
        last = np.maximum.accumulate(places, axis=-1)
        before = np.concatenate([np.full((*last.shape[:-1], 1), -1), last[..., :-1]], axis=-1)
        return np.where(before < 0, 0, np.arange(present.shape[-1]) - before)


def line_attention(x: np.ndarray, problem: dict[str, Any]) -> np.ndarray:
    """The hidden attention (L, L) of tokens x on the line: (11)."""
    from tokendyn.core._attention import hidden_attention

    mu, s_delta, a, bias = (float(problem[key]) for key in ("mu", "s_delta", "a", "bias"))
    row = x[None, None]
    P = hidden_attention(s_delta * row + bias, np.array([-a]), row, mu * row, delta_softplus=True)
    return P[0, 0]


def classify_line(x0: np.ndarray, parameters: dict[str, Any], tolerance: float) -> Regime:
    """Regime of one sequence (L,) or of an ensemble (b, L) on the line.

    A token that is not 0 converges if μ < 0 (Theorem 4.1). If μ > 0 let m be the first token with S_Δ x_m > 0, or
    the first of all if S_Δ = 0: those before it diverge slowly (Lemma 4.2: they do not feel it), it blows up (Theorem
    4.4), and so do all after it (derived). With a bias the theorems' proofs carry over, their statements do not:
    "derived".
    """
    from tokendyn.core._regime_numba import classify_rows

    columns = [np.atleast_1d(parameters[key]) for key in ("mu", "s_delta", "bias")]
    rows = np.ascontiguousarray(np.atleast_2d(x0))
    single = x0.ndim == 1 and not any(np.ndim(parameters[key]) for key in ("mu", "s_delta", "a", "bias"))
    size, length = max(len(rows), *map(len, columns), np.size(parameters["a"])), rows.shape[1]
    kinds, margins = np.empty(size, np.int8), np.empty(size)
    fates, certainties = np.empty((size, length), np.int8), np.empty((size, length), np.int8)

    def compute(first: int, last: int) -> None:
        classify_rows(first, last, rows, *columns, kinds, fates, certainties, margins)

    run_tiles(compute, size, work=3.0 * size * length)
    problem = {"x0": x0, **{key: parameters[key] for key in ("mu", "s_delta", "a", "bias")}}
    if single:
        return Regime(int(kinds[0]), fates[0], certainties[0], float(margins[0]), tolerance, problem)
    problem["x0"] = np.broadcast_to(rows, fates.shape)
    return Regime(kinds, fates, certainties, margins, tolerance, problem)
