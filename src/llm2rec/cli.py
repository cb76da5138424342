"""The command line: parse, call the public function of the same name, print. No logic."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import llm2rec as lr
from llm2rec import processes
from llm2rec.errors import Llm2RecError

INTERRUPTED = 130
# What the writers say of a full disk: the system and Rust's libraries, numpy, and torch (twice).
FULL_DISK = re.compile(r"No space left|\d+ requested and \d+ written|unexpected pos \d+ vs \d+|file write failed")
app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Language models as item encoders for sequential recommendation (LLM2Rec, KDD 2025).",
)
data_app = typer.Typer(no_args_is_help=True, help="Named public data sets, and a look into any log.")
models_app = typer.Typer(no_args_is_help=True, help="Named language models and text encoders.")
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
out = Console(markup=False, highlight=False)  # a title may hold square brackets

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, or a folder with a recipe.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one key; repeatable")
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="rerun every stage, each time it is given; old results are moved aside")
]
Count = Annotated[int, typer.Option("-k", "--k", help="how many")]
RowName = Annotated[
    str | None, typer.Option("--row", help="which recommender of the run; by default that over its latest vectors")
]
VectorsName = Annotated[
    str | None, typer.Option("--vectors", help="which vector set of the run; by default its latest")
]
NewItems = Annotated[
    int | None, typer.Option("--new-items", help="exactly so many of the list are items without training events")
]
WithHistory = Annotated[bool, typer.Option("--with-history", help="items of the history may be listed again")]
DomainName = Annotated[str | None, typer.Option("--domain", help="which log, of a run with several")]


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"llm2rec {lr.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out_folder: Annotated[Path, typer.Option("--out", help="the run folder")] = Path("runs/demo"),
    overrides: Overrides = None,
    fresh: Fresh = False,
) -> None:
    """Run the main job on MovieLens 100K and SmolLM2-135M, and show what came out."""
    _show_run(lr.demo(out_folder, tuple(overrides or ()), fresh))


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe name, or a path")],
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="the run folder; by default runs/RECIPE")
    ] = None,
    overrides: Overrides = None,
    fresh: Fresh = False,
) -> None:
    """Run every stage of a recipe; unchanged stages are kept, interrupted ones go on."""
    _show_run(lr.run(recipe, out_folder, tuple(overrides or ()), fresh))


@app.command()
def prepare(run_folder: RunFolder) -> None:
    """Stage 1: tables, split, sequences, leakage check."""
    lr.prepare(run_folder)


@app.command()
def csft(run_folder: RunFolder) -> None:
    """Stage 2: the language model learns to write the next title."""
    lr.csft(run_folder)


@app.command()
def iem(run_folder: RunFolder) -> None:
    """Stage 3: the language model becomes an item encoder (MNTP, contrastive)."""
    lr.iem(run_folder)


@app.command()
def encode(run_folder: RunFolder) -> None:
    """Stage 4: item vectors."""
    lr.encode(run_folder)


@app.command()
def fit(run_folder: RunFolder) -> None:
    """Stage 5: the sequential recommenders."""
    lr.fit(run_folder)


@app.command()
def evaluate(run_folder: RunFolder) -> None:
    """Stage 6: full ranking of the test events, statistics, report."""
    _show_run(lr.evaluate(run_folder))


@app.command()
def recommend(
    run_folder: RunFolder,
    history: Annotated[
        list[str],
        typer.Option(help="item ids, oldest first, separated by commas; given several times: one id each"),
    ],
    k: Count = 10,
    row: RowName = None,
    new_items: NewItems = None,
    with_history: WithHistory = False,
    domain: DomainName = None,
) -> None:
    """The next items for any history of catalogue items, also of a user never seen."""
    ids = history if len(history) > 1 else [part.strip() for part in history[0].split(",") if part.strip()]
    items = lr.recommend(run_folder, ids, k, row, not with_history, domain, new_items)
    _show_items(items, "score")


@app.command("recommend-users")
def recommend_users(
    run_folder: RunFolder,
    out_table: Annotated[Path, typer.Argument(metavar="OUT", help="the lists: a .parquet or .csv file")],
    log: Annotated[Path | None, typer.Option(help="interactions of users that need not be known")] = None,
    k: Count = 10,
    row: RowName = None,
    new_items: NewItems = None,
    with_history: WithHistory = False,
    domain: DomainName = None,
) -> None:
    """The next items of every user of the run, or of another log over the same items, as a table."""
    users = lr.recommend_users(run_folder, out_table, log, k, row, not with_history, domain, new_items)
    out.print(f"{users:,} users: {out_table}", soft_wrap=True)


@app.command()
def probe(run_folder: RunFolder, domain: DomainName = None) -> None:
    """What the vectors and language models of an evaluated run know, with a diagnosis of known failures."""
    from llm2rec.evaluation.findings import show_findings

    found = lr.probe(run_folder, domain)
    for part in show_findings(found):
        out.print(part)
    out.print(f"page: {found['page']}", soft_wrap=True)


@app.command("add-items")
def add_items(
    run_folder: RunFolder,
    items: Annotated[Path, typer.Argument(help="table of new items, with the columns of the run's items")],
    domain: DomainName = None,
) -> None:
    """Give items that came after the training vectors, so that text rows can recommend them."""
    out.print(lr.add_items(run_folder, items, domain).in_words)


@app.command()
def similar(
    run_folder: RunFolder,
    item: Annotated[str, typer.Argument(help="an item id")],
    k: Count = 10,
    vectors: VectorsName = None,
    domain: DomainName = None,
) -> None:
    """The items nearest to an item by cosine of the run's vectors."""
    _show_items(lr.similar(run_folder, item, k, vectors, domain), "cosine")


