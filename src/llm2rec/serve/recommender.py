"""Recommendations for any history of catalogue items. Imports no transformers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from llm2rec import artifacts, progress
from llm2rec.data.embeddings import ItemEmbeddings
from llm2rec.data.sequences import Sequences
from llm2rec.data.tables import ITEM, TITLE, Catalogue
from llm2rec.data.texts import clean
from llm2rec.errors import ArtifactError, ConfigError, DataError, first_few
from llm2rec.evaluation.protocol import Scorer
from llm2rec.evaluation.ranking import top_k
from llm2rec.rec import baselines, model
from llm2rec.rec.average import AVERAGE, ScoreAverage
from llm2rec.rows import FLOORS, Row, preferred_row
from llm2rec.runs import Domain, Run, open_run, require_row
from llm2rec.serve import added


@dataclass(frozen=True)
class ScoredItem:
    """One line of a list: the outside id, the title, the score (a logit, or a cosine).

    new: no training event holds the item, so that a recommender knows it by its text alone.
    """

    item_id: str
    title: str
    score: float
    new: bool


def recommend(
    run: str | Path | Run,
    history: Iterable[str],
    k: int = 10,
    row: str | None = None,
    exclude_history: bool = True,
    domain: str | None = None,
    new_items: int | None = None,
) -> list[ScoredItem]:
    """The `k` best next items after any history of catalogue items, best first; no user need be known.

    By default items of the history are hidden, while `evaluate` lets them compete unless the recipe sets
    `evaluation.mask_history`: where people come back to items, lists differ from what was measured.

    An item that no training saw seldom comes among the best of many, for those that were trained on are known much
    better; where there are few items, or little was trained, it may lead every list. Among the new ones it is
    ranked well. `new_items` says how many of a list they are.

    Args:
        run: a finished run, or its folder.
        history: item ids, oldest first; only the last `history_length` are looked at.
        row: which recommender of the run (its seed 0). None: `preferred_row`, sasrec-llm2rec where it is one; any
            other is named in a note.
        exclude_history: hide the items of the history.
        domain: which log of the run, where it has several.
        new_items: exactly so many of the list have no training event, where there are so many: those added since
            and those held out. None leaves it to the scores.

    Raises:
        DataError: an item of the history is not in the catalogue.
        ConfigError: no such row, an empty history, k < 1, or `new_items` outside 0..k, or above 0 of a row without
            text.
        ArtifactError: the row is not trained.
    """
    return load_row(run, row, domain).recommend(history, k, exclude_history, new_items)


def load_row(run: str | Path | Run, row: str | None = None, domain: str | None = None) -> ServedRow:
    """A row of a run, loaded once for any number of lists: what a service holds. Arguments as in `recommend`.

    Items added to the run later are known to it once it is loaded again.

    Raises:
        ConfigError: no such row.
        ArtifactError: the row is not trained.
    """
    run = opened(run)
    if row is None:
        row = preferred_row(run.recipe.recommender.rows)
        say_choice("row", row, "sasrec-llm2rec")
    require_row(run, row)
    place = run.domain(domain)
    catalogue = added.load_catalogue(place, with_vectors=_reads_text(row))
    index = {item_id: number for number, item_id in enumerate(catalogue.item_ids, start=1)}
    scorer = load_scorer(place, row, 0, with_added=True)
    return ServedRow(place, row, scorer, catalogue, index, is_new(place, scorer.n_items))


def _reads_text(row: str) -> bool:
    return row not in FLOORS and Row.parse(row).vectors is not None


@dataclass(frozen=True)
class ServedRow:
    """A recommender of a run in memory, with the items that it lists; made by `load_row`.

    catalogue: the items trained on, then those added since. index: outside id -> item_index (1..N).
    new: bool for each item that the scorer scores, as `is_new` says.
    """

    domain: Domain
    row: str
    scorer: Scorer
    catalogue: Catalogue
    index: dict[str, int]
    new: torch.Tensor
    _said: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def recommend(
        self,
        history: Iterable[str],
        k: int = 10,
        exclude_history: bool = True,
        new_items: int | None = None,
    ) -> list[ScoredItem]:
        """The `k` best next items after a history, best first; arguments and errors as in `recommend`."""
        lists = self.lists(k, new_items)
        if isinstance(history, str):
            raise ConfigError(f"history is the text {history!r}; give a list of item ids")
        history = [str(item_id) for item_id in history]
        if not history:
            raise ConfigError("the history is empty; give at least one item id")
        indices = [self.index.get(item_id) or index_of(self.catalogue, item_id) for item_id in history]
        self.require_readable(max(indices))
        if lists.needs_times:
            raise ConfigError(
                f"row {self.row!r} looks at the times of events, which a list of items does not give"
            )
        seen = torch.tensor([indices])
        items, scores = lists.of([seen[:, -self.window :]], seen if exclude_history else seen[:, :0])
        return listed(self.catalogue, items[0], scores[0], lists.new)

    def lists(self, k: int, new_items: int | None) -> Lists:
        """What makes lists of `k` items; says once where fewer new items than asked for can be had.

        Raises:
            ConfigError: k < 1, or `new_items` outside 0..k, or above 0 of a row without text.
        """
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        if new_items is not None and not 0 <= new_items <= k:
            raise ConfigError(f"new_items must be from 0 to k = {k}, got {new_items}")
        if new_items and not _reads_text(self.row):
            raise ConfigError(
                f"row {self.row!r} knows nothing of items without training events; ask a row over text"
            )
        if new_items and (available := int(self.new.sum())) < new_items:
            self._say_once(
                f"note: {available} of the {len(self.new):,} items have no training event, so no list has more "
                "new ones; `add-items` makes items known"
            )
        return Lists(self.scorer, self.new, k, new_items)

    def _say_once(self, note: str) -> None:
        if note not in self._said:
            self._said.add(note)
            progress.say(note)

    def reads(self, item_id: str) -> bool:
        """Whether the item may stand in a history: it is in the catalogue, and the row can know it."""
        return 0 < self.index.get(item_id, 0) <= self.scorer.n_items

    @property
    def window(self) -> int:
        """How many events of a history are looked at: as many as in training, whatever the recipe says since."""
        return int(getattr(self.scorer, "history_length", self.domain.config.history_length))

    def require_readable(self, highest: int) -> None:
        """Raises DataError where the highest item_index of histories is of an item that the row cannot know."""
        if highest > self.scorer.n_items:
            raise DataError(
                f"item {self.catalogue.item_ids[highest - 1]!r} was added after the training, which row "
                f"{self.row!r} cannot know; ask a row over text"
            )


@dataclass(frozen=True)
class Lists:
    """Makes lists of the `k` best items by a scorer, with exactly `new_items` new ones unless that is None.

    Items that the scorer says it does not know are not listed: learned ids give those held out as cold the score
    0, which may be above all others.

    new: (N,) bool, as `is_new` says.
    """

    scorer: Scorer
    new: torch.Tensor
    k: int
    new_items: int | None = None

    @property
    def needs_times(self) -> bool:
        """Whether the scorer looks at the times of events."""
        return getattr(self.scorer, "needs_times", False)

    def of(self, seen: list[torch.Tensor], hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Items (B, K), best first, filled up with 0, and their scores.

        Args:
            seen: histories (B, L), and their times where the scorer needs them.
            hidden: (B, L) item_index that must not be listed, padded with 0.
        """
        scores = self.scorer.score(*seen)
        known = getattr(self.scorer, "known", None)
        if self.new_items is not None:  # what ids do not know is new, and they keep no places for new ones
            items = with_new_items(scores, hidden, self.new, self.k, self.new_items)
        elif known is None or known.all():
            items = top_k(scores, self.k, hidden)[0]
        else:
            items = _best_of(known.nonzero()[:, 0], scores, hidden, self.k)
        return items, scores.gather(1, (items - 1).clamp(min=0))


