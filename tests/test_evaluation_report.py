import io
import re

import pytest
from rich.console import Console

from llm2rec.evaluation import protocol, report
from test_evaluation_protocol import BAD, GOOD, table


@pytest.fixture(scope="module")
def data():
    per_user = table(popularity=[BAD], **{"sasrec-id": [GOOD], "sasrec-llm2rec": [GOOD]})
    metrics = protocol.summarise(per_user, [5, 10], samples=100)
    metrics["comparisons"] = protocol.compare_rows(per_user, "sasrec-id", samples=300)
    metrics |= {"reference": "sasrec-id", "validation": {}, "protocol": {"test_events": 100}}
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
    assert " ".join(words).endswith(verdict)


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
    console = Console(width=width, file=io.StringIO())
    console.print(report.render_table(data.metrics))
    line = next(line for line in console.file.getvalue().splitlines() if "sasrec-llm2rec" in line)
    assert "not distinguishable" in line


def test_the_headline_does_not_claim_what_is_within_noise(data):
    metrics = data.metrics | {"reference": "sasrec-llm2rec"}
    metrics["comparisons"] = {"popularity": data.metrics["comparisons"]["popularity"]}
    metrics["comparisons"]["sasrec-id"] = data.metrics["comparisons"]["sasrec-llm2rec"]
    assert "not distinguishable from the reference" in report.headline(metrics)


def test_the_markdown_table_has_a_line_a_row(data):
    lines = report.markdown_table(data.metrics).splitlines()
    assert [line for line in lines if line.startswith("| sasrec-llm2rec |")]
