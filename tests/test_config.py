import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml

from llm2rec import config, loading, rows
from llm2rec.data.filters import filtered
from llm2rec.data.splits import Split
from llm2rec.errors import ConfigError
from llm2rec.lm.csft import csft
from llm2rec.lm.iem import contrastive, mntp
from llm2rec.lm.lora import Lora
from llm2rec.loading import load_recipe, parse_recipe, recipe_names
from llm2rec.rec.architecture import Architecture
from llm2rec.rec.fit import Optimisation
from llm2rec.stages.recommenders import settings_of
from llm2rec.training import Optimizer

SOURCE = Path(config.__file__).parent
SECTIONS = {
    name: kind
    for name, kind in vars(config).items()
    if isinstance(kind, type) and issubclass(kind, config.Section)
}


@pytest.fixture
def write(tmp_path):
    def write_recipe(**changes):
        content = yaml.safe_load((loading.RECIPES / "demo.yaml").read_text())
        content.update(changes)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write_recipe


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_parses(name):
    assert load_recipe(name).recommender.rows


def test_an_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(ConfigError, match="demo"):
        load_recipe("no-such-recipe")


def test_an_unknown_key_is_refused_with_the_allowed_ones(write):
    with pytest.raises(ConfigError, match=r"csft\.max_token: no such key; allowed here: .*max_tokens"):
        load_recipe(write(csft={"max_token": 5, "max_tokens": 5}))


def test_a_wrong_value_type_names_key_and_value():
    with pytest.raises(ConfigError, match=r"csft\.max_tokens: .*'many'"):
        load_recipe("demo", ["csft.max_tokens=many"])


def test_an_unknown_row_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown row 'sasrec-magic'.*sasrec-llm2rec"):
        load_recipe("demo", ["recommender.rows=[sasrec-magic]"])


def test_overrides_are_read_as_yaml():
    recipe = load_recipe("demo", ["recommender.seeds=3", "evaluation.k=[1, 7]", "csft.learning_rate=1e-4"])
    assert (recipe.recommender.seeds, recipe.evaluation.k, recipe.csft.learning_rate) == (3, (1, 7), 1e-4)


def test_overriding_the_files_drops_the_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("demo", ["data.interactions=log.csv", "data.items=items.csv"])
    assert recipe.data.source is None
    assert recipe.data.interactions == tmp_path / "log.csv"


def test_source_and_files_in_one_recipe_are_refused(write):
    files = {"source": "movielens-100k", "interactions": "a.csv", "items": "b.csv"}
    with pytest.raises(ConfigError, match="only one of"):
        load_recipe(write(data=files))


def test_paths_in_a_recipe_are_relative_to_its_folder(write, tmp_path):
    recipe = load_recipe(write(data={"interactions": "a.csv", "items": "b.csv"}))
    assert recipe.data.items == tmp_path / "b.csv"


def test_environment_variables_in_paths_are_filled_in(write, monkeypatch, tmp_path):
    path = write(data={"interactions": "${WHERE}/a.csv", "items": "b.csv"})
    with pytest.raises(ConfigError, match="environment variable is not set"):
        load_recipe(path)
    monkeypatch.setenv("WHERE", str(tmp_path))
    assert load_recipe(path).data.interactions == tmp_path / "a.csv"


SHARED = """
domains:
  games: &base
    source: amazon-games
    filters: {k_core: 5}
  films:
    <<: *base
    source: movielens-100k
  books: *base
model: {source: tiny-random}
csft: {epochs: 1}
iem: {mntp: {steps: 1}, contrastive: {steps: 1}}
"""


def test_an_override_of_one_section_leaves_those_that_repeat_it_by_a_yaml_alias(tmp_path):
    (tmp_path / "mine.yaml").write_text(SHARED)
    recipe = load_recipe(tmp_path / "mine.yaml", ["domains.games.filters.k_core=3", "domains.books.source=steam"])
    assert {name: one.filters.k_core for name, one in recipe.domains.items()} == {
        "games": 3,
        "films": 5,
        "books": 5,
    }
    assert [one.source for one in recipe.domains.values()] == ["amazon-games", "movielens-100k", "steam"]


