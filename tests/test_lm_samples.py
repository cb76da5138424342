"""The authors' samples and the trees that they form: what they say, what is a label, what gradients they give."""

import json

import numpy as np
import pytest
import torch

from conftest import TITLES, adding, prepared_cycle, train_stage
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.lm import backbone as backbones
from llm2rec.lm import packing
from llm2rec.lm.csft import SampleBatches, TokenObjective, csft, csft_texts, supervise
from llm2rec.lm.packing import shorten
from llm2rec.lm.samples import make_samples, merge, supervise_samples, supervise_trees, training_items, tree_size
from llm2rec.training import Optimizer, TrainSettings, train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Sequences and titles of the cyclic log: 6 training events a user."""
    return prepared_cycle(tmp_path_factory.mktemp("world"), users=12)


def samples_of(tokenizer, item_sequences, separator=False, trees=None):
    items = [np.array(row) for row in item_sequences]
    numbers = np.arange(len(items)) if trees is None else np.array(trees)
    return make_samples(tokenizer, TITLES, items, numbers, max_title_tokens=64, separator=separator)


@pytest.mark.parametrize(("separator", "between"), [(False, ""), (True, ", ")])
def test_a_sample_reads_as_the_authors_write_it(tiny, separator, between):
    samples = samples_of(tiny.tokenizer, [[1, 2, 3]], separator)
    text = tiny.tokenizer.decode(samples.texts[0])
    assert text == f"{TITLES[0]}, {TITLES[1]}{between}{TITLES[2]}\n<eos>"


@pytest.mark.parametrize(("separator", "space"), [(False, ""), (True, " ")])
def test_the_labels_of_a_sample_are_its_target_the_line_break_and_eos(tiny, separator, space):
    batch = supervise_samples(samples_of(tiny.tokenizer, [[1, 2, 3], [5, 4]], separator), np.array([0, 1]))
    assert tiny.tokenizer.decode(batch["labels"]) == f"{space}{TITLES[2]}\n<eos>{space}{TITLES[3]}\n<eos>"
    assert torch.equal(batch["input_ids"][0][batch["rows"] + 1], batch["labels"])


def test_a_sample_begins_as_the_tokenizer_begins_a_text_one_by_one_and_as_a_tree(tiny):
    plain = samples_of(tiny.tokenizer, [[1, 2], [1, 2, 3]], trees=[0, 0])
    samples = samples_of(adding(tiny.tokenizer, "~ $A"), [[1, 2], [1, 2, 3]], trees=[0, 0])
    begin = tiny.tokenizer.convert_tokens_to_ids("~")
    assert [samples.texts[row].tolist() for row in (0, 1)] == [[begin, *plain.texts[row]] for row in (0, 1)]
    assert np.array_equal(samples.first_label, plain.first_label + 1)
    labels = [supervise_trees(some, [np.arange(2)])["labels"].tolist() for some in (plain, samples)]
    assert labels[0] == labels[1]
    assert tree_size([samples.texts[0], samples.texts[1]]) == tree_size([plain.texts[0], plain.texts[1]]) + 1


def test_samples_are_kept_in_half_the_memory_of_their_labels(tiny):
    samples = samples_of(tiny.tokenizer, [[1, 2, 3], [5, 4]])
    assert samples.texts.tokens.dtype == np.int32
    for batch in (
        supervise_samples(samples, np.arange(2)),
        supervise_trees(samples, [np.arange(1), np.array([1])]),
    ):
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_history_and_target_are_tokenised_apart(tiny):
    samples = samples_of(tiny.tokenizer, [[1, 2, 3]])
    parts = [f"{TITLES[0]}, {TITLES[1]}", f"{TITLES[2]}\n"]
    ids = [tiny.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    assert samples.texts[0].tolist() == ids[0] + ids[1] + [tiny.tokenizer.eos_token_id]
    assert samples.first_label.tolist() == [len(ids[0])]


def test_an_eos_that_is_also_the_pad_token_is_a_label(tiny):
    assert tiny.tokenizer.pad_token_id == tiny.tokenizer.eos_token_id  # premise
    samples = samples_of(tiny.tokenizer, [[1, 2], [1, 2, 3]], trees=[0, 0])
    for batch in (supervise_samples(samples, np.arange(2)), supervise_trees(samples, [np.arange(2)])):
        assert (batch["labels"] == tiny.tokenizer.eos_token_id).sum() == 2


def test_a_tokenizer_without_an_end_is_refused(tiny):
    tiny.tokenizer.eos_token = None
    with pytest.raises(ArtifactError, match="end-of-sequence"):
        samples_of(tiny.tokenizer, [[1, 2]])


def test_every_training_event_but_a_users_first_is_a_target_after_the_items_before_it(world):
    sequences, _ = world
    items, trees = training_items(sequences, 3)
    first_user = np.asarray(sequences.items)[:6].tolist()
    assert [row.tolist() for row in items[:5]] == [first_user[max(0, t - 3) : t + 1] for t in range(1, 6)]
    assert len(items) == 12 * 5
    assert trees[:6].tolist() == [0, 0, 0, 1, 2, 3]  # three targets share the user's start, later ones do not


def test_a_long_title_is_cut_behind_its_last_allowed_token(tiny):
    short = shorten(tiny.tokenizer, TITLES, 3)
    lengths = [len(tiny.tokenizer(text)["input_ids"]) for text in short]
    assert max(lengths) == 3
    assert all(title.startswith(text) for title, text in zip(TITLES, short, strict=True))
    assert shorten(tiny.tokenizer, TITLES, 64) == TITLES


def test_the_paths_of_a_tree_spell_its_sequences_and_see_nothing_else():
    rows = [np.array(row) for row in ([1, 2, 3], [1, 2, 4, 5], [1, 2, 3], [7, 2])]
    tree = merge(rows)
    assert len(tree.tokens) == tree_size(rows) == 7
    for row, path in zip(rows, tree.paths, strict=True):
        assert tree.tokens[path].tolist() == row.tolist()
        assert tree.depths[path].tolist() == list(range(len(row)))
        for place, node in enumerate(path):
            assert np.flatnonzero(tree.visible[node]).tolist() == sorted(path[: place + 1].tolist())


def gradients(lm, batch):
    lm.model.zero_grad()
    loss = TokenObjective(lm)(lm.model, batch) / batch["n_targets"]
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in lm.model.named_parameters()}


@pytest.mark.parametrize("separator", [False, True])
@pytest.mark.parametrize(("history_length", "share"), [(10, 0.62), (3, 0.85)])
def test_trees_give_the_gradients_of_the_samples_one_by_one(tiny, world, separator, history_length, share):
    sequences, titles = world
    items, trees = training_items(sequences, history_length)
    samples = make_samples(tiny.tokenizer, titles, items, trees, max_title_tokens=64, separator=separator)
    groups = np.split(np.arange(len(samples)), np.flatnonzero(np.diff(trees)) + 1)
    paper, tree = supervise_samples(samples, np.arange(len(samples))), supervise_trees(samples, groups)
    assert tree["input_ids"].shape[1] < share * paper["input_ids"].shape[1]
    assert tree["n_targets"] == paper["n_targets"]
    plain_loss, plain = gradients(tiny, paper)
    shared_loss, shared = gradients(tiny, tree)
    assert shared_loss == pytest.approx(plain_loss, abs=1e-5)
    assert max(gradient.abs().max() for gradient in plain.values()) > 1e-2  # premise
    for name, gradient in plain.items():
        assert torch.allclose(gradient, shared[name], atol=1e-5), name


def test_eleven_items_need_a_third_of_the_tokens_as_a_tree(tiny):
    items = [list(range(1, last + 1)) for last in range(2, 12)]
    samples = samples_of(tiny.tokenizer, items, trees=[0] * 10)
    assert tree_size([samples.texts[row] for row in range(10)]) < 0.36 * samples.texts.lengths.sum()


def test_samples_of_one_tree_do_not_see_each_others_targets(tiny):
    one = samples_of(tiny.tokenizer, [[1, 2], [1, 2, 3]], trees=[0, 0])
    other = samples_of(tiny.tokenizer, [[1, 9], [1, 2, 3]], trees=[0, 0])
    states = []
    for samples in (one, other):
        batch = supervise_trees(samples, [np.arange(2)])
        with torch.no_grad():
            states.append(tiny.hidden_states(batch)[0, batch["rows"][-5:]])
    assert torch.allclose(*states, atol=1e-6)


def test_trees_of_a_packed_row_do_not_see_each_other(tiny):
    groups = [np.array([0, 1]), np.array([2])]
    one = samples_of(tiny.tokenizer, [[1, 2], [1, 2, 3], [4, 5]], trees=[0, 0, 1])
    other = samples_of(tiny.tokenizer, [[1, 2], [1, 2, 3], [14, 6]], trees=[0, 0, 1])
    batches = [supervise_trees(samples, groups) for samples in (one, other)]
    length = len(merge([one.texts[0], one.texts[1]]).tokens)
    with torch.no_grad():
        states = [tiny.hidden_states(batch)[0, :length] for batch in batches]
    assert torch.allclose(*states, atol=1e-6)


def test_trees_of_unlike_sizes_give_the_gradients_of_trees_padded_alike(tiny, monkeypatch):
    users = [[1, 2], [3, 4, 5, 6, 7, 8, 9, 10], [5, 6], [8, 9], [10, 9, 8, 7, 6, 5, 4], [2, 7]]
    items, trees = zip(*[(user[:t], tree) for tree, user in enumerate(users) for t in (2, len(user))], strict=True)
    samples = samples_of(tiny.tokenizer, items, trees=trees)
    groups, found = list(np.arange(12).reshape(6, 2)), []
    for share, blocks in ((packing.SHARE_OF_ONE_BLOCK, 2), (0, 1)):
        monkeypatch.setattr(packing, "SHARE_OF_ONE_BLOCK", share)
        batch = supervise_trees(samples, groups)
        assert len(batch["segments"]["blocks"]) == blocks
        found.append(gradients(tiny, batch)[1])
    assert all(torch.allclose(gradient, found[1][name], atol=1e-5) for name, gradient in found[0].items())


def test_equal_samples_keep_all_their_labels(tiny):
    samples = samples_of(tiny.tokenizer, [[1, 2], [1, 2]], trees=[0, 0])
    batch = supervise_trees(samples, [np.arange(2)])
    assert batch["input_ids"].shape[1] == samples.texts.lengths[0]
    assert batch["n_targets"] == len(batch["rows"]) == 2 * (samples.texts.lengths[0] - samples.first_label[0])


def sample_batches(tiny, world, shared, **budget):
    sequences, titles = world
    items, trees = training_items(sequences, 3)
    samples = make_samples(tiny.tokenizer, titles, items, trees, max_title_tokens=64, separator=False)
    return SampleBatches(samples, 128, shared=shared, seed=0, **({"max_tokens": None, "epochs": 1} | budget))


@pytest.mark.parametrize("shared", [False, True])
def test_an_epoch_of_samples_supervises_every_target_once(tiny, world, shared):
    batches = sample_batches(tiny, world, shared)
    eos = sum(int((batches[i]["labels"] == tiny.tokenizer.eos_token_id).sum()) for i in range(len(batches)))
    assert eos == batches.targets == 12 * 5
    assert sum(batches[i]["input_ids"].shape[1] for i in range(len(batches))) == batches.tokens


@pytest.mark.parametrize("shared", [False, True])
def test_the_token_budget_of_samples_is_kept(tiny, world, shared):
    batches = sample_batches(tiny, world, shared, max_tokens=700, epochs=None)
    assert 500 < batches.tokens <= 700


class InParts:
    """The same windows in micro-batches of the given sizes."""

    def __init__(self, texts, windows, sizes):
        parts = np.split(np.arange(len(windows)), np.cumsum(sizes)[:-1])
        rows = [[windows[number] for number in part] for part in parts]
        self.batches = [supervise(texts, part, [1] * len(part)) for part in rows]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]

    def set_epoch(self, epoch):
        pass


def test_the_step_does_not_depend_on_how_targets_fall_into_micro_batches(tiny_folder, tmp_path):
    windows = [np.array(row) for row in ([1, 2], [3, 4, 5, 6, 7], [8, 9], [2, 5, 11, 1])]
    weights = []
    for sizes in ([4], [1, 3], [2, 1, 1]):
        lm = backbones.load(tiny_folder, torch.float32)
        batches = InParts(csft_texts(lm.tokenizer, TITLES, 64), windows, sizes)
        settings = TrainSettings(max_steps=1, learning_rate=1e-2, seed=0, accumulation=len(sizes))
        train(lm.model, batches, TokenObjective(lm), out=tmp_path / str(sizes), settings=settings, description="x")
        weights.append(torch.cat([p.detach().flatten() for p in lm.model.parameters()]))
    assert len({batches["n_targets"] for batches in batches.batches}) > 1  # premise: uneven parts
    for other in weights[1:]:
        assert torch.allclose(weights[0], other, atol=1e-4)


def run_csft(world, model, out, **changes):
    sequences, titles = world
    options = {"max_tokens": 3000, "epochs": None, "batch_tokens": 256, "micro_batch_tokens": 256}
    options |= {"history_length": 4, "checkpoints": 0}
    return train_stage(csft, sequences, titles, model=model, out=out, **(options | changes))


@pytest.mark.parametrize("mode", ["paper", "tree"])
def test_csft_learns_from_samples(world, tiny_folder, tmp_path, mode):
    summary = run_csft(world, tiny_folder, tmp_path, mode=mode, max_tokens=12_000)
    assert summary["perplexity_after"] < 0.7 * summary["perplexity_before"]


def test_paper_and_tree_measure_the_same_perplexity(world, tiny_folder, tmp_path):
    before = [
        run_csft(world, tiny_folder, tmp_path / mode, mode=mode)["perplexity_before"] for mode in ("paper", "tree")
    ]
    assert before[0] == before[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "sliding"}, "packed, paper, tree"),
        ({"paper_separator": True}, "paper_separator"),
        ({"patience": 2}, "evaluations"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(world, tiny_folder, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_csft(world, tiny_folder, tmp_path, **changes)


def test_the_weights_with_the_lowest_perplexity_win(world, tiny_folder, tmp_path):
    options = {"max_tokens": 20_000, "optimizer": Optimizer(learning_rate=0.5), "evaluations": 12, "patience": 1}
    summary = run_csft(world, tiny_folder, tmp_path, **options)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    measured = [json.loads(line)["eval_perplexity"] for line in lines if "eval_perplexity" in line]
    assert summary["perplexity_after"] == pytest.approx(min(measured), rel=1e-3)
    assert len(measured) < 12  # a rate this high soon does harm: it stopped early
