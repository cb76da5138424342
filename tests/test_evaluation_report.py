import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import polars as pl
import pytest

from conftest import printed
from llm2rec.evaluation import figures, protocol, report, slices
from llm2rec.evaluation.maps import EmbeddingMap
from llm2rec.evaluation.ranking import metric_names
from llm2rec.stages.judging import vectors_in_words
from test_evaluation_protocol import BAD, GOOD, table

RANKING = protocol.ranking_in_words(mask_history=True)


@pytest.fixture(scope="module")
def data():
    per_user = table(popularity=[BAD], **{"sasrec-id": [GOOD], "sasrec-llm2rec": [GOOD]})
    metrics = protocol.summarise(per_user, metric_names([5, 10]), samples=100)
    metrics["comparisons"] = protocol.compare_rows(per_user, "sasrec-id", samples=300)
    metrics |= {"reference": "sasrec-id", "validation": {}, "protocol": {"ranking": RANKING, "test_events": 100}}
    return report.ReportData(
        title="toy",
        facts={"users": 100},
        metrics=metrics,
        recall_curves=protocol.recall_curves(per_user, 5),
        training_curves={"csft loss": [(1, 2.0), (2, 1.0)]},
        showcase={
            "neighbours": {"<script>alert(1)</script>": {"llm2rec": [["Film & more", 0.9]]}},
            "recommendations": {"row": "sasrec-id", "user_id": "u0", "history": ["A"], "items": [["B", 1.0]]},
        },
        costs=[{"stage": "csft", "seconds": 61.0, "peak_memory_gb": None}],
        settings={"csft": {"max_tokens": 5}},
    )


def labels_of(name, points, **options):
    """The texts that a curve of a log shows."""
    drawn = figures.log_curve(name, points, **options)
    assert "mathdefault" not in drawn and "times" not in re.sub(r"<path.*?/>", "", drawn, flags=re.DOTALL)
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawn)


@pytest.mark.parametrize(
    ("start", "years", "label"),
    [
        (2015.2, 8, "2018"),
        (2021.2, 1.5, "2022-01"),
        (2021.2, 0.3, r"2021-0\d-\d\d"),
        (2021.2, 0.002, r"2021-03-1\d \d\d:\d\d"),
    ],
)
def test_a_time_axis_shows_years_or_dates_also_where_counts_vary_much(start, years, label):
    points = [(start + years * place / 60, 1.0 if place % 2 else 20_000.0) for place in range(60)]
    labels = labels_of("events over time", points, over_time=True)
    assert any(re.fullmatch(label, one) for one in labels) and "20,000" in labels


def test_logarithmic_axes_of_a_log_show_plain_numbers():
    labels = labels_of("popularity", [(1.0, 50_000.0), (100.0, 400.0), (10_000.0, 1.0)])
    assert {"1", "100", "10,000"} <= set(labels) and not [one for one in labels if "$" in one or "e+" in one]


def test_the_page_of_a_log_has_a_curve_over_time_where_there_are_dates():
    curves = {"events a user": [(1.0, 3.0), (2.0, 1.0)]}
    dated = [(2020.0, 1.0), (2022.0, 3.0)]
    pages = [report.render_log_html("log", {"users": 4}, [], curves, over_time) for over_time in (dated, [])]
    assert ["events over time" in page for page in pages] == [True, False]


def test_the_page_is_self_contained(data):
    page = report.render_html(data)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "<script" not in page and "@import" not in page


def test_titles_are_escaped(data):
    page = report.render_html(data)
    assert "&lt;script&gt;alert(1)" in page and "Film &amp; more" in page


@pytest.mark.parametrize(
    ("row", "verdict"),
    [("popularity", "worse"), ("sasrec-id", "reference"), ("sasrec-llm2rec", "not distinguishable")],
)
def test_every_row_is_shown_with_its_verdict(data, row, verdict):
    page = report.render_html(data)
    line = page[page.index(f'<th scope="row">{row}</th>') :].split("</tr>")[0]
    words = re.sub(r"<[^>]+>", " ", line).split()
    assert re.match(rf"{row} [\d.]+ (. )?{verdict}", " ".join(words))


def test_equal_data_give_equal_bytes(data):
    assert report.render_html(data) == report.render_html(data)


