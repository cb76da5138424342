"""Token-budget batches: sequences of different lengths laid end to end in one row, without padding.

Everything but attention works on the flat row (1, T). Attention alone sees each sequence by itself: the
packed attention of `backbone` re-pads queries, keys and values to (S, L) around the kernel, in one block or
in two of like lengths, with the indices that `pack` prepares. So packed sequences cannot see each other,
causal or bidirectional.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Packed = dict[str, Any]
SHARE_OF_ONE_BLOCK = 0.5  # at most so many of its attention shares must be left for two blocks to be worth it


@dataclass(frozen=True)
class TokenisedTexts:
    """Texts as flat token ids, tokenised once: text i is `tokens[offsets[i]:offsets[i + 1]]`.

    prefix: ids that a sequence made of several texts begins with; () where the texts hold them already.
    """

    tokens: np.ndarray  # int64 (T,); int32 of the authors' samples, which are many
    offsets: np.ndarray  # int64 (N + 1,)
    prefix: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 (N,)."""
        return np.diff(self.offsets)


def tokenise(tokenizer: Any, texts: list[str], max_tokens: int | None, special_tokens: bool) -> TokenisedTexts:
    """Token ids of each text, truncated to `max_tokens` (None: whole), in one batched call.

    Args:
        special_tokens: whether the tokenizer adds what it adds to a text on its own (`added_tokens`):
            yes for vectors, so that they equal sentence-transformers'; no inside a longer sequence.

    Raises:
        ValueError: a text gives no token at all.
    """
    truncation = max_tokens is not None
    encoded = tokenizer(texts, add_special_tokens=special_tokens, truncation=truncation, max_length=max_tokens)
    ids = encoded["input_ids"]
    lengths = np.fromiter((len(row) for row in ids), dtype=np.int64, count=len(ids))
    if (lengths == 0).any():
        raise ValueError(f"text {texts[int(np.argmin(lengths))]!r} has no tokens")
    tokens = np.fromiter((token for row in ids for token in row), dtype=np.int64, count=int(lengths.sum()))
    return TokenisedTexts(tokens, np.concatenate([[0], np.cumsum(lengths)]))


def added_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids that the tokenizer adds on its own before a text (a BOS, say) and behind it; often none."""
    plain, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    begin = next(place for place in range(len(whole)) if whole[place : place + len(plain)] == plain)
    return tuple(whole[:begin]), tuple(whole[begin + len(plain) :])


def shorten(tokenizer: Any, texts: list[str], max_tokens: int) -> list[str]:
    """Texts of more than `max_tokens` tokens cut behind the last character that those tokens reach."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        truncation=True,
        max_length=max_tokens,
        return_offsets_mapping=True,
    )
    return [
        text if len(spans) < max_tokens else text[: spans[-1][1]]
        for text, spans in zip(texts, encoded["offset_mapping"], strict=True)
    ]


def gather_texts(texts: TokenisedTexts, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the chosen texts end to end, (T,), and their lengths, int64 (len(indices),)."""
    lengths = texts.lengths[indices]
    starts = np.repeat(texts.offsets[indices], lengths)
    return texts.tokens[starts + positions_within(lengths)], lengths


def positions_within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... inside each sequence of a packed row, int64 (T,)."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def pack(tokens: np.ndarray, lengths: np.ndarray) -> Packed:
    """Model inputs of one packed row.

    Args:
        tokens: (T,) ids of all sequences end to end.
        lengths: (S,) tokens of each, all > 0.

    Returns:
        `input_ids` and `position_ids` (1, T) int64, and `segments`, what the packed attention needs: `lengths`
        (S,), `sequence` (T,) the sequence of each row position, `scatter` (T,) its padded cell, counted through
        all `blocks`. Each of these has `members` (B,), its sequences, padded to their longest: `gather` (B, L)
        row position of each cell, `valid` (B, L) bool. A caller may add `visible` (B, L, L) bool to each:
        which cell (rows) sees which, at least one each.
    """
    starts = np.cumsum(lengths) - lengths
    scatter = np.empty(len(tokens), dtype=np.int64)
    blocks, begin = {}, 0
    for number, members in enumerate(_blocks(lengths)):
        cells = np.arange(lengths[members].max())
        valid = cells < lengths[members][:, None]
        gather = np.where(valid, starts[members][:, None] + cells, 0)
        scatter[gather[valid]] = begin + np.flatnonzero(valid)
        begin += valid.size
        arrays = {"members": members, "gather": gather, "valid": valid}
        blocks[number] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {
        "input_ids": torch.from_numpy(tokens)[None],
        "position_ids": torch.from_numpy(positions_within(lengths))[None],
        "segments": {
            "lengths": torch.from_numpy(lengths),
            "sequence": torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
            "scatter": torch.from_numpy(scatter),
            "blocks": blocks,
        },
    }


def _blocks(lengths: np.ndarray) -> list[np.ndarray]:
    """The sequences (S,) in one block, or the longer and the shorter ones apart where that saves enough shares.

    A block keeps B x L x L shares. Not more than two, and none of a single sequence, which `torch.compile` would
    compile for once more.
    """
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    longer = np.arange(2, len(lengths) - 1)  # how many could be in the first block
    shares = longer * ordered[0] ** 2 + (len(lengths) - longer) * ordered[longer] ** 2
    if not len(longer) or shares.min() > SHARE_OF_ONE_BLOCK * len(lengths) * ordered[0] ** 2:
        return [np.arange(len(lengths))]
    return np.split(order, [longer[shares.argmin()]])


def to_device(batch: Packed, device: torch.device) -> Packed:
    """A batch with its tensors, also nested ones, on `device`."""
    return {
        name: to_device(value, device)
        if isinstance(value, dict)
        else (value.to(device) if isinstance(value, torch.Tensor) else value)
        for name, value in batch.items()
    }


def shuffled_pass(shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One pass over the numbers 0..n - 1 in random order, number i with probability `shares[i]`."""
    order = generator.permutation(len(shares))
    return order if (shares == 1).all() else order[generator.random(len(shares)) < shares[order]]


def token_budget_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Runs of consecutive indices whose tokens fit `budget`; a longer sequence makes a batch alone."""
    start, total = 0, 0
    for index, length in enumerate(lengths.tolist()):
        if total and total + length > budget:
            yield np.arange(start, index)
            start, total = index, 0
        total += length
    if total:
        yield np.arange(start, len(lengths))
