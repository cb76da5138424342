"""The language model as the recommender itself: titles ranked by their likelihood after those of the history.

A scorer like any other, so that it is judged by the same ranks. A history goes through the model once and its keys
and values are kept; after them the catalogue is read as a tree of tokens, level by level, in which titles that
begin alike are one path; where only the rank of a target is asked, as far as they can still be likelier than it.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.lm.attention import attending
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.csft import csft_texts
from llm2rec.lm.packing import TokenisedTexts, gather_texts
from llm2rec.lm.text import SEPARATOR

AFTER_HISTORY = "llm2rec_after_history"
LOGITS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _History:
    """A history as read: its keys and values, how many tokens it has, log-probability (V,) of the next token."""

    cache: DynamicCache
    length: int
    first: Tensor


@dataclass(frozen=True)
class _Level:
    """The nodes of a tree of titles after so many tokens, n of them, in lexicographic order.

    tokens: (n,) int64. parents: (n,) int64, each node's place in the level above, rising.
    titles, ends: (e,) int64, the titles whose last token this is, and at which node each ends.
    """

    tokens: Tensor
    parents: Tensor
    titles: Tensor
    ends: Tensor


def _tree(texts: TokenisedTexts, titles: np.ndarray) -> list[_Level]:
    """Titles, in lexicographic order of their tokens, as a tree: equal beginnings are one node."""
    tokens, lengths = gather_texts(texts, titles)
    padded = np.full((len(titles), int(lengths.max())), -1, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = tokens
    levels = []
    begins = np.zeros(len(titles), dtype=bool)  # whether a title leaves the one before it up to here
    begins[0] = True
    above = np.zeros(len(titles), dtype=np.int64)
    for level in range(padded.shape[1]):
        begins[1:] |= padded[1:, level] != padded[:-1, level]
        reaching = lengths > level
        node = np.cumsum(begins & reaching) - 1  # (T,) of titles that reach the level
        own, last = np.flatnonzero(begins & reaching), np.flatnonzero(lengths == level + 1)
        parts = padded[own, level], above[own], titles[last], node[last]
        levels.append(_Level(*(torch.from_numpy(part) for part in parts)))
        above = node
    return levels


def _lexicographic(texts: TokenisedTexts) -> np.ndarray:
    """All texts in the order of their tokens."""
    tokens = texts.tokens.tolist()
    rows = [tokens[begin:end] for begin, end in zip(texts.offsets[:-1], texts.offsets[1:], strict=True)]
    return np.array(sorted(range(len(rows)), key=rows.__getitem__), dtype=np.int64)


class TitleRanker:
    r"""Scores an item by the log-likelihood of its title, ended by a line break, after the titles of the history.

    The layout is CSFT's mode `packed`: every title ended by "\n", nothing before the first but what the tokenizer
    begins a text with. The sum over tokens, not the mean: what the model would write is what it thinks likely as a
    whole. Items of one title tie.
    """

    def __init__(
        self,
        lm: Backbone,
        titles: list[str],
        *,
        history_length: int,
        max_title_tokens: int,
        batch_titles: int = 1024,
    ) -> None:
        """Takes a model with its head; it is made causal, and stays on its device.

        Args:
            titles: (N,) title of item_index i + 1.
            history_length: only the last so many items are read.
            max_title_tokens: longer titles are truncated, as in CSFT.
            batch_titles: distinct titles of a tree; each may carry the keys and values of its tokens along.

        Raises:
            ConfigError: the model has no head; arguments below 1; a title is beyond its context.
            ArtifactError: the model does not attend causally, or lacks a token.
        """
        if not hasattr(lm.model, "lm_head"):
            raise ConfigError("ranking titles takes a language model with its head; load it with head=True")
        if min(history_length, batch_titles) < 1:
            raise ConfigError(
                f"history_length {history_length} and batch_titles {batch_titles} must be at least 1"
            )
        lm.set_causal(True)
        lm.model.eval()
        named = inspect.signature(lm.body.forward).parameters
        self._cache = "cache" if "cache" in named else "past_key_values"  # transformers renames it, model by model
        self._lm, self._history_length = lm, history_length
        places = {title: place for place, title in enumerate(dict.fromkeys(titles))}
        self._title_of = np.array([places[title] for title in titles])  # (N,) item -> distinct title
        self._texts = csft_texts(lm.tokenizer, list(places), max_title_tokens)
        self._empty = np.array(lm.tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"], dtype=np.int64)
        self.check_histories(torch.zeros(1, 0, dtype=torch.int64))
        order = _lexicographic(self._texts)
        batches = (order[begin : begin + batch_titles] for begin in range(0, len(order), batch_titles))
        self._trees = [_tree(self._texts, titles) for titles in batches]

    @property
    def n_items(self) -> int:
        """Items in the catalogue, N."""
        return len(self._title_of)

    def check_histories(self, histories: Tensor) -> None:
        """Checks, before anything is computed, that the model can read any title after each of these histories.

        Raises:
            ConfigError: a history with the longest title is beyond its context, or a sliding window.
            ArtifactError: the model lacks a token.
        """
        longest = max((len(self._tokens(row)) for row in histories), default=0)
        self._lm.check_readable(self._texts, longest + int(self._texts.lengths.max()))

    def score(self, histories: Tensor) -> Tensor:
        """(B, N) float32 log-likelihoods in nats, <= 0; column j is of item_index j + 1.

        An empty history is a line break: the model is asked for any title.

        Args:
            histories: (B, L) int64 item_index, left-aligned, 0 = padding.

        Raises:
            ConfigError, ArtifactError: as `check_histories`, of all before the first is read.
        """
        self.check_histories(histories)
        items = torch.from_numpy(self._title_of)
        with torch.inference_mode():
            return torch.stack([self._likelihoods(self._read(row), self._trees)[items] for row in histories])

    def ranks(self, targets: Tensor, exclude: Tensor | None, histories: Tensor) -> Tensor:
        """`evaluation.ranking.ranks` of the scores, (B,) int64, 1 = best, up to the rounding of the scores.

        The likelihood of a title only falls while it is read: a title is left as soon as it is less likely than
        the whole target. Items of the target's title count against it.

        Args:
            targets: (B,) int64 item_index.
            exclude: (B, L) item_index that do not compete, padded with 0, or None; a target among them still does.
            histories: as in `score`.

        Raises:
            ConfigError, ArtifactError: as `score`.
        """
        self.check_histories(histories)
        found = []
        with torch.inference_mode():
            for row, history in enumerate(histories):
                target = int(targets[row]) - 1
                competes = np.ones(self.n_items, dtype=bool)
                if exclude is not None:
                    competes[exclude[row][exclude[row] > 0].cpu().numpy() - 1] = False
                competes[target] = True
                found.append(self._rank(self._read(history), target, competes))
        return torch.tensor(found, dtype=torch.int64)

    def _rank(self, history: _History, target: int, competes: np.ndarray) -> int:
        """How many competing items are at least as likely as the target, which is one of them."""
        items = np.bincount(self._title_of[competes], minlength=len(self._texts))  # of each title
        own = self._title_of[target]
        floor = float(self._likelihoods(history, [_tree(self._texts, np.array([own]))])[own])
        found = self._likelihoods(history, self._trees, floor).numpy()
        found[own] = floor
        return int(items[found >= floor].sum())

    def _tokens(self, history: Tensor) -> np.ndarray:
        """How the last items of a history read, (t,) int64."""
        recent = history[history > 0].cpu().numpy()[-self._history_length :]
        titles = gather_texts(self._texts, self._title_of[recent - 1])[0] if len(recent) else self._empty
        return np.insert(titles, 0, self._texts.prefix)

    def _read(self, history: Tensor) -> _History:
        """What the model knows after the last items of a history."""
        tokens, cache = self._tokens(history), DynamicCache()
        output = self._lm.body(
            input_ids=torch.from_numpy(tokens)[None].to(self._lm.body.device),
            use_cache=True,
            **{self._cache: cache},
        )
        first = torch.log_softmax((output.last_hidden_state[0, -1] @ self._lm.head.T).float(), dim=-1)
        return _History(cache, len(tokens), first.cpu())

    def _likelihoods(self, history: _History, trees: list[list[_Level]], floor: float = -math.inf) -> Tensor:
        """Log-likelihood (T,) of the titles of some trees, on the CPU; -inf of the others.

        floor: a title that falls below it is not read to its end, and has -inf as well.
        """
        found = torch.full((len(self._texts),), -math.inf)
        for tree in trees:
            self._descend(tree, history, floor, found)
        return found

    def _descend(self, tree: list[_Level], history: _History, floor: float, found: Tensor) -> None:
        """Writes the log-likelihoods of a tree's titles into `found`, level by level, of nodes above `floor`."""
        values = history.first[tree[0].tokens]  # (n,) of the level's nodes
        cache, place = DynamicCache(), None  # what is kept of the nodes that were read, and where in it each is
        for number, (level, below) in enumerate(zip(tree, [*tree[1:], None], strict=True)):
            found[level.titles] = values[level.ends]
            if below is None:
                return
            inner = torch.zeros(len(values), dtype=torch.bool)
            inner[below.parents] = True
            read = (inner & (values >= floor)).nonzero()[:, 0]  # (r,) nodes to go on from
            if not len(read):
                return
            if place is not None:
                cache.batch_select_indices(place[level.parents[read]].to(self._lm.body.device))
            states = self._states(level.tokens[read], history, number, cache)
            place = torch.full((len(values),), -1)
            place[read] = torch.arange(len(read))
            children = (place[below.parents] >= 0).nonzero()[:, 0]
            parents = below.parents[children]
            steps = _log_probabilities(states, self._lm.head, place[parents], below.tokens[children])
            known = values[parents]
            values = torch.full((len(below.tokens),), -math.inf)
            values[children] = known + steps

    def _states(self, tokens: Tensor, history: _History, depth: int, cache: DynamicCache) -> Tensor:
        """Hidden states (r, H) of one token each, `depth` tokens after the history, whose paths are in `cache`."""
        device = self._lm.body.device
        with attending(self._lm.body, AFTER_HISTORY):
            output = self._lm.body(
                input_ids=tokens[:, None].to(device),
                position_ids=torch.tensor([[history.length + depth]], device=device),
                use_cache=True,
                history=history.cache,
                **{self._cache: cache},
            )
        return output.last_hidden_state[:, 0]


