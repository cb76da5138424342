"""The metrics of RecBole or ranx on given scores: `python metrics.py recbole|ranx SCORES.npz` prints JSON."""

import json
import os
import sys

import numpy as np
import torch

CUTOFFS = (1, 5, 10, 20)


def recbole_metrics(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Through its collector, which takes the top k, and its evaluator."""
    from recbole.config import Config
    from recbole.evaluator import Collector, Evaluator

    wanted = {"metrics": ["Recall", "NDCG", "MRR", "Hit"], "topk": list(CUTOFFS), "metric_decimal_place": 15}
    wanted |= {"use_gpu": False, "valid_metric": "MRR@10", "train_neg_sample_args": None}
    config = Config(model="SASRec", dataset="ml-100k", config_dict=wanted)
    collector = Collector(config)
    rows = torch.arange(len(scores))
    collector.eval_batch_collect(torch.from_numpy(scores), None, rows, torch.from_numpy(targets))
    return Evaluator(config).evaluate(collector.get_data_struct())


def ranx_metrics(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Over whole rankings, the items named by their column."""
    from ranx import Qrels, Run, evaluate

    named = [f"i{column}" for column in range(scores.shape[1])]
    wanted = Qrels({f"u{row}": {named[target]: 1} for row, target in enumerate(targets.tolist())})
    given = Run({f"u{row}": dict(zip(named, values, strict=True)) for row, values in enumerate(scores.tolist())})
    names = {"recall": "recall", "ndcg": "ndcg", "mrr": "mrr", "hit_rate": "hit"}
    found = evaluate(wanted, given, [f"{name}@{k}" for name in names for k in CUTOFFS])
    return {f"{names[name]}@{k}": found[f"{name}@{k}"] for name in names for k in CUTOFFS}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print
    with np.load(sys.argv[2]) as arrays:
        metrics = {"recbole": recbole_metrics, "ranx": ranx_metrics}[sys.argv[1]]
        found = metrics(arrays["scores"], arrays["targets"])
    answers.write(json.dumps({name: float(value) for name, value in found.items()}) + "\n")
    answers.flush()
