"""The stages of a run: what each one's inputs are, and how it is executed.

A stage is described without importing torch; what trains is imported when it is executed.
"""

from llm2rec.stages.base import Stage, language_sets, load_domain, row_variants, trained_rows, vector_sets
from llm2rec.stages.data import prepare_stages
from llm2rec.stages.evaluation import evaluate_stages
from llm2rec.stages.language import encode_stages, language_stages
from llm2rec.stages.recommenders import fit_stages, fitted

__all__ = [
    "Stage",
    "encode_stages",
    "evaluate_stages",
    "fit_stages",
    "fitted",
    "language_stages",
    "language_sets",
    "load_domain",
    "prepare_stages",
    "row_variants",
    "trained_rows",
    "vector_sets",
]
