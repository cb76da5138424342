"""Items that came after the training are encoded, ranked by text rows, and kept apart from the training."""

import shutil
from datetime import date, datetime

import polars as pl
import pytest
import torch
from rich.console import Console

import llm2rec as lr
from llm2rec import additions, artifacts
from llm2rec.data.tables import Catalogue
from llm2rec.data.texts import item_texts
from llm2rec.display import NEW as NEW_MARK
from llm2rec.display import show_items
from llm2rec.errors import ArtifactError, ConfigError, DataError
from llm2rec.serve import added
from llm2rec.serve.recommender import with_new_items
from test_pipeline import overrides, write_world

NEW = pl.DataFrame({"item_id": ["new1", "new2"], "title": ["The red boat (1980) again", "Something else"]})

CHANGES = (
    "recommender.max_epochs=3",
    "recommender.smoothing=0.3",
    "recommender.rows=[markov, sasrec-id, sasrec-llm2rec, sasrec-llm2rec+sum, sasrec-llm2rec+average]",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("added")
    write_world(folder)
    run = lr.run("demo", folder / "run", (*overrides(folder), *CHANGES))
    NEW.write_csv(folder / "new.csv")
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run that a test may add items to, with `new.csv` beside it."""
    shutil.copytree(trained.folder, tmp_path / "run")
    shutil.copy(trained.folder.parent / "new.csv", tmp_path / "new.csv")
    return lr.open_run(tmp_path / "run")


def listed(run, history, **options):
    return [item.item_id for item in lr.recommend(run, history, k=20, exclude_history=False, **options)]


@pytest.mark.parametrize("row", ["sasrec-llm2rec", "sasrec-llm2rec+sum"])
def test_text_rows_rank_added_items_and_keep_the_order_of_the_others(run, row):
    before = listed(run, ["i03", "i04"], row=row)
    assert lr.add_items(run, run.folder.parent / "new.csv").added == 2
    after = listed(run, ["i03", "i04"], row=row)
    assert {"new1", "new2"} <= set(after)
    assert [item for item in after if item not in ("new1", "new2")] == before


def test_ids_averaged_with_text_rank_added_items_and_keep_the_scores_of_the_others(run):
    ask = {"row": "sasrec-llm2rec+average", "k": 20, "exclude_history": False}
    before = {item.item_id: item.score for item in lr.recommend(run, ["i03", "i04"], **ask)}
    lr.add_items(run, run.folder.parent / "new.csv")
    after = {item.item_id: item.score for item in lr.recommend(run, ["i03", "i04"], **ask)}
    assert after.keys() - before.keys() == {"new1", "new2"}
    assert all(after[item] == pytest.approx(score, abs=1e-5) for item, score in before.items())


@pytest.mark.parametrize("row", ["sasrec-llm2rec", "sasrec-llm2rec+average"])
def test_added_items_may_stand_in_a_history(run, row):
    lr.add_items(run, run.folder.parent / "new.csv")
    assert listed(run, ["i03", "new1"], row=row) != listed(run, ["i03", "new2"], row=row)


def test_rows_over_a_text_encoder_rank_added_items(run, trained):
    changes = (
        "recommender.rows=[sasrec-other]",
        f"encode.text_encoders.other={trained.iem}",
        "evaluation.reference=sasrec-other",
    )
    over = lr.run("demo", run.folder, (*overrides(trained.folder.parent), *CHANGES, *changes))
    lr.add_items(over, run.folder.parent / "new.csv")
    assert {"new1", "new2"} <= set(listed(over, ["i03"], row="sasrec-other"))


@pytest.mark.parametrize("row", ["sasrec-id", "markov"])
def test_id_rows_do_not_know_them(run, row):
    before = listed(run, ["i03"], row=row)
    lr.add_items(run, run.folder.parent / "new.csv")
    assert listed(run, ["i03"], row=row) == before
    with pytest.raises(DataError, match="'new1' was added after the training"):
        lr.recommend(run, ["i03", "new1"], row=row)


def test_of_a_history_of_added_items_alone_the_ids_have_no_say(run):
    lr.add_items(run, run.folder.parent / "new.csv")
    averaged, text = "sasrec-llm2rec+average", "sasrec-llm2rec"
    assert listed(run, ["new1", "new2"], row=averaged) == listed(run, ["new1", "new2"], row=text)
    assert listed(run, ["i03", "new1"], row=averaged) != listed(run, ["i03", "new1"], row=text)


def test_an_added_item_is_similar_to_the_one_with_nearly_its_title(run):
    lr.add_items(run, run.folder.parent / "new.csv")
    nearest = lr.similar(run, "new1", k=13)
    assert "i00" in [item.item_id for item in nearest[:3]]  # "The red boat (1980)"


def test_added_vectors_are_those_of_their_own_items(run, trained, tmp_path):
    titles = dict(pl.read_csv(trained.folder.parent / "items.csv").select("item_id", "title").iter_rows())
    twins = pl.DataFrame({"item_id": ["of07", "of03"], "title": [titles["i07"], titles["i03"]]})
    twins.write_csv(tmp_path / "twins.csv")
    lr.add_items(run, tmp_path / "twins.csv")
    for twin, item in (("of07", "i07"), ("of03", "i03")):
        (nearest,) = lr.similar(run, twin, k=1)
        assert nearest.item_id == item and nearest.score == pytest.approx(1, abs=1e-4)


def test_items_are_added_to_those_added_before(run, tmp_path):
    lr.add_items(run, run.folder.parent / "new.csv")
    first = {item.item_id: item.score for item in lr.recommend(run, ["i03"], k=20)}
    (tmp_path / "more.csv").write_text("item_id,title\nnew3,A third one\n")
    assert lr.add_items(run, tmp_path / "more.csv").added == 1
    both = {item.item_id: item.score for item in lr.recommend(run, ["i03"], k=20)}
    assert "new3" in both
    assert all(both[item] == pytest.approx(score, abs=1e-5) for item, score in first.items())


def test_an_unchanged_rerun_keeps_the_added_items(run, trained):
    lr.add_items(run, run.folder.parent / "new.csv")
    before = listed(run, ["i03", "new1"])
    again = lr.run("demo", run.folder, (*overrides(trained.folder.parent), *CHANGES))
    assert listed(again, ["i03", "new1"]) == before


def test_after_another_training_added_items_are_refused_until_they_are_given_again(run, trained, capsys):
    table = run.folder.parent / "new.csv"
    lr.add_items(run, table)
    before = listed(run, ["i03", "new1"])
    changes = (*CHANGES, "iem.contrastive.learning_rate=0.001")
    again = lr.run("demo", run.folder, (*overrides(trained.folder.parent), *changes))
    for call in (lambda: lr.similar(again, "i03"), lambda: lr.recommend(again, ["i03"])):
        with pytest.raises(ArtifactError, match="earlier model of this run; give `add-items` their table again"):
            call()
    assert lr.probe(again)["vectors"].keys() == {"data", "llm2rec"}  # of the trained items, as before
    assert "new1" not in listed(again, ["i03"], row="sasrec-id")  # which reads no vectors
    assert lr.add_items(again, table) == (0, 2)
    assert "2 items added before are encoded anew" in capsys.readouterr().err
    anew = listed(again, ["i03", "new1"])
    shutil.rmtree(again.folder / "added")
    lr.add_items(again, table)
    assert listed(again, ["i03", "new1"]) == anew != before


def test_an_added_item_that_a_later_training_took_in_is_no_new_one(run, trained):
    world, table = trained.folder.parent, run.folder.parent / "new.csv"
    lr.add_items(run, table)
    grown = run.folder.parent / "grown.csv"
    items = pl.concat([pl.read_csv(world / "items.csv"), NEW[:1]], how="diagonal")
    items.write_csv(grown)
    taken = (*overrides(world), *CHANGES, f"data.items={grown}")
    again = lr.run("demo", run.folder, taken)
    assert lr.add_items(again, table) == (0, 2)
    assert added.items(again.domain()).item_ids == ["new2"]
    lists = listed(again, ["i03", "new1"])
    assert len(lists) == len(set(lists)) and "new2" in lists
    assert "new1" not in {item.item_id for item in lr.recommend(again, ["i03", "new1"], k=20)}


def test_of_an_added_item_that_a_later_training_without_text_took_in_there_is_one(run, trained):
    world, grown = trained.folder.parent, run.folder.parent / "grown.csv"
    lr.add_items(run, run.folder.parent / "new.csv")
    pl.concat([pl.read_csv(world / "items.csv"), NEW[:1]], how="diagonal").write_csv(grown)
    ids = (*overrides(world), *CHANGES, f"data.items={grown}", "recommender.rows=[sasrec-id]")
    again = lr.run("demo", run.folder, ids)
    assert added.current_sets(again.domain(), ["llm2rec"])  # premise: the vectors lie there as before
    served = lr.load_row(again, "sasrec-id")
    assert served.catalogue.item_ids == [*pl.read_csv(grown)["item_id"], "new2"]
    assert served.recommend(["new1"], k=4)
    with pytest.raises(DataError, match="'new2' was added after the training"):
        served.recommend(["i03", "new2"])


def test_where_a_later_training_took_in_all_added_items_none_is_left(run, trained):
    world, table = trained.folder.parent, run.folder.parent / "new.csv"
    lr.add_items(run, table)
    grown = run.folder.parent / "grown.csv"
    pl.concat([pl.read_csv(world / "items.csv"), NEW], how="diagonal").write_csv(grown)
    again = lr.run("demo", run.folder, (*overrides(world), *CHANGES, f"data.items={grown}"))
    assert lr.add_items(again, table) == (0, 2)
    assert added.load(again.domain()) is None
    assert not (run.folder / artifacts.SCRATCH).exists()


def test_a_row_that_came_later_gets_vectors_of_the_items_added_before(run, trained, tmp_path):
    lr.add_items(run, run.folder.parent / "new.csv")
    first = added.load_vectors(run.domain(), "llm2rec").vectors.copy()
    rows = "recommender.rows=[sasrec-llm2rec, sasrec-backbone-causal]"
    more = lr.run("demo", run.folder, (*overrides(trained.folder.parent), *CHANGES, rows))
    with pytest.raises(ArtifactError, match="no row needed when they were added; give `add-items` their table"):
        lr.recommend(more, ["i03"], row="sasrec-backbone-causal")
    (tmp_path / "third.csv").write_text("item_id,title\nnew3,A third one\n")
    assert lr.add_items(more, tmp_path / "third.csv") == (1, 0)
    assert {"new1", "new2", "new3"} <= set(listed(more, ["i03"], row="sasrec-backbone-causal"))
    assert (added.load_vectors(more.domain(), "llm2rec").vectors[:2] == first).all()


def test_items_are_not_added_to_vectors_that_the_recipe_no_longer_makes(run):
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "encode: {pooling: last}\n")
    with pytest.raises(ArtifactError, match=r"llm2rec is not up to date \(encode.pooling\)"):
        lr.add_items(run.folder, run.folder.parent / "new.csv")


def test_of_a_grown_catalogue_only_the_new_items_are_added(run, trained, tmp_path):
    grown = pl.concat([pl.read_csv(trained.folder.parent / "items.csv"), NEW[:1]])
    grown.write_csv(tmp_path / "grown.csv")
    counts = lr.add_items(run, tmp_path / "grown.csv")
    assert counts == (1, 12) and counts.in_words.startswith("1 added, 12 known; ")
    assert "new1" in listed(run, ["i03"])


def test_items_are_not_added_twice(run):
    lr.add_items(run, run.folder.parent / "new.csv")
    before = (run.folder / "added" / "main" / "manifest.json").stat()
    counts = lr.add_items(run, run.folder.parent / "new.csv")
    assert counts == (0, 2) and counts.in_words == "nothing added: the run knows all 2 items"
    assert (run.folder / "added" / "main" / "manifest.json").stat() == before


def test_an_item_that_is_there_with_another_text_is_refused(run, tmp_path):
    (tmp_path / "known.csv").write_text("item_id,title\ni03,Again\nnew9,New\n")
    with pytest.raises(DataError, match="known.csv: 1 items .* another text here: 'i03'; .*'Again' here"):
        lr.add_items(run, tmp_path / "known.csv")
    assert not (run.folder / "added").exists()


@pytest.mark.parametrize("file", ["catalogue.parquet", "llm2rec/embeddings.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_file_of_added_items_is_named_with_what_to_do(run, file, damage):
    lr.add_items(run, run.folder.parent / "new.csv")
    path = run.folder / "added" / "main" / file
    path.unlink() if damage == "missing" else path.write_bytes(b"edited by hand")
    for call in (lambda: lr.similar(run, "i03"), lambda: lr.recommend(run, ["i03"])):
        with pytest.raises(ArtifactError) as caught:
            call()
        assert str(path.parent if damage == "missing" and "manifest" in file else path) in str(caught.value)
        assert f"move {run.folder / 'added' / 'main'} away and add the items again" in str(caught.value)


def test_vectors_asked_for_an_added_item_say_where_they_lie(run):
    lr.add_items(run, run.folder.parent / "new.csv")
    with pytest.raises(ArtifactError, match="'new1'.*below `added/` of the run"):
        lr.ItemEmbeddings.load(run.embeddings("llm2rec")).aligned_to(["i03", "new1"])


def test_a_run_without_text_rows_takes_no_new_items(trained, tmp_path):
    folder = trained.folder.parent
    changes = (*overrides(folder), "recommender.rows=[markov]")
    run = lr.run("demo", tmp_path / "ids", changes)
    with pytest.raises(ConfigError, match="no row of this run reads item texts"):
        lr.add_items(run, folder / "new.csv")


def test_a_new_item_may_lack_a_column_that_the_text_names(tmp_path):
    write_world(tmp_path)
    items = pl.read_csv(tmp_path / "items.csv").with_columns(brand=pl.lit("Acme"))
    items.write_csv(tmp_path / "items.csv")
    changes = ("recommender.max_epochs=1", "recommender.rows=[sasrec-llm2rec]", "data.text='{title}. {brand}'")
    run = lr.run("demo", tmp_path / "run", (*overrides(tmp_path), *changes))
    (tmp_path / "one.csv").write_text("item_id,title\nnew5,Without a brand\n")
    assert lr.add_items(run, tmp_path / "one.csv").added == 1


def with_detail(titles, detail):
    return Catalogue(pl.DataFrame({"item_id": titles, "title": titles, "detail": detail}, strict=False))


@pytest.mark.parametrize(
    ("trained_on", "given", "text"),
    [
        ([2015, 2016], [2017.0, None], "Kite (2017)"),
        ([2015, 2016], [2017.0, float("nan")], "Kite (2017)"),
        ([2015, 2016], ["about 2017", None], "Kite (about 2017)"),
        (["2015", "about 2016"], [2017.0, None], "Kite (2017)"),
        ([2015.0, None], [2017, 2018], "Kite (2017.0)"),
        ([date(2014, 1, 1), None], [datetime(2017, 1, 1), None], "Kite (2017-01-01)"),
        ([2015, 2016], [date(2017, 1, 1), None], "Kite (2017-01-01)"),
        ([True, False], [True, None], "Kite (True)"),
    ],
)
def test_new_items_read_as_those_of_the_same_values_that_were_trained_on(trained_on, given, text):
    known, new = with_detail(["Boat", "Car"], trained_on), with_detail(["Kite", "Pen"], given)
    _, texts = additions._unknown(known, known, new, "{title} ({detail})", "new.csv")
    assert texts["Kite"] == text
    assert [texts[item] for item in known.item_ids] == item_texts(known, "{title} ({detail})")


@pytest.mark.parametrize(
    ("trained_on", "given"),
    [
        ([2015, 2016], [2017.5, None]),
        ([date(2014, 1, 1), None], [datetime(2017, 1, 1, 12), None]),
        ([True, False], ["maybe", None]),
        ([[2015], [2016]], [2017, None]),
    ],
)
def test_a_type_beside_which_known_items_would_read_otherwise_is_refused(trained_on, given):
    known, new = with_detail(["Boat", "Car"], trained_on), with_detail(["Kite", "Pen"], given)
    with pytest.raises(DataError, match="other types than those of the run: {'detail'.*write them as"):
        additions._unknown(known, known, new, "{title} ({detail})", "new.csv")


def test_a_column_that_no_text_names_may_have_another_type():
    known, new = with_detail(["Boat", "Car"], [1, 2]), with_detail(["Kite", "Pen"], [1.5, None])
    unknown, texts = additions._unknown(known, known, new, "{title}", "new.csv")
    assert unknown.item_ids == ["Kite", "Pen"] and texts["Kite"] == "Kite"


@pytest.mark.parametrize("row", ["sasrec-llm2rec", "sasrec-llm2rec+average"])
def test_places_are_kept_for_new_items(run, row):
    lr.add_items(run, run.folder.parent / "new.csv")
    whole = lr.recommend(run, ["i03"], k=20, row=row)
    new = [item for item in whole if item.item_id.startswith("new")]
    others = [item for item in whole if item not in new]
    for wanted in (0, 1, 2):
        found = lr.recommend(run, ["i03"], k=4, row=row, new_items=wanted)
        expected = sorted(others[: 4 - wanted] + new[:wanted], key=lambda item: -item.score)
        assert found == expected
        assert all(item.new for item in found if item.item_id.startswith("new"))


def test_no_more_places_are_kept_than_there_are_new_items(run):
    lr.add_items(run, run.folder.parent / "new.csv")
    found = lr.recommend(run, ["i03"], k=4, new_items=4)
    assert sum(item.item_id.startswith("new") for item in found) == 2 and len(found) == 4


def plain_list(scores, hidden, new, k, places):
    """The best new ones and the best others."""
    left = [item for item in scores.argsort(descending=True).tolist() if item + 1 not in hidden]
    newest, others = ([item for item in left if new[item] == kind] for kind in (True, False))
    kept = min(places, len(newest))
    chosen = others[: max(min(k, len(left)) - kept, 0)] + newest[:kept]
    return [item + 1 for item in sorted(chosen, key=lambda item: -scores[item])]


@pytest.mark.parametrize("places", [0, 1, 2, 5])
def test_lists_with_places_are_those_of_the_plain_way(places):
    generator = torch.Generator().manual_seed(places)
    scores = torch.randn(30, 9, generator=generator)
    hidden = torch.randint(0, 10, (30, 6), generator=generator)
    new = torch.arange(9) % 3 == 1
    found = with_new_items(scores, hidden, new, 5, places)
    for items, row, seen in zip(found.tolist(), scores, hidden.tolist(), strict=True):
        assert [item for item in items if item] == plain_list(row, seen, new, 5, places)
    assert (found == 0).any()


@pytest.mark.parametrize("places", [-1, 11])
def test_places_that_a_list_does_not_have_are_refused(run, places):
    with pytest.raises(ConfigError, match="from 0 to k = 10"):
        lr.recommend(run, ["i03"], new_items=places)


@pytest.mark.parametrize("row", ["sasrec-id", "markov"])
def test_rows_without_text_keep_no_places_for_new_items(run, row):
    with pytest.raises(ConfigError, match="knows nothing of items without training events"):
        lr.recommend(run, ["i03"], row=row, new_items=1)


def test_the_terminal_marks_new_items(run):
    lr.add_items(run, run.folder.parent / "new.csv")
    console = Console(width=80)
    with console.capture() as shown:
        console.print(show_items(lr.recommend(run, ["i03"], k=4, new_items=2), "score"))
    marked = [line.split()[2] for line in shown.get().splitlines() if line.split()[1:2] == [NEW_MARK]]
    assert {"new1", "new2"} <= set(marked)
    assert "no training event" in shown.get()
