"""The language model as the recommender itself: titles ranked by their likelihood after those of the history.

A scorer like any other, so that it is judged by the same ranks. A history goes through the model once, its keys
and values are kept, and the titles of the whole catalogue are read in batches after them.
"""

from __future__ import annotations

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
        self._texts = csft_texts(lm.tokenizer, titles, max_title_tokens)
        lm.check_readable(self._texts, (history_length + 1) * int(self._texts.lengths.max()))
        self._empty = np.array(lm.tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"], dtype=np.int64)
        order = np.argsort(self._texts.lengths, kind="stable")  # titles of one batch are about equally long
        batches = token_budget_batches(self._texts.lengths[order], batch_tokens)
        self._batches = [order[rows] for rows in batches]

    @property
    def n_items(self) -> int:
        """Items in the catalogue, N."""
        return len(self._texts)

    def score(self, histories: Tensor) -> Tensor:
        """(B, N) float32 log-likelihoods in nats, <= 0; column j is of item_index j + 1.

        An empty history is a line break: the model is asked for any title.

        Args:
            histories: (B, L) int64 item_index, left-aligned, 0 = padding.
        """
        with torch.no_grad():
            return torch.stack([self._after(row[row > 0].cpu().numpy()) for row in histories])

    def _after(self, items: np.ndarray) -> Tensor:
        """Scores (N,) after one history of item indices, on the CPU."""
        recent = items[-self._history_length :]
        prefix = gather_texts(self._texts, recent - 1)[0] if len(recent) else self._empty
        body, device = self._lm.body, self._lm.body.device
        output = body(
            input_ids=torch.from_numpy(prefix)[None].to(device), past_key_values=DynamicCache(), use_cache=True
        )
        first = torch.from_numpy(self._texts.tokens[self._texts.offsets[:-1]])
        start = torch.log_softmax((output.last_hidden_state[0, -1] @ self._lm.head.T).float(), dim=-1)  # (V,)
        scores = start.cpu()[first]
        for rows in self._batches:
            scores[torch.from_numpy(rows)] += self._rest(rows, output.past_key_values, len(prefix))
        return scores

    def _rest(self, rows: np.ndarray, history: DynamicCache, seen: int) -> Tensor:
        """Log-likelihood (b,) of all tokens but the first of some titles, after `seen` tokens; on the CPU."""
        device = self._lm.body.device
        tokens, lengths = gather_texts(self._texts, rows)
        width = int(lengths.max())
        real = np.arange(width) < lengths[:, None]  # (b, width)
        padded = np.zeros(real.shape, dtype=np.int64)
        padded[real] = tokens
        ids = torch.from_numpy(padded).to(device)
        places = torch.arange(seen, seen + width - 1, device=device)
        states = self._lm.body(
            input_ids=ids[:, :-1],  # nothing follows the last token, and padding is behind whatever is read
            attention_mask=ids.new_ones(len(rows), seen + width - 1),
            position_ids=places.expand(len(rows), -1),
            past_key_values=_repeated(history, len(rows)),
            use_cache=True,
        ).last_hidden_state
        labelled = torch.from_numpy(real[:, 1:]).to(device)
        owners = torch.from_numpy(np.repeat(np.arange(len(rows)), lengths - 1))
        values = _log_likelihoods(states[labelled], self._lm.head, ids[:, 1:][labelled]).cpu()
        return torch.zeros(len(rows)).index_add(0, owners, values)


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
