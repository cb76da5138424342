"""Words and marks of a comparison, shared by tests, tables and figures; light to import."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

BETTER, WORSE, WITHIN_NOISE = "better", "worse", "not distinguishable"
TOO_FEW = "too few users"
REFERENCE = "reference"
COMPARED_METRIC = "ndcg@10"
MARKS = {BETTER: "▲", WORSE: "▼", WITHIN_NOISE: "≈", TOO_FEW: "?", REFERENCE: ""}
COLD_TARGET = "no training event"  # the slice of `item_training` with such targets
MINIMUM_USERS = 30  # below, a test says more about its assumptions than about the users


def verdict_of(metrics: Mapping[str, Any], row: str) -> str:
    """Verdict on a row in the content of `metrics.json`: REFERENCE for the reference row itself.

    Raises:
        KeyError: the row is neither the reference nor compared with it.
    """
    return REFERENCE if row == metrics["reference"] else str(metrics["comparisons"][row]["verdict"])


def corrected_for(comparisons: Iterable[Mapping[str, Any]]) -> str:
    """What Holm's correction counts, in words: `3 rows that differ`."""
    counted = sum(differs(result) for result in comparisons)
    return "1 row that differs" if counted == 1 else f"{counted} rows that differ"


def differs(result: Mapping[str, Any]) -> bool:
    """Whether a compared row has another value than its base for any user."""
    return bool(result["difference"] or result["deviation"])


def too_few_users(n_users: int) -> str | None:
    """The warning where too few users were tested to compare rows, or None where they are enough."""
    if n_users >= MINIMUM_USERS:
        return None
    return (
        f"Only {n_users} test user{'' if n_users == 1 else 's'}: rows are not compared below {MINIMUM_USERS}, and "
        "the intervals are rough. Test more users."
    )