def test_a_section_that_holds_itself_by_a_yaml_alias_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text(SHARED + "loggers: &all [*all]\n")
    with pytest.raises(ConfigError, match="mine.yaml is not valid YAML"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize("override", ["csft", "=5", "seed.inner=5"])
def test_a_malformed_override_is_a_config_error(override):
    with pytest.raises(ConfigError):
        load_recipe("demo", [override])


def test_both_csft_budgets_are_refused(write):
    with pytest.raises(ConfigError, match="exactly one"):
        load_recipe(write(csft={"epochs": 1, "max_tokens": 5}))


def test_overriding_one_csft_budget_replaces_the_other():
    assert load_recipe("demo", ["csft.epochs=2"]).csft.max_tokens is None


def test_a_reference_that_is_no_row_is_refused():
    with pytest.raises(ConfigError, match="'foo' is not a row"):
        load_recipe("demo", ["evaluation.reference=foo"])


# Sections that a stage takes apart: each value becomes the argument of its name.
TAKEN_APART = {
    config.FiltersConfig: [filtered],
    config.SplitConfig: [Split],
    config.OptimizerConfig: [Optimizer],
    config.LoraConfig: [Lora],
    config.CsftConfig: [csft],
    config.MntpConfig: [mntp],
    config.ContrastiveConfig: [contrastive],
    config.CourseConfig: [Architecture, Optimisation],
    config.RecommenderConfig: [Architecture, Optimisation],
}
READ_IN_CONFIG = ("of_interactions", "of_items", "by_domain")  # its other methods only validate, or name things


class Reads(ast.NodeVisitor):
    """(section, field) of what is read of a recipe: of variables and arguments that are known to be sections."""

    def __init__(self):
        self.read, self.known = set(), {}

    def visit_FunctionDef(self, node):
        outer = dict(self.known)
        for argument in (*node.args.args, *node.args.kwonlyargs):
            self.known[argument.arg] = SECTIONS.get(getattr(argument.annotation, "id", None))
        self.generic_visit(node)
        self.known = outer

    def visit_Assign(self, node):
        self.generic_visit(node)
        targets, values = (getattr(part, "elts", [part]) for part in (node.targets[0], node.value))
        if len(targets) == len(values):
            named = zip(targets, values, strict=True)
            self.known |= {one.id: self.section(value) for one, value in named if isinstance(one, ast.Name)}

    def visit_Attribute(self, node):
        self.generic_visit(node)
        section = self.section(node.value)
        if section and node.attr in section.model_fields:
            self.read.add(declared(section, node.attr))

    def section(self, node):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
        if name == "recipe" or (name == "config" and isinstance(node, ast.Attribute)):
            return config.Recipe if name == "recipe" else config.DomainConfig
        if not isinstance(node, ast.Attribute):
            return self.known.get(name)
        field = getattr(self.section(node.value), "model_fields", {}).get(name)
        return SECTIONS.get(getattr(field and field.annotation, "__name__", None))


def declared(section, name):
    """The section that a field comes from, for those that inherit it, and its name."""
    return [kind for kind in section.__mro__ if name in getattr(kind, "model_fields", {})][-1].__name__, name


def unread(sections):
    reads = Reads()
    for path in SOURCE.rglob("*.py"):
        if path.name != "config.py":
            reads.visit(ast.parse(path.read_text()))
    for kind in ast.parse((SOURCE / "config.py").read_text()).body:
        for method in getattr(kind, "body", []):
            if getattr(method, "name", None) in READ_IN_CONFIG:
                reads.known = {"self": SECTIONS[kind.name]}
                for statement in method.body:
                    reads.visit(statement)
    for section, parts in TAKEN_APART.items():
        taken = {name for part in parts for name in inspect.signature(part).parameters}
        reads.read |= {declared(section, name) for name in taken & section.model_fields.keys()}
    every = {declared(section, name) for section in sections for name in section.model_fields}
    return sorted(every - reads.read)


def test_every_config_field_is_read_by_some_stage():
    assert unread(SECTIONS.values()) == []


def test_a_field_that_is_read_of_another_section_alone_counts_as_unread():
    class Idle(config.ModelConfig):
        steps: int
        text: str

    assert unread([Idle]) == [("Idle", "steps"), ("Idle", "text")]


def test_every_setting_of_a_recommender_is_one_of_its_parts():
    parts = {field.name for kind in (Architecture, Optimisation) for field in dataclasses.fields(kind)}
    assert set(config.RecommenderConfig.model_fields) - parts == {"rows", "seeds", "per_row"}


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path):
    (tmp_path / "twice.yaml").write_text("seed: 0\nmodel: {source: tiny-random}\nseed: 1\n")
    with pytest.raises(ConfigError, match="line 1: the key 'seed' stands twice"):
        load_recipe(tmp_path / "twice.yaml")


