"""Statistics over users: bootstrap, sign-flip test, Holm's correction, how many users a difference takes.

One value a user, already averaged over the user's test events and over seeds: events of a user are a cluster
and are drawn or flipped together.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import TypedDict, TypeVar

import numpy as np

from llm2rec.evaluation.verdicts import BETTER, MINIMUM_USERS, TOO_FEW, WITHIN_NOISE, WORSE, too_few_users

SIGNIFICANCE = 0.05
POWER = 0.8
CHUNK_BYTES = 32 * 2**20

_ROUNDING = 1e-12
_Key = TypeVar("_Key", bound=Hashable)


class Comparison(TypedDict):
    """One row against the reference, paired over users.

    difference: mean over users; `relative` to the reference's mean, None where that is 0.
    low, high: 95 % percentile bootstrap of the difference, not corrected for the number of rows.
    p, p_holm: two-sided bootstrap p-value, and after Holm's correction over the rows that differ; 1 in others.
    p_sign_flip, p_sign_flip_holm: the same of the randomisation test. The verdict follows the larger of the two.
    verdict: "better", "worse" or "not distinguishable"; with fewer than MINIMUM_USERS "too few users", no test
        is made and every p-value is 1, which claims nothing.
    users: compared users. deviation: standard deviation (n - 1) of their differences, None with one user.
    users_needed: see the function; None where no number is enough.
    """

    difference: float
    relative: float | None
    low: float
    high: float
    p: float
    p_holm: float
    p_sign_flip: float
    p_sign_flip_holm: float
    verdict: str
    users: int
    deviation: float | None
    users_needed: int | None


def compare_paired(
    rows: Mapping[_Key, np.ndarray], bases: Mapping[_Key, np.ndarray], samples: int, seed: int
) -> dict[_Key, Comparison]:
    """Each row against its base, paired over users; Holm over those that differ for any user.

    Where every user has the value of the base, p is 1 by construction: such a row can never be rejected, so that
    the error rate is kept without it, and counted it would only take power from the others.

    Args:
        rows: key -> (U,) value of each user.
        bases: the same keys -> (U,) of the same users.
        samples: resamples of the bootstrap, and sign patterns of the randomisation test; see `enough_samples`.
        seed: of both.
    """
    if not rows:
        return {}
    differences = np.stack([values - bases[key] for key, values in rows.items()], axis=1)  # (U, R)
    differences[np.abs(differences) <= _ROUNDING] = 0.0
    changed = [bool(column.any()) for column in differences.T]
    samples = enough_samples(samples, sum(changed))
    means = bootstrap_means(differences, samples, seed)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    tested = too_few_users(len(differences)) is None
    p_values = _bootstrap_p_values(means) if tested else [1.0] * len(rows)
    flipped = [sign_flip_p(column, samples, seed) if tested else 1.0 for column in differences.T]
    corrected = zip(_holm_where(changed, p_values), _holm_where(changed, flipped), strict=True)
    results: dict[_Key, Comparison] = {}
    for r, (key, (p_holm, flipped_holm)) in enumerate(zip(rows, corrected, strict=True)):
        difference, base = float(differences[:, r].mean()), float(bases[key].mean())
        deviation = float(differences[:, r].std(ddof=1)) if len(differences) > 1 else None
        results[key] = {
            "difference": difference,
            "relative": difference / base if base else None,
            "low": float(low[r]),
            "high": float(high[r]),
            "p": p_values[r],
            "p_holm": p_holm,
            "p_sign_flip": flipped[r],
            "p_sign_flip_holm": flipped_holm,
            "verdict": verdict(difference, max(p_holm, flipped_holm), len(differences)),
            "users": len(differences),
            "deviation": deviation,
            "users_needed": None if deviation is None else users_needed(deviation, difference),
        }
    return results


def enough_samples(samples: int, comparisons: int) -> int:
    """`samples`, or as many as leave a verdict possible, where these are more.

    The smallest p-value of a bootstrap is 2 / (samples + 1), and Holm multiplies it by the comparisons.
    """
    return max(samples, comparisons * round(2 / SIGNIFICANCE))


def verdict(difference: float, p: float, n_users: int) -> str:
    """What may be said of a difference: "better", "worse", "not distinguishable" or "too few users".

    Args:
        p: the larger of the two tests' corrected p-values. Where few users differ at all the percentile bootstrap
            rejects too often (at 4 of 40 in one of eight samples without a difference), the sign-flip test not.
    """
    if too_few_users(n_users) is not None:
        return TOO_FEW
    if p >= SIGNIFICANCE:
        return WITHIN_NOISE
    return BETTER if difference > 0 else WORSE


def bootstrap_means(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Means of `samples` resamples of the users, (samples, C), the same resamples for every column.

    A resample is a vector of how often each user was drawn, so that all columns cost one matrix product;
    resamples are made in chunks of 32 MB whatever the number of users. Users who are 0 in every column, most of
    them where lists are short, are not drawn one by one: how many of a resample's draws fall to the others is
    binomial, which is the same distribution. One column that is never 0, as `mrr` without a cut-off, takes every
    draw; a call of its own for such columns saves nothing, because drawing is what takes the time.

    Args:
        values: (U, C) float64, one row a user.
        samples: number of resamples.
        seed: equal seeds and values give equal resamples.
    """
    n_users, counted = len(values), values[values.any(axis=1)]
    generator = np.random.default_rng(seed)
    means = np.zeros((samples, values.shape[1]))
    if not len(counted):
        return means
    chunk = max(1, CHUNK_BYTES // (8 * len(counted)))
    for start in range(0, samples, chunk):
        counts = np.empty((min(chunk, samples - start), len(counted)))
        for resample in counts:
            draws = generator.binomial(n_users, len(counted) / n_users)
            resample[:] = np.bincount(generator.integers(0, len(counted), draws), minlength=len(counted))
        means[start : start + len(counts)] = counts @ counted / n_users
    return means


def sign_flip_p(differences: np.ndarray, samples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the paired randomisation test, in (0, 1]: 1 where no user differs.

    If the two rows were alike, each user's difference could as well have the other sign: p is the share of
    sign patterns whose mean is at least as far from 0 as the observed one. Where `samples` reaches the number
    of patterns all are counted and p is exact; else as many random patterns are drawn, and one is added to
    both counts, the observed pattern, so that p is never 0. Users without a difference change nothing.

    Args:
        differences: (U,) float64, one a user: one sign flips all test events of a user.
        samples: sign patterns at most.
        seed: of the random patterns.

    Source: Fisher (1935); Smucker, Allan and Carterette (CIKM 2007) for retrieval metrics.
    """
    changed = differences[np.abs(differences) > _ROUNDING]
    if not len(changed):
        return 1.0
    # A pattern as far out as the observed one must not fall short of it by rounding.
    limit = abs(changed.sum()) - 1e-10 * np.abs(changed).sum()
    if len(changed) < 63 and 2 ** len(changed) <= samples:
        patterns = np.arange(2 ** len(changed))[:, None] >> np.arange(len(changed)) & 1
        return float((np.abs((2.0 * patterns - 1) @ changed) >= limit).mean())
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_BYTES // (8 * len(changed)))
    as_far = 0
    for start in range(0, samples, chunk):
        # Whole words of 64 signs: of smaller ones a call throws the rest away, and p would depend on the chunks.
        shape = (min(chunk, samples - start), -(-len(changed) // 64))
        words = generator.integers(0, 2**64 - 1, shape, dtype=np.uint64, endpoint=True)
        bits = np.unpackbits(words.view(np.uint8), axis=1, count=len(changed))
        as_far += int((np.abs(2 * (bits @ changed) - changed.sum()) >= limit).sum())
    return (1 + as_far) / (1 + samples)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected by Holm's step-down method, in the given order, at most 1.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    corrected = [0.0] * len(p_values)
    running = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = running
    return corrected


def _holm_where(counted: Sequence[bool], p_values: Sequence[float]) -> list[float]:
    """`holm` over the p-values that are `counted`, 1 for the others."""
    corrected = iter(holm([p for p, one in zip(p_values, counted, strict=True) if one]))
    return [next(corrected) if one else 1.0 for one in counted]


def users_needed(deviation: float, difference: float) -> int | None:
    """Test users with which such a difference would be told apart from 0; None where it is 0.

    `n = ((z_0.975 + z_0.8) * deviation / difference) ** 2`, rounded up: a two-sided test at 5 % of one
    comparison, without Holm's correction, finds it in 80 % of such samples. At least MINIMUM_USERS, because
    fewer are not tested.

    Args:
        deviation: >= 0, standard deviation over users of the paired difference, from a run or a pilot.
        difference: the difference of interest, in the units of `deviation`; its sign does not matter. An
            observed difference within noise is a poor guess of the true one, and so is the number then.

    Raises:
        ValueError: `deviation` is negative, or a value is not finite.
    """
    _check_deviation(deviation)
    if not math.isfinite(difference):
        raise ValueError(f"the difference is {difference}; it must be finite")
    if abs(difference) <= _ROUNDING:
        return None
    return max(MINIMUM_USERS, math.ceil((_z_sum() * deviation / difference) ** 2))


def _z_sum() -> float:
    return NormalDist().inv_cdf(1 - SIGNIFICANCE / 2) + NormalDist().inv_cdf(POWER)


def _check_deviation(deviation: float) -> None:
    if not (math.isfinite(deviation) and deviation >= 0):
        raise ValueError(f"the standard deviation is {deviation}; it must be finite and at least 0")


def _bootstrap_p_values(means: np.ndarray) -> list[float]:
    """Two-sided p-value of each column of (samples, R) bootstrap means: twice the smaller tail beyond 0."""
    # Rounding must not push a true 0 out of either tail.
    below = (means <= _ROUNDING).sum(axis=0)
    above = (means >= -_ROUNDING).sum(axis=0)
    return np.minimum(1.0, 2 * (1 + np.minimum(below, above)) / (len(means) + 1)).tolist()
