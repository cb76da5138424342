"""The language model as the recommender itself: titles ranked by their likelihood after those of the history.

A scorer like any other, so that it is judged by the same ranks. A history goes through the model once, its keys
and values are kept, and the titles of the whole catalogue are read in batches after them; where only the rank of a
target is asked, as far as they can still be likelier than it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from llm2rec.errors import ConfigError
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.csft import csft_texts
from llm2rec.lm.packing import gather_texts, token_budget_batches
from llm2rec.lm.text import SEPARATOR

LOGITS_BYTES = 64 * 2**20
GLANCE = 3  # tokens of a title that are read before it is asked whether it can still be likely enough


@dataclass(frozen=True)
class _History:
    """A history as read: its keys and values, how many tokens it has, log-probability (V,) of the next token."""

    cache: DynamicCache
    length: int
    first: Tensor


class TitleRanker:
    r"""Scores an item by the log-likelihood of its title, ended by a line break, after the titles of the history.

    The layout is CSFT's mode `packed`: every title ended by "\n", nothing before the first. The sum over tokens,
    not the mean: what the model would write is what it thinks likely as a whole. Items of one title tie.
    """

    def __init__(
        self,
        lm: Backbone,
        titles: list[str],
        *,
        history_length: int,
        max_title_tokens: int,
        batch_tokens: int = 1024,
    ) -> None:
        """Takes a model with its head; it is made causal, and stays on its device.

        Args:
            titles: (N,) title of item_index i + 1.
            history_length: only the last so many items are read.
            max_title_tokens: longer titles are truncated, as in CSFT.
            batch_tokens: title tokens in one forward pass; each carries the history's keys and values along.

        Raises:
            ConfigError: the model has no head; arguments below 1; a history of such titles is beyond its context.
            ArtifactError: the model does not attend causally, or lacks a token.
        """
        if not hasattr(lm.model, "lm_head"):
            raise ConfigError("ranking titles takes a language model with its head; load it with head=True")
        if min(history_length, batch_tokens) < 1:
            raise ConfigError(
                f"history_length {history_length} and batch_tokens {batch_tokens} must be at least 1"
            )
        lm.set_causal(True)
        lm.model.eval()
        self._lm, self._history_length = lm, history_length
        places = {title: place for place, title in enumerate(dict.fromkeys(titles))}
        self._title_of = np.array([places[title] for title in titles])  # (N,) item -> distinct title
        self._texts = csft_texts(lm.tokenizer, list(places), max_title_tokens)
        lm.check_readable(self._texts, (history_length + 1) * int(self._texts.lengths.max()))
        self._empty = np.array(lm.tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"], dtype=np.int64)
        self._batch_tokens = batch_tokens

    @property
    def n_items(self) -> int:
        """Items in the catalogue, N."""
        return len(self._title_of)

    def score(self, histories: Tensor) -> Tensor:
        """(B, N) float32 log-likelihoods in nats, <= 0; column j is of item_index j + 1.

        An empty history is a line break: the model is asked for any title.

        Args:
            histories: (B, L) int64 item_index, left-aligned, 0 = padding.
        """
        items = torch.from_numpy(self._title_of)
        with torch.inference_mode():
            return torch.stack([self._likelihoods(self._read(row))[items] for row in histories])

    def ranks(self, targets: Tensor, exclude: Tensor | None, histories: Tensor) -> Tensor:
        """`evaluation.ranking.ranks` of the scores, (B,) int64, 1 = best, up to the rounding of the scores.

        The likelihood of a title only falls while it is read: a title is left as soon as it is less likely than
        the whole target. Items of the target's title count against it.

        Args:
            targets: (B,) int64 item_index.
            exclude: (B, L) item_index that do not compete, padded with 0, or None; a target among them still does.
            histories: as in `score`.
        """
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
        floor = float(self._likelihoods(history, np.array([own]))[own])
        others = np.flatnonzero(items)
        found = self._likelihoods(history, others[others != own], floor).numpy()
        found[own] = floor
        return int(items[found >= floor].sum())

    def _read(self, history: Tensor) -> _History:
        """What the model knows after the last items of a history."""
        recent = history[history > 0].cpu().numpy()[-self._history_length :]
        prefix = gather_texts(self._texts, self._title_of[recent - 1])[0] if len(recent) else self._empty
        output = self._lm.body(
            input_ids=torch.from_numpy(prefix)[None].to(self._lm.body.device),
            past_key_values=DynamicCache(),
            use_cache=True,
        )
        first = torch.log_softmax((output.last_hidden_state[0, -1] @ self._lm.head.T).float(), dim=-1)
        return _History(output.past_key_values, len(prefix), first.cpu())

    def _likelihoods(
        self, history: _History, titles: np.ndarray | None = None, floor: float = -math.inf
    ) -> Tensor:
        """Log-likelihood (T,) of distinct titles, all or the given ones, on the CPU; -inf of the others.

        floor: a title that falls below it is not read to its end; what it had by then is its likelihood.
        """
        titles = np.arange(len(self._texts)) if titles is None else titles
        first = torch.from_numpy(self._texts.tokens[self._texts.offsets[titles]])
        found = torch.full((len(self._texts),), -math.inf)
        found[torch.from_numpy(titles)] = history.first[first]
        titles = titles[found[torch.from_numpy(titles)].numpy() >= floor]
        titles = titles[np.argsort(self._texts.lengths[titles], kind="stable")]  # batches of about equal lengths
        for rows in token_budget_batches(self._texts.lengths[titles], self._batch_tokens):
            self._read_on(titles[rows], history, floor, found)
        return found

    def _read_on(self, titles: np.ndarray, history: _History, floor: float, found: Tensor) -> None:
        """Adds to `found` the log-likelihoods of all tokens but the first of some titles, until below `floor`."""
        device = self._lm.body.device
        tokens, lengths = gather_texts(self._texts, titles)
        width = int(lengths.max())
        real = np.arange(width) < lengths[:, None]  # (b, width)
        padded = np.zeros(real.shape, dtype=np.int64)
        padded[real] = tokens
        ids, is_real = torch.from_numpy(padded), torch.from_numpy(real)
        left = torch.from_numpy(titles)  # titles that are read on
        cache = _repeated(history.cache, len(titles))
        ends = [width - 1] if floor == -math.inf else [*range(GLANCE, width - 1, GLANCE), width - 1]
        for start, end in pairwise([0, *ends]):  # nothing follows the last token; padding is behind what is read
            states = self._lm.body(
                input_ids=ids[:, start:end].to(device),
                attention_mask=ids.new_ones(len(ids), history.length + end).to(device),
                position_ids=torch.arange(history.length + start, history.length + end, device=device)[None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            asked = is_real[:, start + 1 : end + 1]
            labels = ids[:, start + 1 : end + 1][asked].to(device)
            values = _log_likelihoods(states[asked.to(device)], self._lm.head, labels).cpu()
            found.index_add_(0, left.repeat_interleave(asked.sum(1)), values)
            likely = (found[left] >= floor).nonzero()[:, 0]
            if not len(likely):
                return
            if len(likely) < len(left):
                ids, is_real, left = ids[likely], is_real[likely], left[likely]
                cache.batch_select_indices(likely.to(device))


def _repeated(cache: DynamicCache, times: int) -> DynamicCache:
    """A cache of its own for `times` continuations; the keys and values of the history are views of the one."""
    repeated = DynamicCache()
    layers: Any = cache.layers
    for number, layer in enumerate(layers):
        shape = (times, -1, -1, -1)
        repeated.update(layer.keys.expand(shape), layer.values.expand(shape), number)
    return repeated


def _log_likelihoods(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Log-probability (M,) float32 of each label under `softmax(hidden @ head.T)`, some rows at a time."""
    rows = max(1, LOGITS_BYTES // (4 * len(head)))
    parts = [
        -torch.nn.functional.cross_entropy((chunk @ head.T).float(), label, reduction="none")
        for chunk, label in zip(hidden.split(rows), labels.split(rows), strict=True)
    ]
    return torch.cat(parts)