def test_a_row_may_name_the_attention_of_its_vectors():
    row = rows.Row.parse("sasrec-csft-causal+average")
    assert (row.vectors, row.attention, row.fusion) == ("csft", "causal", "average")
    assert row.parents == ("sasrec-id", "sasrec-csft-causal")


def test_a_row_over_a_text_encoder_may_have_ids_beside_it():
    row = rows.Row.parse("gru4rec-minilm+sum")
    assert (row.architecture, row.text_encoder, row.attention, row.fusion) == ("gru4rec", "minilm", None, "sum")
    assert rows.Row.parse("sasrec-llm2rec").text_encoder is None


@pytest.mark.parametrize(
    ("names", "preferred"),
    [
        (["sasrec-backbone", "sasrec-llm2rec+average", "gru4rec-llm2rec", "sasrec-llm2rec"], "sasrec-llm2rec"),
        (["popularity", "sasrec-id", "sasrec-minilm", "sasrec-csft-causal"], "sasrec-csft-causal"),
        (["ease", "sasrec-id", "sasrec-minilm"], "sasrec-minilm"),
        (["popularity", "sasrec-context", "sasrec-id"], "sasrec-id"),
        (["ease", "popularity"], "ease"),
    ],
)
def test_without_a_name_the_row_over_the_latest_vectors_answers(names, preferred):
    assert rows.preferred_row(names) == preferred


@pytest.mark.parametrize(
    ("names", "preferred"),
    [
        (["backbone", "csft-causal", "llm2rec"], "llm2rec"),
        (["backbone", "backbone-causal", "minilm"], "backbone-causal"),
    ],
)
def test_without_a_name_the_latest_vectors_answer(names, preferred):
    assert rows.preferred_set(names) == preferred


def test_text_encoders_are_named_beside_the_ready_one():
    named = ["encode.text_encoders.mine=some/encoder", "recommender.rows=[sasrec-minilm, sasrec-mine]"]
    recipe = load_recipe("demo", named)
    assert recipe.encode.text_encoders == {"minilm": "all-minilm-l6-v2", "mine": "some/encoder"}
    with pytest.raises(ConfigError, match="unknown row 'sasrec-yours'.*here: minilm, mine"):
        load_recipe("demo", [*named[:1], "recommender.rows=[sasrec-yours]"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llm2rec", "another name"),
        ("data", "'data' means something else .*another name"),
        ("context", "'context' means something else .*another name"),
        ("my-own", "pattern"),
    ],
)
def test_a_text_encoder_has_a_name_of_its_own(name, words):
    with pytest.raises(ConfigError, match=f"text_encoders.*{words}"):
        load_recipe("demo", [f"encode.text_encoders.{name}=some/encoder"])


