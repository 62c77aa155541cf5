"""Means and deviations over seeds, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value) and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": list(values)}


def paired(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """:func:`summary` of the differences, with the 95 % interval of their mean (Student's t; None for one pair)."""
    from scipy.special import stdtrit  # the quantile alone: scipy.stats takes a second and a half to load

    differences = [value - other for value, other in zip(values, reference, strict=True)]
    result = summary(differences)
    result["interval95"] = None
    if len(differences) > 1:
        reach = float(stdtrit(len(differences) - 1, 0.975)) * result["deviation"] / math.sqrt(len(differences))
        result["interval95"] = [result["mean"] - reach, result["mean"] + reach]
    return result