def is_new(domain: Domain, n_items: int) -> torch.Tensor:
    """Which of the first items have no training event, (n_items,) bool: held-out ones, and all added since.

    Raises:
        ArtifactError: the log has more items.
    """
    counts = torch.from_numpy(Sequences.load(domain.data).training_counts())
    if n_items < len(counts):
        raise ArtifactError(
            f"{domain.data} has {len(counts):,} items, of which only {n_items:,} can be scored; run `fit` again"
        )
    return F.pad(counts, (0, n_items - len(counts))) == 0


def with_new_items(
    scores: torch.Tensor, hidden: torch.Tensor, new: torch.Tensor, k: int, places: int
) -> torch.Tensor:
    """Lists (B, K), best first, filled up with 0, of the best `places` new items and the best others.

    Where there are fewer new items the others take their places; where there are fewer others a list is shorter.

    Args:
        scores: (B, N). new: (N,) bool.
        hidden: (B, L) item_index that must not be listed, padded with 0.
        k: of a list. places: for new items, at most k.
    """
    newest, others = (
        _best_of(columns.nonzero()[:, 0], scores, hidden, size) for columns, size in ((new, places), (~new, k))
    )
    left = k - (newest > 0).sum(dim=1, keepdim=True)  # places for the others
    others = others * (torch.arange(others.shape[1]) < left)
    items = torch.cat([newest, others], dim=1)
    order = scores.gather(1, (items - 1).clamp(min=0)).masked_fill(items == 0, -torch.inf)
    return items.gather(1, order.argsort(dim=1, descending=True, stable=True))[:, :k]


