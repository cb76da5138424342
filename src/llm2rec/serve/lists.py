"""Verb `recommend-users`: the next items of every user of a log, written as one table."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import torch

from llm2rec import artifacts, progress
from llm2rec.config import DataConfig
from llm2rec.data import filters, readers
from llm2rec.data.sequences import Sequences, whole
from llm2rec.data.tables import ITEM, RATING, TITLE, USER, Catalogue, Interactions
from llm2rec.data.texts import clean
from llm2rec.errors import ArtifactError, ConfigError, DataError, first_few
from llm2rec.runs import Domain, Run
from llm2rec.serve.recommender import Lists, ServedRow, load_row, opened

USERS_AT_ONCE = 256
ROWS_AT_ONCE = 2**18  # held before they are written, 40 MB
COLUMNS = ("user_id", "place", "item_id", "title", "score", "new")
WRITERS = {".parquet": "sink_parquet", ".csv": "sink_csv"}


def recommend_users(
    run: str | Path | Run,
    out: str | Path,
    log: str | Path | None = None,
    k: int = 10,
    row: str | None = None,
    exclude_history: bool = True,
    domain: str | None = None,
    new_items: int | None = None,
) -> int:
    """Writes the `k` best next items of every user: of the run's own, or of another log over the same items.

    The table has the columns user_id, place (1 is the best), item_id, title, score and new (no training event
    holds the item). All that is known of a user is the history: of the run's own users their held-out events, too.
    The items of it are hidden, and of a `log` those that the filters leave out of the history as well: what was
    rated low is not listed. The run keeps no such events of its own users, whose lists may hold the items of them.

    Lists are written as they are made, beside the table, which takes its place once it is whole.

    Args:
        run: a finished run, or its folder.
        out: the table, `.parquet` or `.csv`.
        log: a table of interactions with the columns of the run's (`data.columns`), whose users need not be known;
            what the recipe's filters say of ratings and repeats is heeded, and events of items that the run does
            not know are left out and counted, as are users who then have none. None takes the run's own users,
            whom the filters left.
        k, row, exclude_history, domain, new_items: as in `recommend`.

    Returns:
        How many users got a list.

    Raises:
        DataError: the log is not valid, none of its items is known, or one was added and the row cannot know it.
        ConfigError: as in `recommend`; a file of another kind, in the run's folder, or that holds something else.
        ArtifactError: the row is not trained; the table cannot be written there.
    """
    run, out = opened(run), Path(out)
    served = load_row(run, row, domain)
    lists = served.lists(k, new_items)
    _check_out(out, run)
    place = served.domain
    if log is None:
        histories = consumed = Sequences.load(place.data)
    else:
        histories, consumed = _read(place, Path(log), served.catalogue)
    served.require_readable(int(np.asarray(histories.items).max()))
    hidden = consumed if exclude_history else None
    titles = [clean(title) for title in served.catalogue.titles]
    items = served.catalogue.frame.select(ITEM, pl.Series(TITLE, titles))
    tables = (_table(histories, hidden, users, served, lists, items) for users in _batches(histories.n_users))
    return _write(tables, out)


def _check_out(out: Path, run: Run) -> None:
    """Refuses what a table must not be written over, before anything is computed.

    Raises:
        ConfigError: a file of another kind, something that is not such a table, or a place within the run.
        ArtifactError: no file can be written there.
    """
    if out.suffix not in WRITERS:
        raise ConfigError(f"{out} is none of the tables that can be written: {', '.join(WRITERS)}")
    if run.folder.resolve() in out.resolve().parents:
        raise ConfigError(
            f"{out} lies in the run's folder, where every file is part of a result; choose another place"
        )
    if out.exists() and not (out.is_file() and _columns(out) == list(COLUMNS)):
        raise ConfigError(f"{out} exists and holds no lists; choose another name, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    artifacts.require_writable(out.parent)


def _columns(table: Path) -> list[str]:
    try:
        scan = pl.scan_parquet if table.suffix == ".parquet" else pl.scan_csv
        return scan(table, glob=False).collect_schema().names()
    except (pl.exceptions.PolarsError, OSError):
        return []


def _write(tables: Iterable[pl.DataFrame], out: Path) -> int:
    """Writes tables as one, all at once: a reader sees the old one or the whole new one.

    Args:
        tables: of different users each.

    Returns:
        How many users there are.
    """
    users = 0
    parts: list[Path] = []
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        for table in _gathered(tables):
            users += table["user_id"].n_unique()
            parts.append(Path(folder) / f"{len(parts)}.parquet")
            with _failure_named(out):
                table.write_parquet(parts[-1])
        unfinished = Path(folder) / out.name
        with _failure_named(out):
            getattr(pl.scan_parquet(parts, glob=False), WRITERS[out.suffix])(unfinished)
            os.replace(unfinished, out)
    return users


def _gathered(tables: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The tables, as many as one as have ROWS_AT_ONCE rows."""
    waiting: list[pl.DataFrame] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= ROWS_AT_ONCE:
            yield pl.concat(waiting)
            waiting = []
    if waiting:
        yield pl.concat(waiting)


