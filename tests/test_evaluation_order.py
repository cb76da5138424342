"""Whether a recommender uses the order: scorers that do and do not, planted."""

import polars as pl
import pytest
import torch

from conftest import prepared_cycle
from llm2rec.data.sequences import TEST
from llm2rec.evaluation import protocol
from llm2rec.evaluation.diagnosis import Probed, diagnose
from llm2rec.evaluation.order import AS_IT_WAS, REVERSED, SHUFFLED, Reordered, order_probe
from llm2rec.evaluation.probes import NothingToMeasure
from llm2rec.rec.baselines import Popularity
from test_evaluation_protocol import NextOnTheCircle

FAILURE = "a recommender that does not use the order"


class SetOnTheCircle:
    """Scores what any item of the history is followed by, whatever their order."""

    def __init__(self, n_items):
        self.n_items = n_items

    def score(self, histories):
        """One point for each item of the history that comes just before."""
        votes = torch.zeros(len(histories), self.n_items + 1)
        votes.scatter_(1, histories % self.n_items + 1, (histories > 0).float())
        return votes[:, 1:]


@pytest.fixture(scope="module")
def circle(tmp_path_factory):
    sequences, _ = prepared_cycle(tmp_path_factory.mktemp("circle"))
    return sequences


def probed(sequences, scorers, history_length=4, mask_history=False):
    ranked = []
    for seed, scorer in enumerate(scorers):
        one = protocol.evaluate(scorer, sequences, TEST, history_length, mask_history=mask_history)
        ranked.append(protocol.per_user_table(one, sequences, "sasrec-id", seed))
    options = {"history_length": history_length, "mask_history": mask_history, "samples": 200}
    table = pl.concat(ranked)
    return table, order_probe(dict(enumerate(scorers)), table, sequences, TEST, **options)


def test_a_scorer_that_uses_the_order_falls_without_it_and_nothing_is_named(circle):
    _, found = probed(circle, [NextOnTheCircle(circle.n_items)])
    assert found["ndcg@10"][AS_IT_WAS]["mean"] == 1.0 and found["users"] == 40
    for order in (SHUFFLED, REVERSED):
        result = found["comparisons"][order]
        assert result["verdict"] == "worse" and result["high"] < 0 and result["users"] == 40
    assert FAILURE in diagnose(Probed(order={"row": "sasrec-id", **found}))["not_found"]


@pytest.mark.parametrize("kind", [SetOnTheCircle, Popularity])
def test_a_scorer_that_ignores_the_order_is_named(circle, kind):
    _, found = probed(circle, [kind(circle if kind is Popularity else circle.n_items)])
    assert {result["difference"] for result in found["comparisons"].values()} == {0.0}
    (said,) = diagnose(Probed(order={"row": "sasrec-id", **found}))["found"]
    assert said.startswith("The recommender does not use the order") and "over 40 users" in said


@pytest.mark.parametrize("mask_history", [False, True])
def test_as_it_was_is_what_was_evaluated_over_all_seeds(circle, mask_history):
    table, found = probed(circle, [Popularity(circle), NextOnTheCircle(circle.n_items)], 2, mask_history)
    evaluated = protocol.summarise(table, ["ndcg@10"], samples=200)["rows"]["sasrec-id"]["ndcg@10"]
    assert found["ndcg@10"][AS_IT_WAS]["values"] == evaluated["values"] and evaluated["n"] == 2


def test_every_order_is_ranked_with_the_history_hidden_where_the_evaluation_hid_it(circle):
    (_, masked), (_, plain) = (probed(circle, [Popularity(circle)], mask_history=hide) for hide in (True, False))
    # Popularity does not look at the order: hidden or not, all orders are the same.
    for found in (masked, plain):
        assert found["ndcg@10"][SHUFFLED]["mean"] == found["ndcg@10"][AS_IT_WAS]["mean"]
    assert masked["ndcg@10"][SHUFFLED]["mean"] > plain["ndcg@10"][SHUFFLED]["mean"]


def test_a_reordered_history_has_the_same_items_and_its_padding_at_the_end():
    class Seen:
        n_items = 9

        def score(self, histories, times):
            self.histories, self.times = histories, times
            return torch.zeros(len(histories), 9)

    given, times = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), torch.arange(8).reshape(2, 4)
    seen = Seen()
    Reordered(seen, REVERSED).score(given, times)
    assert seen.histories.tolist() == [[3, 2, 1, 0], [7, 6, 5, 4]] and seen.times is times
    Reordered(seen, SHUFFLED).score(given, times)
    assert seen.histories.sort().values.tolist() == given.sort().values.tolist()
    assert seen.histories[0, 3] == 0 and given.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]


def test_histories_of_one_item_have_no_order(circle):
    with pytest.raises(NothingToMeasure, match="has no order"):
        probed(circle, [Popularity(circle)], history_length=1)
