"""RecBole: `Trainer._train_epoch` over its data loader, and `Trainer.evaluate` in full mode.

Kept as it ships: one sample a target, supervised at its end; pads up to LENGTH; a class for the pad; norms after
the blocks. Its feed-forward network is set to the width and activation of the others.
"""

import itertools
import time
from pathlib import Path

import recbole
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import FullSortEvalDataLoader, TrainDataLoader
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_logger, init_seed
from side import (
    CUTOFF,
    DROPOUT,
    HEADS,
    HIDDEN,
    LAYERS,
    LEARNING_RATE,
    LENGTH,
    RANKS,
    TRAINING,
    Done,
    Log,
    Side,
    serve,
    share_of,
)

NAME = "log"


def settings(folder: Path) -> dict:
    """Equal sizes, leave-one-out by place, full softmax, full ranking."""
    return {
        "data_path": str(folder),
        "state": "ERROR",
        "use_gpu": False,
        "show_progress": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "metrics": ["Recall", "NDCG", "MRR"],
        "topk": [CUTOFF],
        "valid_metric": f"NDCG@{CUTOFF}",
        "MAX_ITEM_LIST_LENGTH": LENGTH,
        "hidden_size": HIDDEN,
        "inner_size": HIDDEN,
        "hidden_act": "relu",
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "hidden_dropout_prob": DROPOUT,
        "attn_dropout_prob": DROPOUT,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "learner": "adam",
        "learning_rate": LEARNING_RATE,
    }


def write_atomic(log: Log, folder: Path) -> None:
    """The log as RecBole's file of interactions; the timestamp is the place in the user's sequence."""
    lines = ["user_id:token\titem_id:token\ttimestamp:float\n"]
    for user, (start, end) in enumerate(itertools.pairwise(log.offsets.tolist())):
        lines += [f"{user}\t{item}\t{place}\n" for place, item in enumerate(log.items[start:end].tolist())]
    folder.mkdir()
    (folder / f"{NAME}.inter").write_text("".join(lines), encoding="utf-8")


class Share:
    """The first batches of a loader, for a trainer that takes whole epochs."""

    def __init__(self, loader: TrainDataLoader, batches: int) -> None:
        self.loader, self.batches, self.targets = loader, batches, 0

    def __iter__(self):
        for batch in itertools.islice(self.loader, self.batches):
            self.targets += len(batch)
            yield batch


def make(log: Log, round_targets: int) -> Side:
    """RecBole over a log."""
    folder = Path("data").absolute()
    folder.mkdir()
    write_atomic(log, folder / NAME)
    config = Config(model="SASRec", dataset=NAME, config_dict=settings(folder))
    init_logger(config)
    init_seed(config["seed"], config["reproducibility"])
    train, _, test = data_preparation(config, create_dataset(config))
    trainer = Trainer(config, SASRec(config, train.dataset))

    def training(batch: int) -> Done:
        config["train_batch_size"] = batch
        loader = TrainDataLoader(config, train.dataset, None, shuffle=True)
        share = Share(loader, share_of(len(loader), log, round_targets))
        began = time.perf_counter()
        trainer._train_epoch(share, 0)
        return share.targets, time.perf_counter() - began

    def ranks(batch: int) -> Done:
        config["eval_batch_size"] = batch
        loader = FullSortEvalDataLoader(config, test.dataset, None)
        began = time.perf_counter()
        trainer.evaluate(loader, load_best_model=False)
        return len(test.dataset), time.perf_counter() - began

    return Side(
        f"RecBole {recbole.__version__}",
        train.dataset.item_num - 1,
        {TRAINING: training, RANKS: ranks},
        {TRAINING: (256, 512, 1024, 2048), RANKS: (128, 512, 1024, 4096)},
    )


if __name__ == "__main__":
    serve(make)