@contextmanager
def _failure_named(out: Path) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ArtifactError(f"cannot write {out} ({error}); free some space or choose another place") from error


def _read(domain: Domain, path: Path, catalogue: Catalogue) -> tuple[Sequences, Sequences]:
    """A log of users that the run need not know, over its catalogue: their histories, and all that they consumed.

    The recipe's filters hold for the histories alone; both are of the same users, who have a history.
    """
    config: DataConfig = domain.config
    rated = config.filters.min_rating is not None
    columns = config.columns.of_interactions() if config.interactions else {}
    log = readers.read_interactions(path, columns, [RATING] if rated else [], at_least=1)
    everybody = {"users": None, "k_core": 1, "min_events": 1, "max_events": None, "seed": 0, "at_least": 0}
    kept, dropped = filters.filtered(log, **(dict(config.filters) | everybody))
    known = _is_known(kept, catalogue)
    if not known.all():
        dropped["of items that the run does not know; `add-items` makes them known"] = int((~known).sum())
        kept = kept.kept(known)
    for reason, count in dropped.items():
        progress.say(f"left out of {path}: {count:,} events ({reason})")
    if not len(kept):
        raise DataError(f"{path}: no event is left to recommend from; see what was left out above")
    with_history = kept.counts(USER) > 0
    if gone := log.ids(USER).gather(np.flatnonzero((log.counts(USER) > 0) & ~with_history)).to_list():
        progress.say(f"users who have no event left and get no list: {len(gone):,} ({first_few(gone)})")
    consumed = log.kept(with_history[log.codes(USER)] & _is_known(log, catalogue))
    return whole(kept, catalogue), whole(consumed, catalogue)


def _is_known(log: Interactions, catalogue: Catalogue) -> np.ndarray:
    """(E,) bool: events of items in the catalogue."""
    known = log.ids(ITEM).is_in(pl.Series(catalogue.item_ids).implode()).to_numpy()
    return np.asarray(known[log.codes(ITEM)])


def _batches(n_users: int) -> Iterator[np.ndarray]:
    starts = range(0, n_users, USERS_AT_ONCE)
    for start in progress.track(starts, "recommend", len(starts)):
        yield np.arange(start, min(start + USERS_AT_ONCE, n_users))


def _everything(sequences: Sequences, users: np.ndarray) -> torch.Tensor:
    """(B, L) int64: all events of some users, padded with 0."""
    offsets = np.asarray(sequences.offsets)
    longest = int((offsets[users + 1] - offsets[users]).max())
    return torch.from_numpy(sequences.latest(users, longest).astype(np.int64))


def _table(
    histories: Sequences,
    hidden: Sequences | None,
    users: np.ndarray,
    served: ServedRow,
    lists: Lists,
    items: pl.DataFrame,
) -> pl.DataFrame:
    """The lists of some users, one row an item, without what `hidden` has of the same users.

    Args:
        items: item_id and the title to show, (N, 2).
    """
    seen = [torch.from_numpy(histories.latest(users, served.window).astype(np.int64))]
    if lists.needs_times:
        seen.append(torch.from_numpy(histories.latest_times(users, served.window)))
    unwanted = seen[0][:, :0] if hidden is None else _everything(hidden, users)
    # What the row cannot know it does not list either.
    best, scores = lists.of(seen, unwanted.masked_fill(unwanted > served.scorer.n_items, 0))
    rows, places = (best > 0).nonzero(as_tuple=True)
    index = best[rows, places] - 1
    chosen = items[index.numpy()]
    columns = (
        histories.user_ids.gather(users[rows.numpy()]).cast(pl.String),
        (places + 1).numpy(),
        chosen[ITEM],
        chosen[TITLE],
        scores[rows, places].numpy(),
        lists.new[index].numpy(),
    )
    return pl.DataFrame(dict(zip(COLUMNS, columns, strict=True)))