@app.command()
def serve(
    run_folder: RunFolder,
    row: RowName = None,
    vectors: VectorsName = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 answers other machines too")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    domain: DomainName = None,
) -> None:
    """Answer over HTTP (recommend, similar, a search of titles), with a page to try it, until interrupted."""
    from llm2rec.serve.service import serve as answer

    answer(run_folder, row, vectors, domain, host, port)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...")],
    domain: DomainName = None,
    page: Annotated[Path | None, typer.Option("--html", help="write the comparison as a page as well")] = None,
    against: Annotated[
        str | None, typer.Option(help="test every row against this row of the first run; one run will do")
    ] = None,
) -> None:
    """The rows of several runs on the same test events, with paired tests against the first run."""
    from llm2rec.comparison import comparison_table

    out.print(comparison_table(lr.compare(runs, domain, page, against)))


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="ablation, budget, cold-start, context, transfer or csft-direct")],
    small: Annotated[bool, typer.Option("--small", help="on a made log, with a random decoder")] = False,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="the study's folder; by default runs/studies/NAME")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="whose data, model and budgets: a file or a shipped name")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Run a grid of recipes that share stages, and compare what they find."""
    from llm2rec.studies import show_study

    for part in show_study(lr.study(name, out_folder, small, tuple(overrides or ()), recipe)):
        out.print(part)


@data_app.command("list")
def data_list() -> None:
    """The data sets known by name."""
    _show_sources(lr.data.list())


@data_app.command("fetch")
def data_fetch(name: Annotated[str, typer.Argument(help="a name from `data list`")]) -> None:
    """Download a named data set into the cache and check its content."""
    interactions, catalogue = lr.data.fetch(name)
    out.print(f"{name}: {len(interactions):,} interactions, {len(catalogue):,} items")


@data_app.command("describe")
def data_describe(
    what: Annotated[str, typer.Argument(help="a source, a recipe, a folder, or an interactions file")],
    items: Annotated[Path | None, typer.Argument(help="the items file, with an interactions file")] = None,
    model: Annotated[str | None, typer.Option(help="count the tokens that this language model makes")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="write a page with plots as well")] = None,
    overrides: Overrides = None,
) -> None:
    """Counts, density, lengths, popularity, repeats, ties, split, leakage check."""
    from llm2rec.display import show_log

    count_tokens = lr.models.token_counter(model) if model else None
    described = lr.data.describe(what, items, count_tokens, tuple(overrides or ()))
    for part in show_log(what, described, page):
        out.print(part)


@models_app.command("list")
def models_list() -> None:
    """The language models and text encoders known by name."""
    _show_sources(lr.models.list())


@models_app.command("fetch")
def models_fetch(name: Annotated[str, typer.Argument(help="a name from `models list`")]) -> None:
    """Download a named language model into the cache and check its content."""
    out.print(str(lr.models.fetch(name)), soft_wrap=True)


def _show_run(run: lr.Run) -> None:
    from llm2rec.display import show

    if not processes.is_main():
        return
    for part in show(run):
        out.print(part)


def _show_items(items: list[lr.ScoredItem], score: str) -> None:
    from llm2rec.display import show_items

    out.print(show_items(items, score))


def _show_sources(sources: list[Any]) -> None:
    table = Table("name", "what")
    table.columns[0].no_wrap = True
    for source in sources:
        size = f"{source.size_bytes / 1e6:,.0f} MB, " if source.size_bytes else ""
        what = f"{source.description}\n{size}licence: {source.licence}\n{source.citation}"
        table.add_row(source.name, what, end_section=True)
    out.print(table)


def main() -> None:
    """Entry point: errors a user can cause end in one message and exit status 1, not in a traceback."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries; ours are rich's
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr is: not every encoding has ≈ and all titles
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except Llm2RecError as error:
        _fail(str(error))
    except SystemExit as stop:  # typer turns an interrupt into this exit status and says nothing
        if stop.code == INTERRUPTED:
            _fail(f"interrupted; {_how_to_go_on()}", INTERRUPTED)
        raise
    except Exception as error:
        if _is_of_a_full_disk(error):
            _fail(f"the disk is full ({error}); free some space, {_how_to_go_on()}")
        if isinstance(error, OSError) and error.filename:
            _fail(f"{error.filename}: {error.strerror}; choose another folder or file")
        raise


def _how_to_go_on() -> str:
    """What to give next; `--fresh` once more would begin anew."""
    same = "the same command without --fresh" if "--fresh" in sys.argv else "the same command"
    return f"{same} goes on where it stopped"


def _is_of_a_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a file could not be written whole."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or FULL_DISK.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(message: str, status: int = 1) -> None:
    Console(stderr=True).print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
