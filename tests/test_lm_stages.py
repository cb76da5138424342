"""The language stages on a tiny random decoder: labels, masks, batches, what moves and what is written."""

import gc
import json
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import TITLES, adding, prepared_cycle, train_stage, vectors_of
from llm2rec.data.embeddings import ItemEmbeddings
from llm2rec.data.sequences import VALIDATION
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.lm import attention
from llm2rec.lm import backbone as backbones
from llm2rec.lm import export as exporting
from llm2rec.lm.csft import Form, WindowBatches, csft, csft_texts, held_out_items, last_title_batches, supervise
from llm2rec.lm.encode import encode
from llm2rec.lm.export import export
from llm2rec.lm.iem import (
    ContrastiveObjective,
    MaskedBatches,
    TitleBatches,
    ValidationPairs,
    contrastive,
    distinct_texts,
    mntp,
    shuffled_batches,
)
from llm2rec.lm.objectives import contrastive_loss
from llm2rec.lm.packing import tokenise
from llm2rec.lm.pooling import embed
from llm2rec.training import Optimizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Sequences and titles of the cyclic log."""
    return prepared_cycle(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def with_bos(tiny_folder, tmp_path_factory):
    """The tiny decoder with a tokenizer that begins every text with a token of its own."""
    lm = backbones.load(tiny_folder, torch.float32)
    adding(lm.tokenizer, "~ $A")
    folder = tmp_path_factory.mktemp("bos")
    backbones.save(lm, folder)
    return folder


def run_csft(world, model, out, **changes):
    sequences, titles = world
    options = {"max_tokens": 3000, "epochs": None, "batch_tokens": 256, "micro_batch_tokens": 128}
    options |= {"history_length": 4, "checkpoints": 0}
    return train_stage(csft, sequences, titles, model=model, out=out, **(options | changes))


def test_labels_are_the_titles_after_the_first_and_their_separators(tiny):
    texts = csft_texts(tiny.tokenizer, TITLES, 64)
    batch = supervise(texts, [np.array([1, 2, 3]), np.array([5, 4])], [1, 1])
    tokens = batch["input_ids"][0]
    assert torch.equal(tokens[batch["rows"] + 1], batch["labels"])
    labelled = tiny.tokenizer.decode(batch["labels"])
    assert labelled == f"{TITLES[1]}\n{TITLES[2]}\n{TITLES[3]}\n"
    assert batch["n_targets"] == len(batch["labels"])


def test_the_row_reads_as_titles_on_lines(tiny):
    texts = csft_texts(tiny.tokenizer, TITLES, 64)
    batch = supervise(texts, [np.array([2, 7])], [1])
    assert tiny.tokenizer.decode(batch["input_ids"][0]) == f"{TITLES[1]}\n{TITLES[6]}\n"


def test_a_row_begins_as_the_tokenizer_begins_a_text_and_the_beginning_is_no_label(tiny):
    sequences = [np.array([2, 7]), np.array([5, 4, 1])], [1, 2]
    plain = supervise(csft_texts(tiny.tokenizer, TITLES, 64), *sequences)
    adding(tiny.tokenizer, "~ $A <eos>")
    batch = supervise(csft_texts(tiny.tokenizer, TITLES, 64), *sequences)
    tokens, rows = batch["input_ids"][0], [batch["segments"]["sequence"] == row for row in range(2)]
    whole = [f"{TITLES[1]}\n{TITLES[6]}\n", f"{TITLES[4]}\n{TITLES[3]}\n{TITLES[0]}\n"]
    assert [tiny.tokenizer.decode(tokens[row]) for row in rows] == [f"~{text}" for text in whole]
    assert torch.equal(tokens[batch["rows"] + 1], batch["labels"])
    assert torch.equal(batch["labels"], plain["labels"])


def test_a_tokenizer_that_adds_nothing_trains_on_the_titles_alone(tiny):
    texts = csft_texts(tiny.tokenizer, TITLES, 64)
    batch = supervise(texts, [np.array([2, 7]), np.array([5])], [1, 1])
    assert texts.prefix == ()
    assert batch["input_ids"][0].tolist() == [*texts[1], *texts[6], *texts[4]]
    alike = [distinct_texts(tiny.tokenizer, TITLES, 64, special_tokens=special) for special in (False, True)]
    assert all(np.array_equal(one, other) for one, other in zip(*alike, strict=True))


def test_every_training_target_is_supervised_once_an_epoch(tiny, world):
    sequences, titles = world
    texts = csft_texts(tiny.tokenizer, titles, 64)
    batches = WindowBatches(texts, sequences, 3, 64, max_tokens=None, epochs=1, seed=0)
    items, offsets = sequences.training()
    after_the_first = np.delete(items, offsets[:-1])
    labels = [tiny.tokenizer.decode(batches[i]["labels"]).splitlines() for i in range(len(batches))]
    assert sorted(sum(labels, [])) == sorted(titles[item - 1] for item in after_the_first)
    assert batches.targets == len(after_the_first)


def held_out_batches(tiny, world, micro_batch_tokens):
    sequences, titles = world
    form = Form("packed", 3, 64, False)
    return last_title_batches(tiny.tokenizer, titles, held_out_items(sequences, 3, 0), form, micro_batch_tokens)


@pytest.mark.parametrize("template", ["$A", "~ $A"])
def test_the_token_budget_is_kept(tiny, world, template):
    sequences, titles = world
    adding(tiny.tokenizer, template)
    texts = csft_texts(tiny.tokenizer, titles, 64)
    batches = WindowBatches(texts, sequences, 3, 64, max_tokens=1000, epochs=None, seed=0)
    tokens = sum(batches[i]["input_ids"].shape[1] for i in range(len(batches)))
    assert 900 < tokens <= 1000
    assert tokens == batches.tokens
    assert batches.longest == max(int(batches[i]["segments"]["lengths"].max()) for i in range(len(batches)))
    held_out = held_out_batches(tiny, world, 64)
    assert all(batch["input_ids"].shape[1] <= 64 or len(batch["segments"]["lengths"]) == 1 for batch in held_out)


def test_what_a_shorter_training_spends_is_counted(tiny, world):
    sequences, titles = world
    texts = csft_texts(tiny.tokenizer, titles, 64)
    batches = WindowBatches(texts, sequences, 3, 64, max_tokens=1000, epochs=None, seed=0)
    tokens, targets = batches.spent(5)
    assert tokens == sum(batches[i]["input_ids"].shape[1] for i in range(5)) < batches.tokens
    separator = tiny.tokenizer("\n")["input_ids"][0]
    assert targets == sum(int((batches[i]["labels"] == separator).sum()) for i in range(5)) < batches.targets


def test_a_csft_that_stops_early_reports_the_tokens_it_was_trained_on(world, tiny_folder, tmp_path):
    options = {"evaluations": 8, "patience": 1, "optimizer": Optimizer(learning_rate=1e-15)}
    summary = run_csft(world, tiny_folder, tmp_path, max_tokens=6000, **options)
    assert summary["steps"] < 10
    assert summary["tokens"] <= summary["steps"] * 256


def test_held_out_text_ends_with_the_validation_title_alone_labelled(tiny, world):
    sequences, titles = world
    batches = held_out_batches(tiny, world, 10_000)
    labels = tiny.tokenizer.decode(torch.cat([batch["labels"] for batch in batches])).splitlines()
    validated = np.asarray(sequences.items)[sequences.held_out(VALIDATION)]
    assert sorted(labels) == sorted(titles[item - 1] for item in validated)


def test_csft_learns_the_next_title(world, tiny_folder, tmp_path):
    summary = run_csft(world, tiny_folder, tmp_path, max_tokens=20_000)
    assert summary["perplexity_after"] < 0.7 * summary["perplexity_before"]
    reloaded = backbones.load(tmp_path, torch.float32)
    assert reloaded.is_causal


def test_a_budget_below_one_step_is_refused(world, tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="under one step"):
        run_csft(world, tiny_folder, tmp_path, max_tokens=100)


def test_csft_moves_every_weight(world, tiny_folder, tmp_path):
    run_csft(world, tiny_folder, tmp_path)
    before = dict(backbones.load(tiny_folder, torch.float32).model.named_parameters())
    after = dict(backbones.load(tmp_path, torch.float32).model.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_a_csft_killed_among_other_processes_is_not_resumed_with_other_micro_batches(world, tiny_folder, tmp_path):
    run_csft(world, tiny_folder, tmp_path, checkpoints=2)
    (complete,) = (tmp_path / "checkpoints").glob("*/complete")
    complete.write_text(json.dumps({"seconds": 1.0, "processes": 3}))
    with pytest.raises(ArtifactError, match=r"checkpoint-\d+ was trained by 3 processes, and 1 would cut"):
        run_csft(world, tiny_folder, tmp_path, checkpoints=2)
    complete.write_text(json.dumps({"seconds": 1.0}))  # as older ones are
    assert run_csft(world, tiny_folder, tmp_path, checkpoints=2)["steps"] > 1


def test_recomputing_activations_changes_no_weight(world, tiny_folder, tmp_path):
    for name, recompute in (("kept", False), ("recomputed", True)):
        run_csft(world, tiny_folder, tmp_path / name, max_tokens=1000, gradient_checkpointing=recompute)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("kept", "recomputed")]
    assert weights[0] == weights[1]


def test_windows_longer_than_the_models_context_are_refused(world, tiny_folder, tmp_path):
    short = backbones.load(tiny_folder, torch.float32)
    short.model.config.max_position_embeddings = 20
    backbones.save(short, tmp_path / "short")
    with pytest.raises(ConfigError, match="reads at most 20 .*; lower data.history_length"):
        run_csft(world, tmp_path / "short", tmp_path / "out")


def masked(tiny, share=0.2):
    texts = distinct_texts(tiny.tokenizer, TITLES, 64, special_tokens=False)
    return MaskedBatches(texts, tiny.tokenizer("_")["input_ids"][0], 5, 8, share, seed=0), texts


def test_masked_positions_predict_the_hidden_token_from_the_one_before(tiny):
    batches, _ = masked(tiny)
    mask = tiny.tokenizer("_")["input_ids"][0]
    for index in range(len(batches)):
        batch = batches[index]
        assert (batch["input_ids"][0][batch["rows"] + 1] == mask).all()
        assert (batch["position_ids"][0][batch["rows"] + 1] > 0).all()


def test_every_title_has_a_masked_token_and_the_share_is_met(tiny):
    batches, texts = masked(tiny, share=0.3)
    for index in range(len(batches)):
        batch = batches[index]
        sequence = batch["segments"]["sequence"]
        assert set(sequence[batch["rows"] + 1].tolist()) == set(sequence.tolist())
    total = sum(batches[i]["n_targets"] for i in range(5)) / batches.tokens
    assert total == pytest.approx(0.3, abs=0.1)


def test_the_unmasked_tokens_are_the_title(tiny):
    batches, _ = masked(tiny)
    batch = batches[0]
    tokens = batch["input_ids"][0].clone()
    tokens[batch["rows"] + 1] = batch["labels"]
    texts = [tiny.tokenizer.decode(tokens[batch["segments"]["sequence"] == row]) for row in range(8)]
    assert set(texts) <= set(TITLES)


def test_what_the_tokenizer_adds_stands_round_a_title_and_is_never_masked(tiny):
    mask = tiny.tokenizer("_")["input_ids"][0]
    added = tiny.tokenizer.convert_tokens_to_ids(["~", "<eos>"])
    texts = distinct_texts(adding(tiny.tokenizer, "~ $A <eos>"), TITLES, 64, special_tokens=True)
    batches = MaskedBatches(texts, mask, 5, 8, 0.9, seed=0, added=tuple(added))
    for batch in (batches[index] for index in range(len(batches))):
        sequence, tokens = batch["segments"]["sequence"], batch["input_ids"][0]
        rows = [tokens[sequence == row].tolist() for row in range(8)]
        assert all([row[0], row[-1]] == added for row in rows)
        assert not set(batch["labels"].tolist()) & set(added)
        assert (
            batch["position_ids"][0][batch["rows"] + 1] == 1
        ).any()  # the title's first token has one before it


def test_a_title_of_nothing_but_what_is_added_is_left_out(tiny):
    texts = tokenise(tiny.tokenizer, ["~", TITLES[0], "~~", TITLES[1]], 64, special_tokens=False)
    batches = MaskedBatches(texts, 0, 1, 8, 0.2, seed=0, added=(tiny.tokenizer.convert_tokens_to_ids("~"),))
    assert batches.tokens == texts.lengths[[1, 3]].sum()


@pytest.mark.parametrize("stage", ["packed", "paper", "tree", "mntp"])
def test_every_stage_begins_its_sequences_as_the_encoder_reads_a_title(
    stage, world, with_bos, tmp_path, monkeypatch
):
    seen, hidden_states = set(), backbones.Backbone.hidden_states

    def watched(lm, packed, layer=-1):
        seen.update(packed["input_ids"][packed["position_ids"] == 0].tolist())
        return hidden_states(lm, packed, layer)

    monkeypatch.setattr(backbones.Backbone, "hidden_states", watched)
    monkeypatch.setattr(backbones, "probe", lambda lm, causal: None)  # its rows are not titles
    if stage == "mntp":
        sizes = {"steps": 2, "batch_size": 4, "mask_share": 0.2, "checkpoints": 0}
        train_stage(mntp, world[1], model=with_bos, out=tmp_path, **sizes)
    else:
        run_csft(world, with_bos, tmp_path, max_tokens=1000, mode=stage)
    assert seen == set(backbones.load_tokenizer(tmp_path)("")["input_ids"])


def title_batches(texts, steps, batch_size, micro_batch_tokens):
    """Two views of each title, as the contrastive stage makes them."""
    chosen = shuffled_batches(np.ones(len(texts)), steps, batch_size, seed=0)
    return TitleBatches(texts, [np.stack([rows, rows], axis=1) for rows in chosen], micro_batch_tokens)


def test_no_title_stands_twice_in_a_contrastive_batch(tiny):
    texts = distinct_texts(tiny.tokenizer, TITLES + TITLES, 64, special_tokens=True)
    assert len(texts) == len(TITLES)
    chosen = shuffled_batches(np.ones(len(texts)), 6, 9, seed=0)
    assert [len(np.unique(rows)) for rows in chosen] == [9] * 6


def contrastive_gradients(tiny, micro_batch_tokens):
    texts = distinct_texts(tiny.tokenizer, TITLES, 64, special_tokens=True)
    tiny.model.zero_grad()
    tiny.model.eval()  # without dropout, chunked and whole batches see the same vectors
    batch = title_batches(texts, 1, 12, micro_batch_tokens)[0]
    loss = ContrastiveObjective(tiny, 0.1)(tiny.model, batch)
    loss.backward()
    gradients = [p.grad.clone() for p in tiny.body.parameters() if p.grad is not None]
    return len(batch["chunks"]), loss.item(), gradients


def test_a_chunked_contrastive_batch_gives_the_gradients_of_the_whole(tiny):
    tiny.set_causal(False)
    whole_chunks, whole_loss, whole = contrastive_gradients(tiny, 100_000)
    chunks, loss, chunked = contrastive_gradients(tiny, 60)
    assert (whole_chunks, chunks > 2) == (1, True)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert max(gradient.abs().max() for gradient in whole) > 1e-3
    for one, other in zip(whole, chunked, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_dropout_makes_two_different_views(tiny):
    tiny.set_causal(False)
    texts = distinct_texts(tiny.tokenizer, TITLES, 64, special_tokens=True)
    batch = title_batches(texts, 1, 8, 100_000)[0]

    tiny.model.train()
    with attention.dropout(tiny.model, 0.5):
        views = embed(tiny, batch["chunks"]["chunk0"]).chunk(2)
    assert not torch.allclose(views[0], views[1])
    assert torch.isfinite(contrastive_loss(*views, 0.1))


def test_the_auc_is_that_of_validation_events_by_a_plain_loop(tiny, world, monkeypatch):
    sequences, titles = world
    vectors = np.random.default_rng(0).normal(size=(len(titles), 5)).astype(np.float32)
    monkeypatch.setattr("llm2rec.lm.iem.encode_tokens", lambda *args: vectors)
    positions = sequences.held_out(VALIDATION)
    items = np.asarray(sequences.items) - 1
    unit = vectors - vectors.mean(axis=0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    wins = []
    for position in positions:
        source, target = items[position - 1], items[position]
        others = [items[other] for other in positions if items[other] != target]
        wins += [float(unit[source] @ unit[target] > unit[source] @ unit[other]) for other in others]
    found = ValidationPairs(sequences, titles, tiny.tokenizer, 64, seed=0).auc(tiny)
    assert found == pytest.approx(np.mean(wins), abs=1e-6)


def test_the_auc_of_near_vectors_is_high_and_of_constant_vectors_a_half(tiny, world, monkeypatch):
    sequences, titles = world
    pairs = ValidationPairs(sequences, titles, tiny.tokenizer, 64, seed=0)
    angles = np.linspace(0, 2 * math.pi, len(titles), endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    monkeypatch.setattr("llm2rec.lm.iem.encode_tokens", lambda *args: circle)
    assert pairs.auc(tiny) > 0.8  # a neighbour on the circle, against all others
    monkeypatch.setattr("llm2rec.lm.iem.encode_tokens", lambda *args: np.ones((len(titles), 2), np.float32))
    assert pairs.auc(tiny) == 0.5


@pytest.fixture(scope="module")
def encoder(world, tiny_folder, tmp_path_factory):
    """csft -> mntp -> contrastive, each in its folder."""
    root = tmp_path_factory.mktemp("stages")
    run_csft(world, tiny_folder, root / "csft")
    sequences, titles = world
    train_stage(
        mntp,
        titles,
        model=root / "csft",
        steps=20,
        batch_size=8,
        mask_share=0.2,
        checkpoints=0,
        out=root / "mntp",
    )
    train_stage(
        contrastive,
        sequences,
        titles,
        model=root / "mntp",
        steps=4,
        batch_size=8,
        temperature=0.1,
        dropout=0.2,
        evaluations=2,
        patience=2,
        micro_batch_tokens=64,
        out=root / "iem",
    )
    return root


def test_mntp_lowers_its_loss(encoder):
    lines = [json.loads(line) for line in (encoder / "mntp" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_the_trained_encoder_is_bidirectional(encoder):
    for name in ("mntp", "iem"):
        assert not backbones.load(encoder / name, torch.float32, head=False).is_causal


def test_sentence_transformers_gives_the_vectors_that_encode_gives(encoder, world, tmp_path):
    from sentence_transformers import SentenceTransformer

    _, titles = world
    ids = [str(number) for number in range(len(titles))]
    encode(
        ids,
        titles,
        model=encoder / "iem",
        causal=False,
        dtype=torch.float32,
        max_title_tokens=16,
        batch_tokens=64,
        name="llm2rec",
        out=tmp_path,
    )
    ours = ItemEmbeddings.load(tmp_path).vectors
    theirs = SentenceTransformer(str(encoder / "iem"), device="cpu").encode(titles, show_progress_bar=False)
    assert np.abs(ours - theirs).max() < 1e-4


def test_the_exported_encoder_of_a_chat_model_reads_titles_as_they_are(tiny_folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    chat = backbones.load(tiny_folder, torch.float32)
    chat.tokenizer.chat_template = "{% for message in messages %}<eos>{{ message.content }}{% endfor %}"
    backbones.save(chat, tmp_path / "chat")
    lm = backbones.load(tmp_path / "chat", torch.float32, head=False)
    lm.set_causal(False)
    export(lm, TITLES, 64, tmp_path / "encoder")
    theirs = SentenceTransformer(str(tmp_path / "encoder"), device="cpu").encode(TITLES)
    assert np.abs(vectors_of(lm, TITLES) - theirs).max() < 1e-4


def test_exporting_a_bfloat16_encoder_warns_of_nothing(tiny_folder, tmp_path, caplog):
    lm = backbones.load(tiny_folder, torch.bfloat16, head=False)
    lm.set_causal(False)
    export(lm, TITLES, 64, tmp_path / "encoder")
    assert caplog.text == ""


def test_an_export_holds_one_model_at_a_time_beside_the_trained_one(tiny_folder, tmp_path, monkeypatch):
    lm = backbones.load(tiny_folder, torch.bfloat16, head=False)
    gc.collect()

    def alive():
        return sum(type(one) is type(lm.model) for one in gc.get_objects())

    def counting(function):
        return lambda *given: counted.append(alive()) or function(*given)

    before, counted = alive(), []
    monkeypatch.setattr(exporting, "_reread", counting(exporting._reread))
    monkeypatch.setattr(exporting, "encode_tokens", counting(exporting.encode_tokens))
    export(lm, TITLES, 16, tmp_path / "exported")
    assert counted == [before, before + 1]


def test_the_copy_that_an_export_is_checked_by_shares_the_weights_that_are_exact(tiny_folder):
    for dtype, shared in ((torch.bfloat16, False), (torch.float32, True)):
        model = backbones.load(tiny_folder, dtype).model
        copied = exporting._in_host_memory(model)
        assert copied.get_input_embeddings().weight is copied.get_output_embeddings().weight  # tied, as they were
        for own, other in zip(model.parameters(), copied.parameters(), strict=True):
            assert (own.dtype, other.dtype) == (dtype, torch.float32) and own.requires_grad
            assert torch.equal(own.float(), other) and (own.data_ptr() == other.data_ptr()) == shared


def test_vectors_do_not_depend_on_the_batch(tiny):
    tiny.set_causal(False)
    one = vectors_of(tiny, TITLES, batch_tokens=1)
    many = vectors_of(tiny, TITLES, batch_tokens=100_000)
    assert np.abs(one - many).max() < 1e-5


def test_causal_and_bidirectional_vectors_differ(tiny):
    tiny.set_causal(True)
    causal = vectors_of(tiny, TITLES)
    tiny.set_causal(False)
    bidirectional = vectors_of(tiny, TITLES)
    assert np.abs(causal - bidirectional).max() > 1e-3


@pytest.fixture(scope="module")
def gpt2(tiny_folder, tmp_path_factory):
    """A random GPT-2, whose attention has no dropout that can be set and whose layers have a name of their own."""
    tokenizer = backbones.load_tokenizer(tiny_folder)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": len(tokenizer)}
    folder = tmp_path_factory.mktemp("gpt2")
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    backbones.save(backbones.Backbone(model, tokenizer), folder)
    return folder


def run_contrastive(world, model, out, **changes):
    options = {"steps": 2, "batch_size": 4, "temperature": 0.1, "dropout": 0.2, "evaluations": 1, "patience": 1}
    return train_stage(contrastive, *world, model=model, out=out, micro_batch_tokens=4096, **(options | changes))


def test_dropout_views_of_a_model_without_attention_dropout_are_refused(world, gpt2, tmp_path):
    with pytest.raises(ConfigError, match="GPT2Model has no attention dropout .*positives=consumed-next"):
        run_contrastive(world, gpt2, tmp_path)


def test_consumed_pairs_need_no_attention_dropout(world, gpt2, tmp_path):
    assert run_contrastive(world, gpt2, tmp_path, positives="consumed-next", causal=True)["steps"] == 2


@pytest.mark.parametrize("setting", ["compiled", "shard"])
def test_layers_that_are_not_found_are_refused_where_they_are_needed(setting, world, gpt2, tmp_path):
    with pytest.raises(ConfigError, match=r"GPT2Model does not name its layers .*turn them off"):
        run_csft(world, gpt2, tmp_path, **{setting: True})


def test_a_contrastive_stage_that_does_harm_says_so(world, tiny_folder, tmp_path, monkeypatch, capsys):
    measured = iter([0.7, 0.5, 0.6, 0.6])  # before, twice on the way, the best in the end
    monkeypatch.setattr(ValidationPairs, "auc", lambda *args: next(measured))
    summary = run_contrastive(world, tiny_folder, tmp_path, steps=2, evaluations=2)
    assert summary["best_step"] == 2
    assert "lowered the AUC of validation pairs from 0.7 to 0.6; lower" in capsys.readouterr().err


@pytest.mark.parametrize(("learning_rate", "harm"), [(3.0, True), (1e-2, False)])
def test_a_csft_that_does_harm_says_so(world, tiny_folder, tmp_path, capsys, learning_rate, harm):
    optimizer = Optimizer(learning_rate=learning_rate)
    summary = run_csft(world, tiny_folder, tmp_path, optimizer=optimizer, evaluations=2)
    assert (summary["perplexity_after"] > summary["perplexity_before"]) == harm
    assert ("csft raised the perplexity of held-out titles from " in capsys.readouterr().err) == harm
