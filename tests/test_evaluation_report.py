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


def test_every_row_and_its_verdict_is_shown(data):
    page = report.render_html(data)
    assert all(row in page for row in data.metrics["rows"])
    assert "not distinguishable" in page and "worse" in page


def test_equal_data_give_equal_bytes(data):
    assert report.render_html(data) == report.render_html(data)


def test_figures_have_error_bars_and_a_description(data):
    assert "<svg" in report.render_html(data) and "aria-label" in report.render_html(data)


def test_the_terminal_table_marks_what_is_within_noise(data):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(report.render_table(data.metrics))
    line = next(line for line in console.export_text().splitlines() if "sasrec-llm2rec" in line)
    assert "not distinguishable" in line


def test_the_markdown_table_has_a_line_a_row(data):
    lines = report.markdown_table(data.metrics).splitlines()
    assert [line for line in lines if line.startswith("| sasrec-llm2rec |")]
