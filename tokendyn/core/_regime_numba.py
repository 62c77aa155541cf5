"""The decisions of :func:`tokendyn.core._regime.classify_line` for many sequences at once."""

from __future__ import annotations

from tokendyn.core._parallel import kernel

STATIONARY, CONVERGENCE, SLOW, FAST, MIXED, UNDECIDED = range(6)
ENDED = MIXED
THEOREM, DERIVED, CONJECTURE, SIMULATED = range(4)


@kernel()
def classify_rows(first, last, x0, mu, s_delta, bias, kinds, fates, certainties, margins):
    """Rows ``first`` to ``last``: kind and margin of each, fate and certainty of each token.

    ``x0`` has a row a problem or one for all; the parameters likewise have one entry each, or one for all.
    """
    length = fates.shape[1]
    for i in range(first, last):
        row = i if x0.shape[0] > 1 else 0
        m = mu[i if mu.shape[0] > 1 else 0]
        s = s_delta[i if s_delta.shape[0] > 1 else 0]
        b = bias[i if bias.shape[0] > 1 else 0]
        kind = STATIONARY
        ended = False
        zeros = False
        nearest, farthest = float("inf"), 0.0
        for l in range(length):
            x = x0[row, l]
            pull = s * x
            fate = STATIONARY
            known = THEOREM
            if x == 0.0:
                zeros = True
            else:
                nearest = min(nearest, abs(pull))
                farthest = max(farthest, pull)
                ended = ended or pull > 0.0 or s == 0.0
                if m < 0.0:
                    fate = CONVERGENCE
                elif m > 0.0:
                    fate = FAST if ended else SLOW
                    if ended and pull <= 0.0:
                        known = DERIVED
            fates[i, l] = fate
            certainties[i, l] = known
            kind = max(kind, fate)
        if zeros or b != 0.0:
            for l in range(length):
                certainties[i, l] = DERIVED
        kinds[i] = kind
        margin = 0.0
        if kind == CONVERGENCE:
            margin = -m
        elif kind == SLOW:
            margin = min(m, nearest)
        elif kind == FAST:
            margin = min(m, farthest)
        margins[i] = margin