def test_every_figure_says_what_it_shows(data):
    figures = re.findall(r"<svg[^>]*>", report.render_html(data))
    assert len(figures) == 4  # two bars, recall@k, one training curve
    assert all('role="img"' in figure and "aria-label=" in figure for figure in figures)
    assert sum("95 % intervals" in figure for figure in figures) == 2


def test_figures_take_their_colours_from_the_page(data):
    assert not re.findall(r"(?:fill|stroke): #[^\"]*", report.render_html(data))


@pytest.mark.parametrize("width", [80, 160])
def test_the_terminal_table_marks_what_is_within_noise(data, width):
    shown = printed(report.render_table(data.metrics), width=width)
    line = next(line for line in shown.splitlines() if "sasrec-llm2rec" in line)
    assert "not distinguishable" in line


def test_long_names_and_several_seeds_cut_no_number_at_80_columns():
    names = ["esasrec-backbone-bidirectional", "esasrec-llm2rec+concatenation"]
    metrics = protocol.summarise(
        table(**{names[0]: [BAD, GOOD], names[1]: [GOOD, BAD]}), metric_names([10]), samples=50
    )
    compared = protocol.compare_rows(table(**{name: [BAD, GOOD] for name in names}), names[0], samples=50)
    metrics |= {"reference": names[0], "comparisons": compared, "protocol": {"ranking": RANKING}}
    shown = printed(report.render_table(metrics))
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    folded = "".join(line[:19].strip() for line in shown.splitlines())  # the column of the names
    assert all(name in folded for name in names)
    for values in metrics["rows"].values():
        for name in ("ndcg@10", "recall@10"):
            assert f"{values[name]['mean']:.4f}" in shown and f"± {values[name]['std']:.4f}" in shown
        assert f"{values['ndcg@10']['low']:.4f}–{values['ndcg@10']['high']:.4f}" in shown


def test_every_table_says_what_competes_with_a_target(data, compared):
    terminal, page = printed(report.render_table(data.metrics), width=500), report.render_html(data)
    pages = [page, report.render_comparison_html(compared)]
    texts = (terminal, report.markdown_table(data.metrics), *map(unescape, pages))
    assert all(RANKING in " ".join(text.split()) for text in texts)


def test_a_slice_is_shown_in_the_terminal(full):
    metrics = full.metrics | {"slices": full.slices}
    shown = printed(report.render_slice(metrics, "target", "novel", "Novel targets"))
    assert "Novel targets: 80 test events of 80 users" in shown and "▼ worse" in shown
    assert f"{full.slices['target']['slices']['novel']['rows']['sasrec-id']['mean']:.4f}" in shown
    assert "Only 20 test users" in printed(report.render_slice(metrics, "target", "repeat", "Repeats"), width=500)
    assert report.render_slice(metrics, "target", "seen", "Nothing of the kind") is None


def test_the_headline_does_not_claim_what_is_within_noise(data):
    metrics = data.metrics | {"reference": "sasrec-llm2rec"}
    metrics["comparisons"] = {"popularity": data.metrics["comparisons"]["popularity"]}
    metrics["comparisons"]["sasrec-id"] = data.metrics["comparisons"]["sasrec-llm2rec"]
    assert "not distinguishable from the reference" in report.headline(metrics)


def test_the_markdown_table_has_a_line_a_row(data):
    lines = report.markdown_table(data.metrics).splitlines()
    assert [line for line in lines if line.startswith("| sasrec-llm2rec |")]


@pytest.fixture(scope="module")
def full(data):
    """A page with everything on it, titles of the map to be escaped."""
    per_user = table(popularity=[BAD], **{"sasrec-id": [GOOD], "sasrec-llm2rec": [GOOD]})
    kind = pl.Series(["novel"] * 80 + ["repeat"] * 20).cast(pl.Enum(["repeat", "novel"]))
    events = pl.DataFrame({"user_id": [f"u{user}" for user in range(100)], "item_id": "i", "target": kind})
    return replace(
        data,
        list_metrics={row: {"coverage@10": 0.5, "popularity_lift@10": -0.25} for row in data.metrics["rows"]},
        slices=slices.summarise_slices(per_user, events, "sasrec-id", samples=100),
        maps=[EmbeddingMap("backbone", [0.0, 1.0], [0.0, 1.0], ["<i>one", "two"], ["a", "b"], "genre", 2)],
    )


