"""Studies: variants that share stages, tables over the same test events, and what is refused."""

import importlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import llm2rec as lr
from llm2rec import artifacts, comparison, pipeline, studies
from llm2rec.data.sequences import TEST, TRAIN, VALIDATION, Sequences, cold_items
from llm2rec.data.tables import Catalogue
from llm2rec.errors import ArtifactError, ConfigError, DataError
from llm2rec.evaluation import protocol, report
from llm2rec.loading import load_recipe
from llm2rec.rec.average import ScoreAverage, best_weight, validation_by_weight
from llm2rec.runs import open_run
from llm2rec.serve.recommender import load_scorer
from llm2rec.studies.base import Entry, Judged, Study, Variant, gathered, over_world, ranked_by, rows_of, scorers
from llm2rec.studies.cold_start import AS_SCORED, PLACES, known_users, trained_items
from llm2rec.studies.direct import sampled_users
from llm2rec.studies.language import MNTP_STEPS, SMOOTHING
from llm2rec.studies.worlds import THEMES, World

TINY = (
    "csft.max_tokens=4096",  # a quarter of it has steps before its decay
    "csft.batch_tokens=512",
    "iem.mntp.steps=1",
    "iem.contrastive.steps=2",
    "csft.warmup_share=0",
    "iem.mntp.warmup_share=0",
    "iem.contrastive.warmup_share=0",
    "recommender.max_epochs=1",
    "recommender.hidden_size=8",
    "evaluation.bootstrap_samples=400",
)

