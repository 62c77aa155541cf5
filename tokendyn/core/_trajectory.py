"""What a simulation returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokendyn.errors import OptionError


@dataclass(frozen=True)
class Event:
    """Something that happened to one token.

    Attributes:
        time: when.
        kind: ``"blow-up"``: the token went to infinity; ``"ended"``: an earlier token did, which this token's
            equation holds.
        index: where the token stands in arrays, from 0: token 1 has index 0.
        cause: index of the token that blew up.
    """

    time: float
    kind: str
    index: int
    cause: int

    def __str__(self) -> str:
        if self.kind == "blow-up":
            return f"t = {self.time:.9g}: token {self.index + 1} blows up"
        return f"t = {self.time:.9g}: token {self.index + 1} ends with token {self.cause + 1}"


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Tokens over depth; made by :func:`tokendyn.simulate` and :func:`tokendyn.simulate_sphere`.

    T times, L tokens, D channels; an ensemble has b in front of every array but ``times``. Words and formulas count
    tokens from 1, as the papers do; arrays are indexed from 0, so token l is ``tokens[:, l - 1]``.

    The dynamics is triangular: token l moves by tokens 1 to l only. When token l blows up, its equation and those of
    all later tokens end, for they hold token l, while the tokens before it go on. From then on an ended token is
    infinite, each coordinate with the sign it had last; on the line that is its limit (every later token that is not
    0 blows up too), in R^D it is a mark. A single trajectory that stops early has fewer times; in an ensemble, whose
    times are shared, the rows that a trajectory did not reach are NaN, and its reason says why.

    Attributes:
        times: (T,).
        tokens: (T, L) on the line, else (T, L, D).
        ended_at: (L,) time at which a token ended, infinity if it did not.
        ended_by: (L,) index of the token whose blow-up ended it, -1 if none did.
        reason: why the simulation stopped: ``"reached t_end"``, ``"all tokens ended"``, ``"tolerance unreachable"``
            (the error of a step stays above ``rtol`` however small the step), ``"overflow"`` (beyond float64 in finite
            time without a blow-up, as under Euclidean attention), ``"max_steps reached"``, or ``"interrupted"``. Of an
            ensemble an array.
        stopped_at: the time reached: t_end, or the time of the last blow-up if no token is left.
        steps, rejected, evaluations: what it took; None of PyTorch tensors and JAX arrays.
        problem: the parameters, by name.
        start: the tokens at time 0.
        sphere: whether this is on the unit sphere.
    """

    times: np.ndarray
    tokens: np.ndarray
    ended_at: np.ndarray
    ended_by: np.ndarray
    reason: Any
    stopped_at: Any
    steps: Any
    rejected: Any
    evaluations: Any
    problem: dict[str, Any] = field(repr=False)
    start: np.ndarray = field(repr=False)
    sphere: bool

    @property
    def one_channel(self) -> bool:
        """Whether tokens are real numbers."""
        return self.problem.get("mu") is not None

    @property
    def ensemble(self) -> bool:
        """Whether there is more than one trajectory."""
        return self.tokens.ndim - (2 if self.one_channel else 3) == 1

    @property
    def alive(self) -> np.ndarray:
        """(T, L) booleans: the token's equation has not ended."""
        return self.times[:, None] < np.expand_dims(self.ended_at, -2)

    @property
    def events(self) -> tuple[Event, ...]:
        """Blow-ups and ends, by time. Of one trajectory; of an ensemble see ``ended_at`` and ``ended_by``."""
        self._expect_one("events")
        found = [
            Event(float(time), "blow-up" if cause == index else "ended", index, int(cause))
            for index, (time, cause) in enumerate(zip(self.ended_at, self.ended_by, strict=True))
            if cause >= 0
        ]
        return tuple(sorted(found, key=lambda event: (event.time, event.index)))

    def attention(self, index: int) -> np.ndarray:
        """Hidden attention at ``times[index]``: (L, L) on the line, (D, L, L) in R^D; NaN where a token has ended.

        Cost: O(D L² N). On the sphere the scores of the tokens, before projection.
        """
        self._expect_one("attention")
        from tokendyn.core._attention import hidden_attention

        x, p = self.tokens[index], self.problem
        if p.get("s_delta") is None:
            raise OptionError("Trajectory.attention: hidden attention belongs to selective state space models")
        living = np.isfinite(x) if self.one_channel else np.isfinite(x).all(axis=1)
        count = int(living.argmin()) if not living.all() else len(living)
        x = x[:count]
        if self.one_channel:
            channels, a = x[None, None], np.reshape(p["a"], 1)
            B, C, delta = channels, p["mu"] * channels, p["s_delta"] * channels + p["bias"]
        else:
            D = x.shape[1]
            S_B, S_C = (p["M"], np.eye(D)) if p["S_B"] is None else (p["S_B"], p["S_C"])
            delta = np.broadcast_to((x @ np.atleast_2d(p["s_delta"]).T + p["bias"]).T, (D, count))[None]
            a = p["a"] if np.ndim(p["a"]) else np.full(D, p["a"])
            B, C = (x @ S_B.T).T[None], (x @ S_C.T).T[None]
        P = hidden_attention(delta, -a, B, C, delta_softplus=True)[0]
        whole = np.full((*P.shape[:1], len(living), len(living)), np.nan)
        whole[:, :count, :count] = P
        return whole[0] if self.one_channel else whole

    def plot(self, ax: Any = None, *, laws: bool = True) -> Any:
        """Draw the tokens over depth, with matplotlib.

        On the line tokens over time, their predicted laws dashed beside them, blow-ups dotted; in the plane their
        paths; in more dimensions their norms; on the sphere their paths (D = 3) or their cosines with token 1.

        Args:
            ax: axes to draw into; new ones by default (three-dimensional for the sphere of R^3).
            laws: on the line, draw the predicted laws too.

        Returns:
            The axes.

        Raises:
            EngineError: matplotlib is not installed.
            OptionError: this is an ensemble.
        """
        self._expect_one("plot")
        from tokendyn.core._plot import plot

        return plot(self, ax, laws=laws)

    @property
    def regime(self) -> Any:
        """:func:`tokendyn.classify` of the initial tokens, on the sphere :func:`tokendyn.classify_sphere`."""
        from tokendyn._dynamics import classify, classify_sphere

        if self.sphere:
            return classify_sphere(x0=self.start, **self.problem)
        if self.problem.get("s_delta") is None:
            raise OptionError("Trajectory.regime: attention in Euclidean space has none, tokens diverge exponentially")
        return classify(x0=self.start, **self.problem)

    def __len__(self) -> int:
        return len(self.times)

    def __str__(self) -> str:
        if self.ensemble:
            return f"{len(self.tokens)} trajectories of {self.tokens.shape[2]} tokens at {len(self.times)} times"
        effort = "" if self.steps is None else f" ({self.steps} steps, {self.rejected} rejected)"
        lines = [
            f"{self.tokens.shape[1]} tokens at {len(self.times)} times up to t = {self.stopped_at:.9g}: "
            f"{self.reason}{effort}"
        ]
        return "\n".join([*lines, *map(str, self.events)])

    def _expect_one(self, what: str) -> None:
        if self.ensemble:
            raise OptionError(f"Trajectory.{what}: this is an ensemble, take one trajectory with [i] first")

    def __getitem__(self, i: int) -> Trajectory:
        """Trajectory ``i`` of an ensemble."""
        if not self.ensemble:
            raise OptionError("Trajectory[i]: this is one trajectory, only an ensemble is indexed")
        size = len(self.tokens)
        if not -size <= i < size:
            raise IndexError(f"trajectory {i} of an ensemble of {size}")
        from tokendyn.core._simulate import member_parameters

        return Trajectory(
            times=self.times,
            tokens=self.tokens[i],
            ended_at=self.ended_at[i],
            ended_by=self.ended_by[i],
            reason=str(self.reason[i]),
            stopped_at=float(self.stopped_at[i]),
            steps=int(self.steps[i]),
            rejected=int(self.rejected[i]),
            evaluations=int(self.evaluations[i]),
            problem=member_parameters(self.problem, i, size),
            start=self.start[i],
            sphere=self.sphere,
        )