def test_models_in_folders_are_found_beside_the_recipe(tmp_path):
    (tmp_path / "models" / "own").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(
        "data: {source: movielens-100k}\nmodel: {source: models/own}\ncsft: {epochs: 1}\n"
        "iem: {mntp: {steps: 1}, contrastive: {steps: 1}}\n"
        "encode: {text_encoders: {mine: ./models/own, hub: a/b}}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    own = str((tmp_path / "models" / "own").resolve())
    assert recipe.model.source == own
    assert recipe.encode.text_encoders == {"minilm": "all-minilm-l6-v2", "mine": own, "hub": "a/b"}


def test_a_row_has_a_course_of_training_of_its_own():
    changes = ["recommender.per_row.sasrec-id={max_epochs: 10, dropout: 0.5}", "recommender.max_epochs=20"]
    recipe = load_recipe("demo", changes)
    again = parse_recipe(recipe.model_dump(mode="json"), "what a run keeps")
    for recommender in (recipe.recommender, again.recommender):
        own, other = (settings_of(recommender, row) for row in ("sasrec-id", "sasrec-csft"))
        assert (own.max_epochs, own.dropout, own.learning_rate) == (10, 0.5, recommender.learning_rate)
        assert other == recommender and other.max_epochs == 20


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        ("popularity", "{max_epochs: 1}", "'popularity' is not trained"),
        ("sasrec-csft+average", "{max_epochs: 1}", "is not trained"),
        ("sasrec-ids", "{max_epochs: 1}", "unknown row 'sasrec-ids'"),
        ("sasrec-id", "{max_epochs: 0}", "per_row.sasrec-id.max_epochs"),
        ("sasrec-id", "{seeds: 2}", "per_row.sasrec-id.seeds: no such key; allowed here: max_epochs, patience"),
    ],
)
def test_a_course_that_no_row_can_have_is_refused(row, settings, words):
    with pytest.raises(ConfigError, match=words):
        load_recipe("demo", [f"recommender.per_row.{row}={settings}"])


NO_ATTENTION = ("llm2rec-causal", "minilm-causal", "id-causal", "csft-", "csft-both")


@pytest.mark.parametrize("row", [f"sasrec-{vectors}" for vectors in NO_ATTENTION])
def test_no_other_row_names_an_attention(row):
    with pytest.raises(ConfigError, match="unknown row"):
        rows.Row.parse(row)


@pytest.mark.parametrize("row", ["sasrec-context+sum", "sasrec-context+average", "gru4rec-context", "sasrec-data"])
def test_a_row_over_what_no_text_encoder_may_be_called_is_unknown(row):
    with pytest.raises(ConfigError, match="unknown row"):
        rows.Row.parse(row)


def test_a_row_over_csft_vectors_is_refused_where_csft_is_left_out():
    with pytest.raises(ConfigError, match="'sasrec-csft' needs the vectors of CSFT"):
        load_recipe("demo", ["csft.max_tokens=0"])
    assert load_recipe("demo", ["csft.max_tokens=0", "recommender.rows=[sasrec-llm2rec]"]).csft.max_tokens == 0


def test_a_row_over_mntp_vectors_is_refused_where_mntp_is_left_out():
    with pytest.raises(ConfigError, match="'sasrec-mntp' needs the vectors of MNTP"):
        load_recipe("demo", ["iem.mntp.steps=0", "recommender.rows=[sasrec-mntp]"])
    assert load_recipe("demo", ["iem.mntp.steps=0"]).iem.mntp.steps == 0


def test_a_causal_encoder_has_no_mntp():
    with pytest.raises(ConfigError, match="set mntp.steps 0"):
        load_recipe("demo", ["iem.attention=causal"])
    assert load_recipe("demo", ["iem.attention=causal", "iem.mntp.steps=0"]).iem.attention == "causal"


@pytest.mark.parametrize(
    "override", ["evaluation.k=[1001]", "evaluation.k=[0]", "evaluation.bootstrap_samples=99"]
)
def test_numbers_that_no_evaluation_can_serve_are_refused(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_recipe("demo", [override])


def test_a_model_beside_its_recipe_is_found_by_its_bare_name(write, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"")
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "modules.json").write_text("[]")
    encoders = {"mine": "encoder", "other": "nothing"}
    recipe = write(model={"source": "model.gguf"}, encode={"text_encoders": encoders})
    monkeypatch.chdir("/")
    loaded = load_recipe(recipe, ("seed=1",))
    assert loaded.model.source == str(tmp_path / "model.gguf")
    assert loaded.encode.text_encoders["mine"] == str(tmp_path / "encoder")
    assert loaded.encode.text_encoders["other"] == "nothing"


