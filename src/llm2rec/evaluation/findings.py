"""What `probing.probe` found, for the terminal and as a page: numbers, what each one is, the diagnosis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from llm2rec.evaluation.diagnosis import DATA
from llm2rec.evaluation.probes import NEITHER
from llm2rec.evaluation.report import environment, plain, terminal_table
from llm2rec.evaluation.verdicts import MARKS

PROBES = "probes.html"
MEANINGS = {
    "events_per_item": "training events of an item",
    "distinct_text_share": "items whose text no other has",
    "cold_test_share": "test events of an item never trained on",
    "co_consumption_auc": "next item nearer than a random one",
    "co_consumption_gain": "that above the untrained model's",
    "pair_separation": "how much nearer next items lie",
    "alignment": "squared distance to the next item",
    "uniformity": "spread over directions, 0 = all one way",
    "mean_cosine": "of two items, 1 = all one way",
    "effective_rank": "directions really used",
    "first_direction_share": "variance in one direction",
    "same_category_share": "nearest 10 of the same category",
    "future_sensitivity": "0 = causal, sees the past only; above 0 = sees all",
    "true": "perplexity of the true next title: 1 or more, lower is better",
    "random": "that of another user's: the higher above the true one, the better",
    "order": "NDCG@10, 0 to 1, of the row best on validation; should fall if changed",
}
LANGUAGE_PROBES = ("future_sensitivity", "true", "random")

Content = Mapping[str, Any]


def render_findings_html(title: str, content: Content) -> str:
    """The result of `probing.probe` on one page of the kind of `report.render_html`; equal bytes for equal data.

    Args:
        title: heading of the page.
        content: of `probes.json`.
    """
    made = environment()
    made.filters.update(spaced=_spaced)
    return made.get_template(PROBES).render(
        data={"title": title},
        content=content,
        sets=_vector_sets(content),
        examples=_examples(content),
        meaning=meaning,
        meanings=MEANINGS,
        language_probes=LANGUAGE_PROBES,
        missing=_by_reason(content["diagnosis"]["not_looked_for"]),
    )


def show_findings(content: Content) -> list[RenderableType]:
    """The result of `probing.probe` for a terminal of 80 columns."""
    parts: list[RenderableType] = [_data_table(content), *_meanings(content["vectors"][DATA])]
    if _vector_sets(content):
        parts += [_vector_table(content), *_meanings(_examples(content))]
    if content["language_model"]:
        parts += [_model_table(content), *_lines({name: MEANINGS[name] for name in LANGUAGE_PROBES})]
    if content["order"]:
        parts += [_order_table(content["order"]), *_lines({"order": MEANINGS["order"]})]
    parts += [f"left out: {_spaced(name)} ({reason})" for name, reason in content["left_out"].items()]
    return parts + [f"diagnosis: {sentence}" for sentence in diagnosis_in_words(content["diagnosis"])]


def diagnosis_in_words(diagnosis: Mapping[str, Any]) -> list[str]:
    """What a `Diagnosis` says, a line each: the failures that show, those that do not, those not looked for."""
    said = list(diagnosis["found"])
    if diagnosis["not_found"]:
        said.append(f"looked for and not found: {', '.join(diagnosis['not_found'])}")
    missing = _by_reason(diagnosis["not_looked_for"])
    return said + [f"not looked for ({reason}): {', '.join(failures)}" for reason, failures in missing.items()]


def meaning(name: str, probe: Mapping[str, Any]) -> str:
    """What a probe is, where it lies, which way is better: `directions really used; 1 to 8, higher is better`."""
    low, high = probe["lowest"], probe["highest"]
    if high is None:
        lies = "any number" if low is None else f"{plain(low)} or more"
    else:
        lies = f"up to {plain(high)}" if low is None else f"{plain(low)} to {plain(high)}"
    better = "" if probe["better"] == NEITHER else f", {probe['better']} is better"
    return f"{MEANINGS[name]}; {lies}{better}"


def _vector_sets(content: Content) -> dict[str, Mapping[str, Any]]:
    return {name: readings for name, readings in content["vectors"].items() if name != DATA}


def _examples(content: Content) -> dict[str, Mapping[str, Any]]:
    """Probe -> one reading of it: range, direction and level of chance are the same for every set, or nearly."""
    return {name: one for readings in _vector_sets(content).values() for name, one in readings.items()}


def _by_reason(not_looked_for: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for failure, reason in not_looked_for.items():
        reasons.setdefault(reason, []).append(failure)
    return reasons


def _lines(meanings: Mapping[str, str]) -> Iterable[str]:
    return (f"{_spaced(name)}: {words}" for name, words in meanings.items())


def _meanings(examples: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    return _lines({name: meaning(name, one) for name, one in examples.items()})


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _data_table(content: Content) -> Table:
    table = terminal_table(DATA, "value", numbers=["value"])
    for name, one in content["vectors"][DATA].items():
        table.add_row(_spaced(name), plain(one["value"]))
    return table


def _vector_table(content: Content) -> Table:
    sets = _vector_sets(content)
    heads = [*(name.replace("-", "\n") for name in sets), "chance"]
    table = terminal_table("vectors", *heads, numbers=heads)
    for name, example in _examples(content).items():
        values = [f"{one[name]['value']:.3f}" if name in one else "" for one in sets.values()]
        chance = example["chance"]
        table.add_row(_spaced(name), *values, "" if chance is None else f"{chance:.3f}")
    return table


def _model_table(content: Content) -> Table:
    heads = ["future\nsensitivity", "perplexity of the\ntrue next title", "of a\nrandom one"]
    table = terminal_table("language model", *heads, numbers=heads)
    for name, one in content["language_model"].items():
        table.add_row(name, *(f"{one[key]:.3f}" if key in one else "" for key in LANGUAGE_PROBES))
    return table


def _order_table(order: Mapping[str, Any]) -> Table:
    numbers = ("NDCG@10", "change", "95 % interval")
    title = f"order of the history, {order['row']}"
    table = terminal_table("history", *numbers, "verdict", numbers=numbers, title=title)
    for name, value in order["ndcg@10"].items():
        result = order["comparisons"].get(name)
        tested = ["", "", ""]
        if result is not None:
            interval = f"{result['low']:+.4f} to {result['high']:+.4f}"
            tested = [f"{result['difference']:+.4f}", interval, f"{MARKS[result['verdict']]} {result['verdict']}"]
        table.add_row(name, f"{value['mean']:.4f}", *tested)
    return table
