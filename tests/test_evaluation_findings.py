"""What a probing found, in the terminal and on its page."""

import re

import numpy as np
import pytest

from conftest import printed
from llm2rec.evaluation.diagnosis import Probed, data_probes, diagnose
from llm2rec.evaluation.findings import MEANINGS, meaning, render_findings_html, show_findings
from llm2rec.evaluation.probes import vector_probes
from test_evaluation_report import Layout, section_of, text_of

SETS = ("backbone", "backbone-causal", "csft", "csft-causal", "mntp", "llm2rec")
N_ITEMS = 30


def content_of(probed):
    return {**probed.__dict__, "diagnosis": diagnose(probed)}


def compared(verdict, difference):
    return {
        "difference": difference,
        "low": difference - 0.01,
        "high": difference + 0.01,
        "p_holm": 0.02,
        "p_sign_flip_holm": 0.03,
        "verdict": verdict,
    }


@pytest.fixture(scope="module")
def content():
    vectors = np.random.default_rng(0).normal(size=(N_ITEMS, 4))
    pairs = np.arange(1, N_ITEMS + 1).reshape(-1, 2)
    readings, *_ = vector_probes(vectors, pairs, np.ones(N_ITEMS), list("ab" * 15))
    readings["effective_rank"] |= {"value": 1234.5678}
    data = data_probes(np.ones(N_ITEMS, dtype=int), [f"t{item}" for item in range(N_ITEMS)], np.array([1]))
    models = {"backbone": {"future_sensitivity": 0.0, "true": 123456.789, "random": 234567.891}}
    order = {
        "row": "sasrec-<id>",
        "ndcg@10": {"as it was": {"mean": 0.31}, "shuffled": {"mean": 0.25}, "reversed": {"mean": 0.3}},
        "comparisons": {"shuffled": compared("worse", -0.06), "reversed": compared("not distinguishable", -0.01)},
        "users": 400,
    }
    left_out = {"perplexity": "fewer than two <titles>"}
    return content_of(Probed({"data": data} | dict.fromkeys(SETS, readings), models, order, left_out))


@pytest.fixture(scope="module")
def floors():
    """Of a run without vectors, language models and trained rows."""
    data = data_probes(np.ones(3, dtype=int), ["a", "b", "c"], np.array([1]))
    return content_of(Probed({"data": data}, left_out={"order": "no row of this run is trained"}))


def test_everything_fits_into_80_columns(content):
    said = printed(*show_findings(content))
    heads = next(line for line in said.splitlines() if line.startswith("vectors"))
    assert heads.split() == ["vectors", "backbone", "causal", "csft", "causal", "mntp", "llm2rec", "chance"]
    assert said.count("1234.568") == len(SETS) and "123456.789" in said and "…" not in said
    assert max(map(len, said.splitlines())) <= 80


def test_every_number_is_explained_in_one_line(content):
    said = printed(*show_findings(content))
    lines = said.splitlines()
    assert "co consumption auc: next item nearer than a random one; 0 to 1, higher is better" in lines
    vectors = content["vectors"]
    for name in (*vectors["data"], *vectors["llm2rec"], "future_sensitivity", "true", "random", "order"):
        (line,) = [line for line in lines if line.startswith(f"{name.replace('_', ' ')}: ")]
        assert MEANINGS[name] in line  # not wrapped


def test_a_meaning_says_range_and_direction(content):
    readings = content["vectors"]["llm2rec"] | content["vectors"]["data"]
    assert meaning("uniformity", readings["uniformity"]).endswith("; -8 to 0, lower is better")
    assert meaning("pair_separation", readings["pair_separation"]).endswith("; any number, higher is better")
    assert meaning("events_per_item", readings["events_per_item"]).endswith("; 0 or more, higher is better")
    assert meaning("cold_test_share", readings["cold_test_share"]).endswith("; 0 to 1")


def test_the_order_is_shown_with_interval_and_verdict(content):
    said = " ".join(printed(*show_findings(content)).split())
    assert "shuffled 0.2500 -0.0600 -0.0700 to -0.0500 ▼ worse" in said
    shown = section_of(render_findings_html("toy", content), "Order of the history: sasrec-&lt;id&gt;")
    assert (
        "as it was 0.3100 reference" in shown
        and "shuffled 0.2500 ▼ worse -0.0600 -0.0700 to -0.0500 0.030" in shown
    )


def test_what_was_left_out_and_not_looked_for_is_said_with_its_reason(floors):
    said = printed(*show_findings(floors), width=300)
    page = text_of(render_findings_html("toy", floors))
    assert "left out: order (no row of this run is trained)" in said
    assert "diagnosis: looked for and not found: items that share their text, cold items" in said
    assert "diagnosis: not looked for (no vectors of the trained encoder): a contrastive collapse" in said
    assert "Looked for and not found: items that share their text, cold items." in page
    assert "Not looked for (no vectors of the trained encoder): a contrastive collapse." in page
    assert "order: no row of this run is trained" in page


def test_a_failure_stands_on_top_of_the_page(content):
    page = render_findings_html(
        "toy", content | {"diagnosis": content["diagnosis"] | {"found": ["<Cold> items."]}}
    )
    assert section_of(page, "Diagnosis").startswith("&lt;Cold&gt; items.")


def test_the_page_shows_number_and_meaning_by_row(content):
    shown = section_of(render_findings_html("toy", content), "Item vectors")
    assert re.search(r"co consumption auc ([\d.]+ ± [\d.]+ ){6}0.5 ", shown)
    assert "co consumption auc: next item nearer than a random one; 0 to 1, higher is better" in shown


def test_a_page_of_little_has_no_empty_sections(floors):
    page = render_findings_html("toy", floors)
    assert re.findall("<h2>(.*?)</h2>", page) == ["Diagnosis", "Data", "Left out"]


def test_the_page_asks_for_nothing_from_outside_escapes_and_lets_tables_scroll(content):
    page = render_findings_html("a <b>", content)
    layout = Layout(page)
    assert layout.stuck == 0 and layout.crossed == [] and layout.open == []
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page) and "<script" not in page
    assert "<id>" not in page and "<titles>" not in page and "a &lt;b&gt;" in page
    assert page == render_findings_html("a <b>", content)