@pytest.fixture(scope="module")
def compared():
    runs = {"runs/old": table(a=[BAD], b=[GOOD]), "runs/<new>": table(a=[GOOD], b=[GOOD], c=[GOOD])}
    return report.ComparisonData(
        title="two runs",
        runs={
            run: protocol.summarise(frame, metric_names([10]), samples=50)["rows"] for run, frame in runs.items()
        },
        comparisons=protocol.compare_runs(runs, samples=300),
        settings={"runs/old": {"csft": {"steps": 1, "seed": 0}}, "runs/<new>": {"csft": {"steps": 2, "seed": 0}}},
        ranking=RANKING,
    )


def text_of(page):
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def section_of(page, heading):
    return text_of(page.split(f"<h2>{heading}</h2>")[1].split("</section>")[0])


class Layout(HTMLParser):
    """Tables that nothing lets scroll, and elements that are not closed in order."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "use", "path", "circle", "rect"})

    def __init__(self, page):
        super().__init__()
        self.open, self.stuck, self.crossed = [], 0, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        classes = (dict(attrs).get("class") or "").split()
        if tag == "table":
            self.stuck += not any("scroll" in outer for _, outer in self.open)
        if tag not in self.VOID:
            self.open.append((tag, classes))

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open.pop()[0] != tag:
            self.crossed.append(tag)


@pytest.fixture(scope="module", params=["report", "comparison"])
def page(request, full, compared):
    return report.render_html(full) if request.param == "report" else report.render_comparison_html(compared)


def test_both_pages_ask_for_nothing_from_outside(page):
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "<script" not in page and "@import" not in page and "url(http" not in page


def test_every_table_can_scroll_so_that_the_page_need_not(page):
    layout = Layout(page)
    assert layout.stuck == 0 and layout.crossed == [] and layout.open == []


def test_nothing_is_wider_than_a_phone(page):
    style = page.split("<style>")[1].split("</style>")[0]
    assert 'name="viewport" content="width=device-width' in page
    assert all(float(size) <= 320 for size in re.findall(r"(?<!max-)(?<!-)\bwidth: ([\d.]+)px", style))
    assert not re.findall(r"<svg[^>]* width=", page)
    # A column of a grid may not ask for more than the page has, nor its content push it wider.
    assert all("min(100%" in one for one in re.findall(r"minmax\(([^;]+)", style))
    assert ".grid > *, .stack > * { min-width: 0; }" in style


def test_both_pages_know_light_and_dark(page):
    assert "prefers-color-scheme: dark" in page
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", page))
    light, dark = (set(re.findall(r"--([a-z0-9-]+):", part)) for part in page.split("prefers-color-scheme")[:2])
    assert used <= light
    assert light == dark


def test_figures_of_both_pages_take_their_colours_from_the_page(page):
    assert page.count("<svg") >= 1
    assert not re.findall(r"(?:fill|stroke): #[^\"]*", page)


def test_both_pages_escape_what_they_show(page):
    assert "<new>" not in page and "<i>one" not in page


def test_a_page_without_the_new_parts_has_no_empty_sections(data):
    page = report.render_html(data)
    for heading in ("By slice", "What the lists look like", "What the vectors know"):
        assert heading not in page


def test_slices_are_shown_with_users_events_and_verdict(full):
    shown = section_of(report.render_html(full), "By slice")
    assert re.search(r"repeat ?20 users, 20 events popularity [\d.]+ \? too few users", shown)
    assert re.search(r"novel ?80 users, 80 events popularity [\d.]+ ▼ worse [\d.]+ – [\d.]+ [\d.]+", shown)


def test_list_metrics_are_shown_by_row(full):
    shown = section_of(report.render_html(full), "What the lists look like")
    assert "Coverage@10 Popularity lift@10 popularity 0.5000 -0.2500" in shown


def test_the_map_has_its_dots_and_a_legend(full):
    page = report.render_html(full)
    assert "<title>&lt;i&gt;one (genre: a)</title>" in page
    assert '<span class="key" style="background: var(--blue)"></span>a' in page


def test_a_thinned_map_says_so(full):
    assert "directions of the vectors, 2 items;" in text_of(report.render_html(full))
    thinned = replace(full.maps[0], n_items=16_859)
    assert "directions of the vectors, 2 of 16,859 items;" in text_of(
        report.render_html(replace(full, maps=[thinned]))
    )


def test_the_table_says_that_vectors_are_smoothed(data):
    protocols = [data.metrics["protocol"] | {"vectors": words} for words in (None, vectors_in_words(0.5))]
    plain, smoothed = (report.markdown_table(data.metrics | {"protocol": one}) for one in protocols)
    assert plain == report.markdown_table(data.metrics) and vectors_in_words(0) is None
    assert smoothed.endswith("Item vectors: smoothed by 0.5 over what is consumed together.\n")


def test_too_few_users_are_warned_of_everywhere(data):
    per_user = table(popularity=[BAD[:20]], **{"sasrec-id": [GOOD[:20]]})
    metrics = protocol.summarise(per_user, metric_names([10]), samples=50)
    metrics["comparisons"] = protocol.compare_rows(per_user, "sasrec-id", samples=50)
    metrics |= {"reference": "sasrec-id", "validation": {}, "protocol": {"ranking": RANKING}}
    shown = text_of(report.render_html(replace(data, metrics=metrics)))
    assert "Only 20 test users" in shown and "– – " in shown and "? too few users" in shown
    assert "too few users" in report.markdown_table(metrics) and "Only 20 test users" in report.markdown_table(
        metrics
    )
    metrics["reference"], metrics["comparisons"] = (
        "popularity",
        {"sasrec-id": metrics["comparisons"]["popularity"]},
    )
    assert "too few to compare" in report.headline(metrics)


def test_the_comparison_shows_every_run_with_its_interval(compared):
    page = report.render_comparison_html(compared)
    assert "run 2 runs/&lt;new&gt;" in text_of(page)
    value = compared.runs["runs/<new>"]["a"]["ndcg@10"]
    assert f"{value['mean']:.4f} {value['low']:.4f} – {value['high']:.4f}" in text_of(page)
    assert re.search(r"c – [\d.]+", section_of(page, "Results on the test events"))  # only run 2 has row c


def test_the_comparison_shows_paired_differences_and_verdicts(compared):
    shown = section_of(report.render_comparison_html(compared), "Paired differences in NDCG@10 against run 1")
    assert re.search(r"run 2, a \+[\d.]+ ▲ better .* run 2, b \+0.0000 ≈ not distinguishable", shown)


def test_captions_count_the_rows_that_differ(data, compared):
    assert "Holm over 1 row that differs." in text_of(report.render_comparison_html(compared))
    assert "Holm over 1 row that differs." in report.markdown_table(data.metrics)
    assert "correction for 1 row that differs:" in text_of(report.render_html(data))


def test_the_forest_plot_says_what_it_shows(compared):
    (spoken,) = re.findall(r'aria-label="(Forest plot[^"]+)"', report.render_comparison_html(compared))
    assert "run 2, a +" in spoken and "better" in spoken


def test_only_the_settings_that_differ_are_shown(compared):
    shown = section_of(report.render_comparison_html(compared), "Settings that differ")
    assert shown == "key run 1 run 2 csft.steps 1 2"


def test_a_key_that_one_recipe_lacks_differs():
    found = report.differing_settings({"one": {"a": {"b": None}}, "two": {"a": {"b": None, "c": 3}}})
    assert found == {"a.c": {"one": report.ABSENT, "two": 3}}


def test_equal_recipes_are_said_to_be_equal(compared):
    same = dict.fromkeys(compared.runs, {"seed": 1})
    assert "the recipes are equal" in report.render_comparison_html(replace(compared, settings=same))


def test_the_comparison_has_equal_bytes_for_equal_data(compared):
    assert report.render_comparison_html(compared) == report.render_comparison_html(compared)


def test_one_run_is_no_comparison(compared):
    with pytest.raises(ValueError, match="at least two runs, got 1"):
        report.render_comparison_html(replace(compared, runs={"runs/old": {}}))


def test_a_comparison_of_an_unknown_run_is_refused(compared):
    with pytest.raises(ValueError, match="'other' is not among the runs"):
        report.render_comparison_html(replace(compared, settings={"other": {}}))