def _log_probabilities(states: Tensor, head: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability (M,) float32, <= 0, on the CPU, of each token after the state of its row of `states` (r, H).

    A token's logit is one of those that its row is normalised by, rounded alike: an exact one beside rounded ones
    gives probabilities above 1.

    Args:
        rows: (M,) rising.
    """
    at_once = max(1, LOGITS_BYTES // (4 * len(head)))
    chunks = states.split(at_once)
    sizes = torch.bincount(rows // at_once, minlength=len(chunks)).tolist()
    rows, tokens = (rows % at_once).to(head.device), tokens.to(head.device)
    found = []
    for chunk, own, following in zip(chunks, rows.split(sizes), tokens.split(sizes), strict=True):
        logits = (chunk @ head.T).float()
        found.append(logits[own, following] - logits.logsumexp(dim=1)[own])
    return torch.cat(found).cpu()


def _attend_after_history(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    history: DynamicCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one token a path, to its path and to a history that all paths share: (r, heads, 1, d).

    The history is multiplied with all queries at once, and never copied for each path.

    Args:
        key, value: (r, groups, t, d) of the path, the token itself included.
        history: keys and values (1, groups, P, d) of each layer.
    """
    shared = history.layers[module.layer_idx]  # type: ignore[index]
    paths, heads, _, width = query.shape
    groups, known = key.shape[1], shared.keys.shape[2]
    if softcap is not None or (sliding_window is not None and known + key.shape[2] > sliding_window):
        raise ArtifactError(
            f"titles cannot be ranked by a model with a soft cap or a sliding window (this one: {softcap}, "
            f"{sliding_window}; {known + key.shape[2]} tokens); lower data.history_length"
        )
    scale = scaling if scaling is not None else width**-0.5
    asked = query.view(paths, groups, -1, width) * scale
    together = asked.transpose(0, 1).reshape(groups, -1, width)  # (groups, r * heads / groups, d)
    before = (together @ shared.keys[0].transpose(1, 2)).view(groups, paths, -1, known).transpose(0, 1)
    shares = torch.cat([before, asked @ key.transpose(2, 3)], dim=-1).softmax(dim=-1)
    far, near = shares[..., :known], shares[..., known:]
    mixed = far.transpose(0, 1).reshape(groups, -1, known) @ shared.values[0]
    mixed = mixed.view(groups, paths, -1, width).transpose(0, 1) + near @ value
    return mixed.reshape(paths, 1, heads, width), None


AttentionInterface.register(AFTER_HISTORY, _attend_after_history)
AttentionMaskInterface.register(AFTER_HISTORY, lambda *args, **kwargs: None)