def _best_of(columns: torch.Tensor, scores: torch.Tensor, hidden: torch.Tensor, k: int) -> torch.Tensor:
    """The best k items of some columns (C,), (B, at most k), best first, filled up with 0."""
    if not k or not len(columns):
        return hidden[:, :0]
    place = torch.zeros(scores.shape[1] + 1, dtype=torch.int64)
    place[columns + 1] = torch.arange(1, len(columns) + 1)
    found = top_k(scores[:, columns], k, place[hidden])[0]
    return F.pad(columns + 1, (1, 0))[found]


def say_choice(option: str, chosen: str, usual: str) -> None:
    """Says what answers where none was named, unless it is the usual one."""
    if chosen != usual:
        progress.say(f"note: {option} {chosen}; --{option} ({option}=) takes another")


def opened(run: str | Path | Run) -> Run:
    """The run; says where a stage of it was begun and not finished, and answers all the same."""
    run = run if isinstance(run, Run) else open_run(run)
    if problem := run.unfinished():
        progress.say(f"note: {problem}")
    return run


def load_scorer(domain: Domain, row: str, seed: int, with_added: bool = False) -> Scorer:
    """The recommender of a row, ready to score.

    Args:
        with_added: rows over text score the items added since the training as well, after the others.

    Raises:
        ArtifactError: the row is not trained, or its vectors are gone or changed.
    """
    if row in FLOORS:
        return baselines.FLOORS[row](Sequences.load(domain.data))
    parents = Row.parse(row).parents
    if parents:
        folder = domain.recommender(row, seed)
        artifacts.require(folder, "fit")
        weight = artifacts.read_json(folder / AVERAGE)["weight"]
        ids, text = parents
        return ScoreAverage(load_trained(domain, ids, seed), load_trained(domain, text, seed, with_added), weight)
    return load_trained(domain, row, seed, with_added)


def load_trained(domain: Domain, row: str, seed: int, with_added: bool = False) -> model.Recommender:
    """The recommender of a trained row; errors as `load_scorer`."""
    folder = domain.recommender(row, seed)
    name = artifacts.require(folder, "fit").summary["vectors"]
    catalogue = added.trained_catalogue(domain)
    vectors = load_vectors(domain, name, catalogue) if name else None
    since = added_vectors(domain, name) if name and with_added else None
    return model.load(folder, vectors, added=since, item_ids=catalogue.item_ids)


def added_vectors(domain: Domain, name: str) -> np.ndarray | None:
    """(M, D) vectors of the added items, in the order of `added.load_catalogue`; None without any."""
    since = added.load(domain)
    return None if since is None else added.load_vectors(domain, name).aligned_to(since.item_ids)


def load_vectors(domain: Domain, name: str, catalogue: Catalogue) -> np.ndarray:
    """One vector set of a domain, (N, D) float32 in the catalogue's order.

    Raises:
        ArtifactError: the run has no such set, or it does not cover the catalogue.
    """
    folder = domain.embeddings(name)
    if artifacts.read_manifest(folder) is None:
        made = ", ".join(made_sets(domain)) or "none yet"
        raise ArtifactError(f"{domain.folder} has no vectors {name!r}; it has: {made}")
    artifacts.require(folder, "encode")
    return ItemEmbeddings.load(folder).aligned_to(catalogue.item_ids)


def made_sets(domain: Domain) -> list[str]:
    """The vector sets that a domain has, by name."""
    made = domain.embeddings("*").parent.glob(f"*/{artifacts.MANIFEST}")
    return sorted(path.parent.name for path in made)


def index_of(catalogue: Catalogue, item_id: str) -> int:
    """The item_index (1..N) of an outside id.

    Raises:
        DataError: no such item; names items whose id or title comes close.
    """
    if not str(item_id).strip():
        raise DataError(f"the item id is empty ({item_id!r}); ids look like {first_few(catalogue.item_ids, 3)}")
    try:
        return catalogue.item_ids.index(str(item_id)) + 1
    except ValueError:
        wanted = str(item_id).lower()
        close = [
            f"{candidate} ({title})"
            for candidate, title in zip(catalogue.item_ids, catalogue.titles, strict=True)
            if wanted in title.lower()
        ]
        hint = (
            f"items with that in their title: {first_few(close)}"
            if close
            else (f"ids look like {first_few(catalogue.item_ids, 3)}")
        )
        raise DataError(f"there is no item {item_id!r} in the catalogue; {hint}") from None


def listed(catalogue: Catalogue, items: torch.Tensor, scores: torch.Tensor, new: torch.Tensor) -> list[ScoredItem]:
    """Items by item_index (K,) with their scores (K,) and whether they are new (N,); index 0 is left out."""
    chosen, known = items[items > 0], scores[items > 0]
    rows = (chosen - 1).numpy()
    ids, titles = (catalogue.frame[name][rows] for name in (ITEM, TITLE))  # frame[rows] takes threads for few rows
    return [
        ScoredItem(item_id, clean(title), score, is_new_one)
        for item_id, title, score, is_new_one in zip(
            ids, titles, known.tolist(), new[chosen - 1].tolist(), strict=True
        )
    ]
