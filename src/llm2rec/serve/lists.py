"""Verb `recommend-users`: the next items of every user of a log, written as one table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import torch

from llm2rec import artifacts, progress
from llm2rec.config import DataConfig
from llm2rec.data import filters, readers
from llm2rec.data.sequences import Sequences, whole
from llm2rec.data.tables import RATING, Catalogue, check_known_items
from llm2rec.errors import ConfigError
from llm2rec.runs import Domain, Run
from llm2rec.serve import added
from llm2rec.serve.recommender import Lists, checked_request, is_new, load_scorer, opened, require_readable

USERS_AT_ONCE = 256
WRITERS = {".parquet": "write_parquet", ".csv": "write_csv"}


def recommend_users(
    run: str | Path | Run,
    out: str | Path,
    log: str | Path | None = None,
    k: int = 10,
    row: str = "sasrec-llm2rec",
    exclude_history: bool = True,
    domain: str | None = None,
    new_items: int = 0,
) -> int:
    """Writes the `k` best next items of every user: of the run's own, or of another log over the same items.

    The table has the columns user_id, place (1 is the best), item_id, title, score and new (no training event
    holds the item). All that is known of a user is the history: of the run's own users their held-out events, too.

    Args:
        run: a finished run, or its folder.
        out: the table, `.parquet` or `.csv`.
        log: a table of interactions with the columns of the run's (`data.columns`), whose users need not be known;
            what the recipe's filters say of ratings and repeats is heeded. None takes the run's own users.
        k, row, exclude_history, domain, new_items: as in `recommend`.

    Returns:
        How many users got a list.

    Raises:
        DataError: the log is not valid, or names items that the run or the row does not know.
        ConfigError: as in `recommend`; a file of another kind.
        ArtifactError: the row is not trained; the table cannot be written there.
    """
    run, out = opened(run), Path(out)
    place = run.domain(domain)
    checked_request(run, row, k, new_items)
    if out.suffix not in WRITERS:
        raise ConfigError(f"{out} is none of the tables that can be written: {', '.join(WRITERS)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    artifacts.require_writable(out.parent)
    catalogue = added.load_catalogue(place)
    sequences = Sequences.load(place.data) if log is None else _read(place, Path(log), catalogue)
    scorer = load_scorer(place, row, 0, with_added=True)
    require_readable(scorer, row, catalogue, int(np.asarray(sequences.items).max()))
    lists = Lists(scorer, is_new(place, scorer.n_items), k, new_items)
    tables = [
        _table(sequences, users, catalogue, lists, place.config.history_length, exclude_history)
        for users in _batches(sequences.n_users)
    ]
    unfinished = out.with_name(f".{out.name}.tmp")
    getattr(pl.concat(tables), WRITERS[out.suffix])(unfinished)
    unfinished.replace(out)
    return sequences.n_users


def _read(domain: Domain, path: Path, catalogue: Catalogue) -> Sequences:
    """A log of users that the run need not know, as sequences over its catalogue."""
    config: DataConfig = domain.config
    rated = config.filters.min_rating is not None
    columns = config.columns.of_interactions() if config.interactions else {}
    log = readers.read_interactions(path, columns, [RATING] if rated else [])
    check_known_items(log, catalogue, str(path))
    whatever = {"users": None, "k_core": 1, "min_events": 1, "max_events": None}  # who is there gets a list
    kept, dropped = filters.filtered(log, **(dict(config.filters) | whatever), seed=0)
    for reason, count in dropped.items():
        progress.say(f"left out of {path}: {count:,} events ({reason})")
    return whole(kept, catalogue)


def _batches(n_users: int) -> Iterator[np.ndarray]:
    starts = range(0, n_users, USERS_AT_ONCE)
    for start in progress.track(starts, "recommend", len(starts)):
        yield np.arange(start, min(start + USERS_AT_ONCE, n_users))


def _table(
    sequences: Sequences,
    users: np.ndarray,
    catalogue: Catalogue,
    lists: Lists,
    history_length: int,
    exclude_history: bool,
) -> pl.DataFrame:
    """The lists of some users, one row an item."""
    events = np.diff(np.asarray(sequences.offsets))[users]
    known = torch.from_numpy(sequences.latest(users, int(events.max())).astype(np.int64))
    seen = [torch.from_numpy(sequences.latest(users, history_length).astype(np.int64))]
    if lists.needs_times:
        seen.append(torch.from_numpy(sequences.latest_times(users, history_length)))
    items, scores = lists.of(seen, known if exclude_history else known[:, :0])
    rows, places = (items > 0).nonzero(as_tuple=True)
    index = items[rows, places]
    user_ids = sequences.user_ids.cast(pl.String).gather(users)
    return pl.DataFrame(
        {
            "user_id": user_ids.gather(rows.numpy()),
            "place": (places + 1).numpy(),
            "item_id": pl.Series(catalogue.item_ids).gather((index - 1).numpy()),
            "title": pl.Series(catalogue.titles).gather((index - 1).numpy()),
            "score": scores[rows, places].numpy(),
            "new": lists.new[index - 1].numpy(),
        }
    )
