"""Several domains as one: nothing of one is seen in the other."""

import numpy as np
import pytest

from conftest import cyclic_log
from llm2rec.data.mixture import Part, mix
from llm2rec.data.sequences import Sequences, prepare
from llm2rec.data.splits import Split
from llm2rec.data.tables import Catalogue, Interactions
from llm2rec.lm.csft import MODES, Budget, Form, training_data


def part(folder, name, weight=1.0, cold=(), **sizes):
    log, items = cyclic_log(**sizes)
    tables = Interactions.from_frame(log, name), Catalogue.from_frame(items, name)
    prepare(*tables, split=Split(), short_histories="error", out=folder / name)
    texts = [f"{name} {title}" for title in items["title"]]
    trainable = ~items["item_id"].is_in(cold).to_numpy()
    return Part(name, Sequences.load(folder / name), texts, trainable, weight)


def test_windows_of_a_mixture_are_those_of_its_domains(tmp_path):
    parts = [part(tmp_path, "a", users=5, items=7), part(tmp_path, "b", users=4, items=6)]
    mixture = mix(parts)
    items = mixture.sequences.training()[0]
    starts, ends = mixture.sequences.windows(4)
    texts = [[mixture.texts[item - 1] for item in items[s:e]] for s, e in zip(starts, ends, strict=True)]
    wanted = []
    for one in parts:
        own = one.sequences.training()[0]
        wanted += [
            [one.texts[item - 1] for item in own[s:e]] for s, e in zip(*one.sequences.windows(4), strict=True)
        ]
    assert texts == wanted


def test_shares_are_relative_to_the_largest_weight(tmp_path):
    mixture = mix([part(tmp_path, "a", users=5, items=7), part(tmp_path, "b", weight=4.0, users=4, items=6)])
    assert mixture.item_shares.tolist() == [0.25] * 7 + [1.0] * 6
    assert mixture.user_shares.tolist() == [0.25] * 5 + [1.0] * 4


@pytest.mark.parametrize("mode", MODES)
def test_csft_reads_a_domain_by_its_weight(tiny, tmp_path, mode):
    mixture = mix([part(tmp_path, "a", users=5, items=7), part(tmp_path, "b", weight=1e-9, users=4, items=6)])
    form, budget = Form(mode, 4, 64, False), Budget(256, None, 1.0)
    batches, _ = training_data(tiny, mixture.sequences, mixture.texts, form, budget, 0, mixture.user_shares)
    text = "".join(tiny.tokenizer.decode(batches[i]["input_ids"][0]) for i in range(len(batches)))
    assert "a The" in text and "b The" not in text


def test_cold_items_give_no_training_text(tmp_path):
    mixture = mix([part(tmp_path, "a", cold=["i01", "i03"], users=5, items=7)])
    assert np.flatnonzero(mixture.item_shares == 0).tolist() == [1, 3]
    assert len(mixture.training_texts) == 5 and mixture.texts[1] not in mixture.training_texts
