"""Words and marks of a comparison, shared by tests, tables and figures; light to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BETTER, WORSE, WITHIN_NOISE = "better", "worse", "not distinguishable"
REFERENCE = "reference"
COMPARED_METRIC = "ndcg@10"
MARKS = {BETTER: "▲", WORSE: "▼", WITHIN_NOISE: "≈", REFERENCE: ""}


def verdict_of(metrics: Mapping[str, Any], row: str) -> str:
    """Verdict on a row in the content of `metrics.json`: REFERENCE for the reference row itself.

    Raises:
        KeyError: the row is neither the reference nor compared with it.
    """
    return REFERENCE if row == metrics["reference"] else str(metrics["comparisons"][row]["verdict"])