def test_an_override_leaves_the_names_of_the_recipe_alone(write, tmp_path, monkeypatch):
    recipe = write(model={"source": "org/name"})
    here = tmp_path / "elsewhere"
    (here / "org" / "name").mkdir(parents=True)
    (here / "org" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(here)
    assert load_recipe(recipe, ("seed=1",)).model.source == "org/name"
    assert load_recipe(recipe, ("model.source=org/name",)).model.source == str(here / "org" / "name")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("iem.contrastive={steps: 5, schedule: wsd, warmup_share: 0.9}", "are more than all steps"),
        ("model.compile=true", r"iem\.mntp\.gradient_checkpointing exclude each other"),
    ],
)
def test_what_a_training_would_refuse_is_refused_at_once(override, words):
    with pytest.raises(ConfigError, match=words):
        load_recipe("demo", ["iem.mntp.gradient_checkpointing=true", override])


def test_a_row_and_its_variant_that_share_a_training_cannot_be_trained_differently():
    rows = "recommender.rows=[sasrec-backbone, sasrec-backbone-causal]"
    load_recipe("demo", [rows])
    with pytest.raises(ConfigError, match="'sasrec-backbone' tries 'sasrec-backbone-causal'.* same `per_row`"):
        load_recipe("demo", [rows, "recommender.per_row.sasrec-backbone={max_epochs: 1}"])


def test_a_newer_file_of_the_same_kind_keeps_what_the_recipe_says_of_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = "{interactions: log.csv, items: items.csv, columns: {title: name}, text: '{title} ({brand})'}"
    budgets = "csft: {epochs: 1}\niem: {mntp: {steps: 1}, contrastive: {steps: 1}}\n"
    (tmp_path / "mine.yaml").write_text(f"data: {data}\nmodel: {{source: tiny-random}}\n{budgets}")
    newer = load_recipe(tmp_path / "mine.yaml", ["data.items=new.csv"]).data
    assert (newer.items, newer.columns.title) == (tmp_path / "new.csv", "name")
    assert newer.text == "{title} ({brand})"
    other = load_recipe(tmp_path / "mine.yaml", ["data.source=movielens-100k"]).data
    assert other.text == "{title}" and other.columns.title is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"source": "amazon-games", "columns": {"user": "customer", "time": "at"}}, "`columns` maps user, time,"),
        ({"folder": "steam", "columns": {"rating": "stars"}}, "`columns` maps rating,"),
        ({"source": "amazon-games", "layout": "steam"}, "`layout` 'steam' is that of a `folder`"),
        ({"interactions": "log.csv", "items": "items.csv", "layout": "steam"}, "`layout` 'steam'"),
    ],
)
def test_what_nothing_would_read_of_the_data_is_refused(write, data, words):
    with pytest.raises(ConfigError, match=f"data: {words}"):
        load_recipe(write(data=data))


def test_what_is_read_of_the_data_may_be_said(write, tmp_path):
    by_source = {"source": "amazon-games", "columns": {"item": "sku", "title": "name"}}  # add-items reads them
    assert load_recipe(write(data=by_source)).data.columns.of_items() == {"item_id": "sku", "title": "name"}
    recipe = write(data={"folder": "steam", "layout": "steam"})
    assert load_recipe(recipe).data.layout == "steam"
    assert load_recipe(recipe, ["data.folder=other"]).data.layout == "steam"
    assert load_recipe(recipe, ["data.source=amazon-games"]).data.layout == "auto"


def test_paths_in_a_whole_section_given_by_set_are_relative_to_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("demo", ["data={interactions: a.csv, items: ~/b.csv}"])
    assert recipe.data.interactions == tmp_path / "a.csv"
    assert recipe.data.items == Path("~/b.csv").expanduser()