pytestmark = pytest.mark.slow  # whole runs, several processes: CI runs them


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs the small form of a study, even smaller, once a module: its folder and what it found."""
    done = {}

    def finish(name):
        if name not in done:
            folder = tmp_path_factory.mktemp("studies") / name
            done[name] = folder, lr.study(name, folder, small=True, overrides=TINY)
        return done[name]

    return finish


def events(run):
    return [
        (line["stage"], line["event"]) for line in map(json.loads, (run / "log.jsonl").read_text().splitlines())
    ]


@pytest.mark.parametrize("name", studies.STUDIES)
def test_a_study_ends_in_tables_a_json_file_and_a_page_of_its_own(finished, name):
    folder, found = finished(name)
    assert json.loads((folder / "study.json").read_text()) == json.loads(json.dumps(found))
    page = (folder / "study.html").read_text()
    assert "src=" not in page and "http" not in page.replace("http://www.w3.org", "")
    for title, table in found["tables"].items():
        assert title in page
        assert set(table["comparisons"]) == set(table["rows"]) - {table["reference"]}


def test_the_ablation_shows_every_step_and_what_is_missing_without_csft(finished):
    _, found = finished("ablation")
    (first, second, third) = found["tables"].values()
    labels = [
        "ids",
        "last token",
        "causal",
        "bidirectional",
        "+ CSFT, causal",
        "+ CSFT",
        "+ MNTP",
        "+ contrastive",
    ]
    labels += [
        "all but CSFT",
        "contrastive alone",
        "consumed pairs",
        "causal, smoothed",
        "+ CSFT, causal, smoothed",
    ]
    assert list(first["rows"]) == labels
    references = [table["reference"] for table in (first, second, third)]
    assert references == ["bidirectional", "+ contrastive", "+ CSFT, causal"]


def test_the_budgets_are_shares_of_the_one_that_is_set_each_going_on_from_the_one_before(finished):
    folder, found = finished("budget")
    runs = {name: open_run(folder / "runs" / name) for name in ("csft-1-4", "csft-1-1")}
    assert [run.recipe.csft.max_tokens for run in runs.values()] == [1024, 4096]  # of TINY
    assert runs["csft-1-4"].recipe.csft.extends is None
    assert runs["csft-1-1"].recipe.csft.extends == str(runs["csft-1-4"].folder)
    tokens = [f"{artifacts.require(run.csft, 'csft').summary['tokens']:,} tokens" for run in runs.values()]
    assert [list(table["rows"]) for table in found["tables"].values()] == 2 * [["no CSFT", *tokens]]


@pytest.mark.parametrize(("batch_tokens", "words"), [(1024, "is 1 step"), (8192, "under one step")])
def test_a_share_of_an_epoch_that_is_too_short_is_refused_before_any_other_variant(
    own_recipe, tmp_path, batch_tokens, words
):
    changes = ("csft.epochs=8", f"csft.batch_tokens={batch_tokens}", "csft.warmup_share=0")
    with pytest.raises(ConfigError, match=words):
        lr.study("budget", tmp_path / "study", overrides=changes, recipe=own_recipe())
    (run,) = (tmp_path / "study/runs").iterdir()
    assert run.name == "csft-1-48" and not any((run / name).exists() for name in ("iem", "recommender"))


def test_the_smallest_share_of_epochs_is_trained_first_and_once(tmp_path):
    changes = (*(one for one in TINY if "csft.max_tokens" not in one), "csft.epochs=2")
    found = lr.study("budget", tmp_path / "study", True, changes)
    runs = tmp_path / "study/runs"
    assert [event for stage, event in events(runs / "csft-1-4") if stage == "csft"] == ["run", "done", "keep"]
    assert ("data/main", "share") in events(runs / "none")
    assert all(len(table["rows"]) == 3 for table in found["tables"].values())


def test_variants_share_the_stages_whose_inputs_are_the_same(finished):
    folder, _ = finished("ablation")
    assert ("csft", "run") in events(folder / "runs" / "steps")
    for variant in ("last-token", "no-csft", "contrastive-alone", "consumed-pairs", "smoothed"):
        shared = [stage for stage, event in events(folder / "runs" / variant) if event == "share"]
        assert shared[:2] == ["data/main", "backbone"]
        assert ("csft" in shared) == (variant in ("consumed-pairs", "smoothed"))
        assert not {"mntp", "iem"} & set(shared)
        files = [folder / "runs" / name / "data/main/catalogue.parquet" for name in ("steps", variant)]
        assert files[0].samefile(files[1])


def test_the_last_token_variant_alone_pools_otherwise(finished):
    folder, found = finished("ablation")
    assert found["settings"]["encode.pooling"] == {
        "steps": "mean",
        "last-token": "last",
        "no-csft": "mean",
        "contrastive-alone": "mean",
        "consumed-pairs": "mean",
        "smoothed": "mean",
    }


def test_the_smoothed_variant_alone_is_smoothed_as_much_as_the_recipe_says(finished, own_recipe, tmp_path):
    _, found = finished("ablation")
    shares = found["settings"]["recommender.smoothing"]
    assert shares.pop("smoothed") == SMOOTHING and set(shares.values()) == {0}
    study = studies.STUDIES["ablation"](False, tmp_path, str(own_recipe(smoothing=0.2)))
    assert "recommender.smoothing=0.2" in study.variants[-1].overrides


def test_without_csft_the_item_encoder_starts_from_the_untrained_model(finished):
    folder, _ = finished("ablation")
    for variant, stage in (("no-csft", "mntp"), ("contrastive-alone", "iem")):
        run = open_run(folder / "runs" / variant)
        inputs = artifacts.require(run.folder / stage, "iem").inputs
        assert inputs["model.source"] == artifacts.require(run.backbone, "csft").fingerprint
        assert "csft" not in inputs and not run.csft.exists()


def test_the_ablation_takes_the_papers_iem_whatever_that_of_the_recipe_is(own_recipe, tmp_path):
    pairs = {"steps": 2, "positives": "consumed-next"}
    recipe = own_recipe(iem={"attention": "causal", "mntp": {"steps": 0}, "contrastive": pairs})
    study = studies.STUDIES["ablation"](False, tmp_path, str(recipe))
    shared = (*study.overrides, "evaluation.reference=sasrec-llm2rec")
    recipes = {
        one.name: load_recipe(recipe, (*shared, *one.overrides))
        for one in study.variants
        if "llm2rec" in one.overrides[0]
    }
    parts = {
        name: (one.iem.attention, one.iem.contrastive.positives, one.iem.mntp.steps)
        for name, one in recipes.items()
    }
    assert parts == {
        "steps": ("bidirectional", "dropout", MNTP_STEPS),
        "no-csft": ("bidirectional", "dropout", MNTP_STEPS),
        "contrastive-alone": ("bidirectional", "dropout", 0),
        "consumed-pairs": ("causal", "consumed-next", 0),
    }


def floor_study(users):
    """A study of two floors, without a language model: two variants over a log of so many users."""

    def build(small, folder, recipe):
        world = World("games", users)
        entries = [Entry("popularity", "first", "popularity"), Entry("markov", "second", "markov")]
        return Study(
            question="Which floor is higher?",
            recipe=recipe,
            overrides=(*over_world(world, folder), "model.source=tiny-random", *TINY),
            variants=(
                Variant("first", "popularity", (rows_of(["popularity"]),)),
                Variant("second", "both", (rows_of(["popularity", "markov"]),)),
            ),
            judge=lambda runs, place: [Judged("Floors", "Nothing.", "popularity", gathered(runs, entries))],
            worlds=(world,),
        )

    return build


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(studies.STUDIES, "floors", floor_study(users=40))
    original = pipeline.run

    def killed_in_the_second(recipe, out, *rest, **named):
        if out.name == "second":
            raise KeyboardInterrupt
        return original(recipe, out, *rest, **named)

    monkeypatch.setattr(pipeline, "run", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        lr.study("floors", tmp_path / "study")
    assert not (tmp_path / "study" / "study.json").exists()
    monkeypatch.setattr(pipeline, "run", original)
    before = len(events(tmp_path / "study/runs/first"))
    lr.study("floors", tmp_path / "study")
    assert {event for _, event in events(tmp_path / "study/runs/first")[before:]} == {"keep"}
    assert (tmp_path / "study" / "study.json").exists()


def test_a_cumulative_study_that_is_stopped_has_the_tables_so_far(tmp_path, monkeypatch):
    def build(small, folder, recipe):
        third = Variant("third", "again", (rows_of(["popularity", "markov", "item-knn"]),))
        study = floor_study(users=40)(small, folder, recipe)
        return replace(study, variants=(*study.variants, third), cumulative=True)

    monkeypatch.setitem(studies.STUDIES, "floors", build)
    original, folder = pipeline.run, tmp_path / "study"

    def killed_in_the_third(recipe, out, *rest, **named):
        if out.name == "third":
            raise KeyboardInterrupt
        return original(recipe, out, *rest, **named)

    monkeypatch.setattr(pipeline, "run", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        lr.study("floors", folder)
    so_far = json.loads((folder / "so-far.json").read_text())
    assert (list(so_far["variants"]), so_far["pending"]) == (["first", "second"], ["third"])
    assert list(so_far["tables"]["Floors"]["rows"]) == ["popularity", "markov"]
    assert "still to be run is third" in (folder / "study.html").read_text()
    assert not (folder / "study.json").exists()
    monkeypatch.setattr(pipeline, "run", original)
    assert lr.study("floors", folder)["pending"] == []
    assert not (folder / "so-far.json").exists()
    assert "still to be run" not in (folder / "study.html").read_text()


def test_stages_of_a_study_beside_are_shared(tmp_path, monkeypatch):
    monkeypatch.setitem(studies.STUDIES, "floors", floor_study(users=40))
    for name in ("one", "two"):
        lr.study("floors", tmp_path / name)
    shared = [stage for stage, event in events(tmp_path / "two/runs/first") if event == "share"]
    assert shared == ["data/main"]
    catalogues = [tmp_path / name / "runs/first/data/main/catalogue.parquet" for name in ("one", "two")]
    assert catalogues[0].samefile(catalogues[1])


def test_cold_start_has_a_table_for_each_number_of_known_events_and_for_cold_targets(finished):
    folder, found = finished("cold-start")
    known = [f"Users with {words}" for words in ("1 known event", "2 known events", "3 known events")]
    assert list(found["tables"]) == [
        *known,
        "Users with 5 known events",
        "Items seen in training",
        "Items never seen in training",
        "Items never seen, among themselves",
        "Places kept for new items: items seen",
        "Places kept for new items: items never seen",
    ]
    among = found["tables"]["Items never seen, among themselves"]["protocol"]["ranking"]
    assert among.startswith("full, over the items without training events")
    sequences = Sequences.load(open_run(folder / "runs" / "all").data)
    last = found["tables"]["Items never seen in training"]["users"]
    first = found["tables"]["Items seen in training"]["users"]
    assert last > 0 and first + last == len(sequences.held_out(TEST))


def test_more_events_than_a_recommender_looks_at_make_no_table(finished, tmp_path, monkeypatch):
    folder, _ = finished("cold-start")
    run = open_run(folder / "runs" / "all")
    cold_start = importlib.import_module("llm2rec.studies.cold_start")  # the package has the function of that name
    length = run.domain().config.history_length
    monkeypatch.setattr(cold_start, "KNOWN_EVENTS", (1, length, length + 1))
    tables = cold_start._of_known_users(run, run.domain(), tmp_path)
    assert [table.title for table in tables] == ["Users with 1 known event", f"Users with {length} known events"]


def test_places_for_new_items_cost_the_others_what_they_give(finished):
    folder, found = finished("cold-start")
    tables = [
        found["tables"][f"Places kept for new items: items {kind}"]["rows"] for kind in ("seen", "never seen")
    ]
    trained, new = (
        [rows[label]["recall@10"]["mean"] for label in PLACES if label != AS_SCORED] for rows in tables
    )
    assert trained == sorted(trained, reverse=True) and trained[0] > trained[-1]
    assert new == sorted(new) and new[0] < new[-1]


def test_lists_without_places_for_new_items_are_those_of_the_text(finished):
    folder, _ = finished("cold-start")
    kept = pl.read_parquet(folder / "measured" / "places" / "per_user.parquet").filter(row=AS_SCORED)
    text = pl.read_parquet(folder / "runs/all/evaluation/per_user.parquet").filter(row="sasrec-llm2rec")
    both = kept.join(text, on=["user_id", "item_id", "seed"], suffix="_text")
    listed = pl.col("rank_text") <= 10
    assert both.filter(listed).height > 10 and both.filter(~listed).height > 10
    assert both.filter(listed & (pl.col("rank") != pl.col("rank_text"))).is_empty()
    assert (both.filter(~listed)["rank"] == 40).all()


def test_held_out_items_rank_among_themselves_as_their_scores_do(finished):
    folder, found = finished("cold-start")
    domain = open_run(folder / "runs" / "all").domain()
    sequences, scorer = Sequences.load(domain.data), load_scorer(domain, "sasrec-llm2rec", 0)
    cold = [sequences.item_ids.index(item) for item in cold_items(domain.data).cast(pl.String)]
    ranked = pl.read_parquet(folder / "measured" / "among-new" / "per_user.parquet").filter(row="text")
    assert ranked.height == found["tables"]["Items never seen in training"]["users"]
    rank_of = {(user, item): rank for user, item, rank in ranked.select("user_id", "item_id", "rank").iter_rows()}
    positions = sequences.held_out(TEST)
    users, targets = sequences.users_of(positions), np.asarray(sequences.items)[positions] - 1
    scores = scorer.score(torch.from_numpy(sequences.histories(positions, domain.config.history_length)))
    for row, user, target in zip(scores, users, targets, strict=True):
        if target in cold:
            key = str(sequences.user_ids[int(user)]), str(sequences.item_ids[int(target)])
            assert rank_of[key] == (row[cold] >= row[target]).sum()


def test_known_users_have_that_many_events_and_a_trained_target(finished):
    folder, _ = finished("cold-start")
    domain = open_run(folder / "runs" / "all").domain()
    sequences, cold = Sequences.load(domain.data), cold_items(domain.data)
    chosen = known_users(sequences, 5)
    positions = chosen.held_out(TEST)
    assert 0 < len(positions) < len(sequences.held_out(TEST))
    assert (positions - np.asarray(chosen.offsets)[chosen.users_of(positions)]).min() >= 5
    targets = {chosen.item_ids[item - 1] for item in np.asarray(chosen.items)[positions]}
    assert targets.isdisjoint(cold.to_list())
    with pytest.raises(DataError, match="after 99 or more events"):
        known_users(sequences, 99)


def test_a_target_that_only_validation_and_test_name_is_not_seen_in_training():
    parts = np.tile(np.array([TRAIN, VALIDATION, TEST], dtype=np.uint8), 2)
    items = np.array([1, 3, 2, 2, 1, 3], dtype=np.int32)  # nobody trains on c; b is trained on by the second user
    sequences = Sequences(items, np.array([0, 3, 6]), parts, ["a", "b", "c"], pl.Series(["u", "v"]))
    assert trained_items(sequences).to_list() == ["a", "b"]
    chosen = known_users(sequences, 2)
    assert np.asarray(chosen.items)[chosen.held_out(TEST)].tolist() == [2]


def test_targets_neither_trained_on_nor_held_out_are_in_no_table(finished, monkeypatch):
    folder, _ = finished("cold-start")
    cold_start = importlib.import_module("llm2rec.studies.cold_start")
    runs = {"all": open_run(folder / "runs" / "all")}
    trained = trained_items(Sequences.load(runs["all"].data))
    monkeypatch.setattr(cold_start, "trained_items", lambda sequences: trained[1:])
    tables = {table.title: table.per_user["item_id"] for table in cold_start._judge(runs, folder)}
    for title in ("Items seen in training", "Places kept for new items: items seen"):
        assert set(tables[title]) == set(trained[1:])
    assert trained[0] not in set(tables["Items never seen in training"])


def test_histories_are_cut_to_the_last_events(finished):
    folder, _ = finished("cold-start")
    run = open_run(folder / "runs" / "all")
    sequences = Sequences.load(run.data)
    seen = []

    class Recorder:
        n_items = sequences.n_items

        def score(self, histories):
            seen.append(histories)
            return torch.zeros(len(histories), self.n_items)

    ranked_by([("recorder", 0, Recorder())], sequences, run, history_length=2)
    expected = sequences.histories(sequences.held_out(TEST), 2)
    assert torch.cat(seen).numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("known", [1, 2])
def test_only_the_known_events_are_hidden_from_the_ranking(finished, known):
    folder, found = finished("cold-start")
    run = open_run(folder / "runs" / "all")
    assert run.recipe.evaluation.mask_history
    sequences, scorer = Sequences.load(run.data), load_scorer(run.domain(), "popularity", 0)
    ranked = pl.read_parquet(folder / f"measured/known-{known}/per_user.parquet").filter(row="popularity")
    tested = dict(ranked.select("user_id", "rank").iter_rows())
    positions = sequences.held_out(TEST)
    positions = positions[[str(sequences.user_ids[int(user)]) in tested for user in sequences.users_of(positions)]]
    scores = scorer.score(torch.from_numpy(sequences.histories(positions, known).astype(np.int64)))
    items, by_hand = np.asarray(sequences.items), []
    for position, row in zip(positions, scores, strict=True):
        target = int(items[position])
        hidden = set(items[position - known : position].tolist()) - {target}
        better = {item for item in range(1, sequences.n_items + 1) if row[item - 1] >= row[target - 1]}
        by_hand.append(len(better - hidden))
    assert list(tested.values()) == by_hand
    words = "last known event alone" if known == 1 else "last 2 known events alone"
    title = "Users with 1 known event" if known == 1 else "Users with 2 known events"
    assert words in found["tables"][title]["protocol"]["ranking"]


def test_context_and_text_are_averaged_with_the_times_that_context_needs(finished):
    folder, found = finished("context")
    (table,) = found["tables"].values()
    assert list(table["rows"]) == ["ids", "context", "text", "ids and text", "context and text"]
    domain = open_run(folder / "runs" / "all").domain()
    pair = load_scorer(domain, "sasrec-context", 0), load_scorer(domain, "sasrec-llm2rec", 0)
    assert pair[0].needs_times and not pair[1].needs_times
    sequences, length = Sequences.load(domain.data), domain.config.history_length
    hidden = {"mask_history": True}  # as the demo's recipe says
    weight = best_weight(validation_by_weight(ScoreAverage(*pair), sequences, length, **hidden))
    expected = protocol.evaluate(ScoreAverage(*pair, weight), sequences, TEST, length, **hidden)
    measured = pl.read_parquet(folder / "measured/combined/per_user.parquet")
    assert measured["rank"].to_list() == expected["rank"].to_list()


def test_of_the_domain_outside_no_title_is_trained_on_in_either_variant(finished):
    folder, found = finished("transfer")
    assert list(found["tables"]) == ["Judged on games", "Judged on tools", "Judged on films"]
    trained = {}
    for variant in ("one", "mix"):
        inputs = artifacts.require(folder / "runs" / variant / "csft", "csft").inputs
        trained[variant] = {key.split(".")[0] for key in inputs if key.endswith(".catalogue")}
    assert trained == {"one": set(), "mix": {"games", "tools"}}  # a single domain needs no name


def test_the_sampled_users_are_those_of_every_direct_row(finished):
    folder, found = finished("csft-direct")
    (table,) = found["tables"].values()
    assert table["users"] == 40
    users = [
        [
            pl.read_parquet(folder / f"measured/{name}/{begin}/per_user.parquet")["user_id"].to_list()
            for begin in (0, 20)
        ]
        for name in ("backbone-direct", "csft-direct")
    ]
    assert users[0] == users[1]
    assert len({*users[0][0], *users[0][1]}) == 40


def test_one_direct_row_is_the_untrained_model_and_one_that_of_csft(finished):
    folder, _ = finished("csft-direct")
    run = open_run(folder / "runs" / "all")
    before, after = (
        artifacts.require(folder / "measured" / name / "0", "study").inputs
        for name in ("backbone-direct", "csft-direct")
    )
    assert before["model.source"] == artifacts.require(run.backbone, "csft").fingerprint
    assert after["csft"] == artifacts.require(run.csft, "csft").fingerprint


def test_a_sample_larger_than_the_users_is_all_of_them(finished):
    folder, _ = finished("csft-direct")
    sequences = Sequences.load(open_run(folder / "runs" / "all").data)
    tested = sequences.users_of(sequences.held_out(TEST))
    assert sampled_users(sequences, 10_000, 0).tolist() == sorted(set(tested.tolist()))


def test_measured_ranks_are_kept_while_their_inputs_are_the_same(finished):
    folder, _ = finished("context")
    file = folder / "measured/combined/manifest.json"
    before = file.stat().st_mtime_ns
    lr.study("context", folder, True, TINY)
    assert file.stat().st_mtime_ns == before


def test_with_few_users_nothing_is_tested_and_the_table_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(studies.STUDIES, "floors", floor_study(users=20))
    found = lr.study("floors", tmp_path / "study")
    (table,) = found["tables"].values()
    assert {result["verdict"] for result in table["comparisons"].values()} == {"too few users"}
    assert "Only 20 test users" in report.render_table(table).caption
    assert "Only 20 test users" in (tmp_path / "study" / "study.html").read_text()


@pytest.fixture(scope="module")
def floors(tmp_path_factory):
    """Runs a floor over a world with the given changes."""
    folder = tmp_path_factory.mktemp("floors")

    def floor(name, users, *changes):
        world = World("games", users)
        world.write(folder / name)
        files = [
            f"data.{key}={path}"
            for key, path in zip(("interactions", "items"), world.files(folder / name), strict=True)
        ]
        rows = rows_of(["popularity"])
        return lr.run("demo", folder / f"{name}-run", (*files, "model.source=tiny-random", rows, *TINY, *changes))

    return floor


def test_runs_over_other_catalogues_are_refused_with_the_first_other_item(floors):
    runs = {"whole": floors("whole", 40), "core": floors("core", 8, "data.filters.k_core=2")}
    missing = set(Catalogue.read(runs["whole"].data / "catalogue.parquet").item_ids)
    missing -= set(Catalogue.read(runs["core"].data / "catalogue.parquet").item_ids)
    entries = [Entry(name, name, "popularity") for name in runs]
    with pytest.raises(ArtifactError, match=f"items only in 'whole': '{min(missing)}'"):
        gathered(runs, entries)
    with pytest.raises(ArtifactError, match="catalogues of .* differ"):
        comparison.compare(list(runs.values()))


@pytest.mark.parametrize(("repeats", "said"), [("keep", False), ("keep-first", True)])
def test_a_table_says_where_a_history_competes_that_can_hold_no_target(floors, repeats, said):
    run = floors(repeats, 40, "evaluation.mask_history=false", f"data.filters.repeats={repeats}")
    table = gathered({"one": run}, [Entry("popularity", "one", "popularity")])
    found = studies._statistics(Judged("title", "meaning", "popularity", table), run)
    assert ("though no user of this log consumes one twice" in found["protocol"]["ranking"]) is said


def test_runs_over_other_splits_are_refused_with_the_first_other_event(floors):
    runs = {"one": floors("one", 40), "two": floors("two", 40, "data.split.holdout=2")}
    table = gathered(runs, [Entry(name, name, "popularity") for name in runs])
    tested = Judged("title", "meaning", "one", table)
    with pytest.raises(ArtifactError, match="test events of .* differ: .*first: user 'u0000'"):
        studies._statistics(tested, runs["one"])


def test_a_row_that_a_variant_lacks_is_named_with_those_it_has(floors):
    runs = {"lacking": floors("lacking", 40)}
    with pytest.raises(ConfigError, match="'lacking' was not run with the row 'markov'; its rows: popularity"):
        gathered(runs, [Entry("markov", "lacking", "markov")])


def test_a_row_without_its_vectors_is_named(finished, tmp_path):
    folder, _ = finished("context")
    shutil.copytree(folder / "runs/all", tmp_path / "run")
    run = open_run(tmp_path / "run")
    artifacts.move_aside(run.embeddings("llm2rec"), run.folder)
    with pytest.raises(ArtifactError, match="has no vectors 'llm2rec'"):
        scorers(run, run.domain(), {"text": "sasrec-llm2rec"})


def test_an_unknown_study_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="ablation, budget, cold-start, context, transfer, csft-direct"):
        lr.study("nothing", tmp_path / "study")


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [("context", "csft.max_token=5", "no such key"), ("transfer", "data.source=steam", r"domains\.NAME\.KEY")],
)
def test_a_bad_override_leaves_no_folder(tmp_path, name, override, words):
    with pytest.raises(ConfigError, match=words):
        lr.study(name, tmp_path / "study", True, (override,))
    assert not (tmp_path / "study").exists()


@pytest.fixture
def own_recipe(tmp_path):
    """Writes a recipe over a made log, or over several domains of it."""

    def write(*domains, iem=None, smoothing=0):
        world = World("games", 40)
        world.write(tmp_path / "log")
        files = dict(zip(("interactions", "items"), map(str, world.files(tmp_path / "log")), strict=True))
        content = {"domains": dict.fromkeys(domains, files)} if domains else {"data": files}
        content |= {"model": {"source": "tiny-random"}, "csft": {"epochs": 1}}
        content |= {"iem": iem or {"mntp": {"steps": 1}, "contrastive": {"steps": 2}}}
        content |= {
            "recommender": {"rows": ["markov"], "smoothing": smoothing},
            "evaluation": {"reference": "markov"},
        }
        (tmp_path / "own.yaml").write_text(json.dumps(content))
        return tmp_path / "own.yaml"

    return write


def test_a_study_runs_over_the_log_of_a_recipe_of_ones_own(own_recipe, tmp_path):
    changes = (*(one for one in TINY if "csft.max_tokens" not in one), "iem.contrastive.batch_size=8", "seed=3")
    found = lr.study("context", tmp_path / "study", overrides=changes, recipe=own_recipe())
    run = open_run(tmp_path / "study/runs/all")
    assert (run.recipe.csft.epochs, run.recipe.seed) == (1, 3)
    assert run.recipe.data.interactions == tmp_path / "log/games-interactions.csv"
    assert found["tables"]["Side features, ids and text"]["users"] == 40


@pytest.mark.parametrize(
    ("name", "domains", "words"),
    [
        ("ablation", ["a", "b"], "takes a recipe with a single log.* has the domains a, b"),
        ("transfer", [], "takes a recipe with three domains .* has none"),
        ("transfer", ["a", "b"], "has 2"),
    ],
)
def test_a_recipe_that_does_not_fit_the_study_is_refused(name, domains, words, own_recipe, tmp_path):
    with pytest.raises(ConfigError, match=words):
        lr.study(name, tmp_path / "study", recipe=own_recipe(*domains))
    assert not (tmp_path / "study").exists()


def test_transfer_takes_the_domains_of_a_recipe_in_their_order(own_recipe):
    recipe = str(own_recipe("first", "second", "third"))
    study = studies.STUDIES["transfer"](False, recipe, recipe)
    for variant, roles in zip(study.variants, (["in", "out", "out"], ["in", "in", "out"]), strict=True):
        changes = (*study.overrides, *study.fixed, "evaluation.reference=sasrec-backbone", *variant.overrides)
        loaded = studies.load_recipe(recipe, changes)
        assert [domain.role for domain in loaded.domains.values()] == roles


def test_the_small_form_has_a_log_of_its_own(own_recipe, tmp_path):
    with pytest.raises(ConfigError, match="leave --small or --recipe out"):
        lr.study("ablation", tmp_path / "study", small=True, recipe=own_recipe())


def test_a_study_runs_in_a_folder_of_any_name(tmp_path, monkeypatch):
    monkeypatch.setitem(studies.STUDIES, "floors", floor_study(users=40))
    found = lr.study("floors", tmp_path / "st[1] #2: 'x'")
    assert found["facts"]["data"] == [str(tmp_path / "st[1] #2: 'x'" / "world/games-interactions.csv")]


def test_results_of_other_settings_are_moved_aside(tmp_path, monkeypatch):
    monkeypatch.setitem(studies.STUDIES, "floors", floor_study(users=40))
    folder = tmp_path / "study"
    lr.study("floors", folder)
    before = (folder / "study.json").read_bytes()
    lr.study("floors", folder)
    assert not (folder / "superseded").exists()
    lr.study("floors", folder, overrides=("evaluation.k=[3]",))
    (kept,) = (folder / "superseded").rglob("study.json")
    assert kept.read_bytes() == before != (folder / "study.json").read_bytes()


@pytest.mark.parametrize("plan", ["", "[]", "{}", "{"])
def test_a_damaged_plan_says_how_it_is_mended(tmp_path, monkeypatch, plan):
    monkeypatch.setitem(studies.STUDIES, "floors", floor_study(users=40))
    (tmp_path / "study").mkdir()
    (tmp_path / "study/plan.json").write_text(plan)
    with pytest.raises(ArtifactError, match='write into it which study .*"study": "context"'):
        lr.study("floors", tmp_path / "study")
    (tmp_path / "study/plan.json").write_text('{"study": "floors", "small": false}')
    lr.study("floors", tmp_path / "study")


@pytest.mark.parametrize("key", ["csft.max_tokens", "iem.mntp.steps", "iem.contrastive.steps"])
def test_the_ablation_wants_every_stage_that_it_names_rows_after(tmp_path, key):
    with pytest.raises(ConfigError, match=f"study 'ablation' cannot do without {key}, and it is 0"):
        lr.study("ablation", tmp_path / "study", True, (f"{key}=0",))
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    "override", ["iem.contrastive={steps: 4}", "iem={attention: causal}", "encode={layer: 1}"]
)
def test_a_section_that_holds_what_a_study_sets_cannot_be_overridden_as_a_whole(tmp_path, override):
    with pytest.raises(ConfigError, match="set the other keys of .* one by one"):
        lr.study("ablation", tmp_path / "study", True, (override,))


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("ablation", "encode.pooling=last"),
        ("cold-start", "data.split.cold_items=0.5"),
        ("csft-direct", "csft.mode=paper"),
        ("context", "recommender.rows=[popularity]"),
        ("context", "evaluation.reference=sasrec-id"),
        ("transfer", "domains.films.role=in"),
        ("transfer", "domains.games.role=out"),
        ("budget", "csft.schedule=cosine"),
        ("budget", "csft.evaluations=4"),
        ("budget", "csft.patience=2"),
    ],
)
def test_what_a_study_sets_itself_cannot_be_overridden(tmp_path, name, override):
    with pytest.raises(ConfigError, match=f"what the study {name!r} sets itself"):
        lr.study(name, tmp_path / "study", True, (override,))
    assert not (tmp_path / "study").exists()


def test_of_several_logs_a_pass_is_no_equal_budget(tmp_path):
    with pytest.raises(ConfigError, match=r"same CSFT budget.* set csft\.max_tokens instead"):
        lr.study("transfer", tmp_path / "study", True, ("csft.epochs=1",))
    assert not (tmp_path / "study").exists()


def test_budgets_that_a_variant_leaves_out_can_be_overridden(finished):
    folder, _ = finished("ablation")
    budgets = {name: open_run(folder / "runs" / name).recipe.csft.max_tokens for name in ("steps", "no-csft")}
    assert budgets == {"steps": 4096, "no-csft": 0}  # of TINY, and of the variant


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(ArtifactError, match=r"holiday\.jpg"):
        lr.study("context", tmp_path, True)


def test_the_folder_of_another_study_is_left_alone(finished):
    folder, _ = finished("context")
    with pytest.raises(ArtifactError, match="holds the small form of the study 'context'"):
        lr.study("ablation", folder, True)


@pytest.mark.parametrize("name", studies.STUDIES)
@pytest.mark.parametrize("local", [True, False])
def test_the_real_form_of_every_study_is_a_valid_recipe(name, local, tmp_path, monkeypatch):
    monkeypatch.delenv("LLM2REC_DATA_DIR", raising=False)
    if local:
        monkeypatch.setenv("LLM2REC_DATA_DIR", str(tmp_path))
    recipe = studies.base_recipe()
    assert recipe == ("games" if local else "demo")
    study = studies.STUDIES[name](False, tmp_path, recipe)
    assert study.recipe == recipe and not study.worlds
    for variant in study.variants:
        changes = (*study.overrides, *study.fixed, "evaluation.reference=sasrec-backbone", *variant.overrides)
        studies.load_recipe(study.recipe, changes)


def test_the_budget_that_the_readme_gives_the_demo_is_the_one_it_wants(tmp_path, monkeypatch):
    class Begun(Exception):
        pass

    def begin(*_, **named):
        raise Begun

    monkeypatch.setattr(pipeline, "run", begin)
    with pytest.raises(ConfigError, match=r"set csft\.max_tokens to 196,608 or more"):
        lr.study("budget", tmp_path / "refused", recipe="demo")
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (override,) = re.findall(r"the demo wants `--set (csft\.max_tokens=\d+)`", readme)
    with pytest.raises(Begun):
        lr.study("budget", tmp_path / "begun", overrides=(override,), recipe="demo")


@pytest.mark.parametrize("name", THEMES)
def test_a_made_log_is_the_same_every_time(tmp_path, name):
    world = World(name, users=5)
    for folder in (tmp_path / "a", tmp_path / "b"):
        world.write(folder)
    for first, second in zip(world.files(tmp_path / "a"), world.files(tmp_path / "b"), strict=True):
        assert first.read_bytes() == second.read_bytes()
    titles = pl.read_csv(world.files(tmp_path / "a")[1])["title"]
    assert titles.n_unique() == 40
