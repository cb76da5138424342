r"""The authors' training samples, one a target, laid out one by one (`paper`) or as trees (`tree`).

A sample is the titles of up to `history_length` items joined by ", ", then at once the target's title, "\n"
and the end-of-sequence token; target, "\n" and that token are the labels. History and target are tokenised
apart; a sample begins as the tokenizer begins a text. Source: LLM2Rec section 3.2 and the authors' code.

What `tree` equals. Every token of a sample sees itself and the tokens before it in its own sample, at their
own distance from its first token, in both layouts: so loss and gradients of a set of samples are those of
`paper`, up to rounding, whatever the samples. `tree` only computes once what samples share, and samples share
tokens only from their first token on. Those of one user do as long as their histories begin with the same
item: the user's first `history_length` targets become one tree. Each later target's history begins one item
further on, where nothing is shared (other text, other positions), so it is a sequence of its own, as in
`paper`. With 11 events a user `tree` needs about a third of the tokens, with hundreds about as many as `paper`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm2rec.batches import Batch
from llm2rec.data.sequences import Sequences
from llm2rec.errors import ArtifactError
from llm2rec.lm.packing import (
    TokenisedTexts,
    added_tokens,
    gather_texts,
    pack,
    positions_within,
    shorten,
    tokenise,
)
from llm2rec.lm.text import item_texts

JOINT = ", "
END = "\n"
TOKENISED_AT_ONCE = 8192


@dataclass(frozen=True)
class Samples:
    """Tokenised samples: their tokens, where the labels of each begin, and whom each shares its start with.

    first_label: (S,) tokens up to the history's end, so the place of the first label. trees: (S,) number of the
    tree.
    """

    texts: TokenisedTexts
    first_label: np.ndarray
    trees: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Tree:
    """Token sequences with their common beginnings stored once.

    tokens, depths: (n,) token and position of each node, parents before children. visible: (n, n), whether a
    node (row) sees another: itself and what is above it. paths: the nodes of each sequence, in order.
    """

    tokens: np.ndarray
    depths: np.ndarray
    visible: np.ndarray
    paths: list[np.ndarray]


def training_items(sequences: Sequences, history_length: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Item indices of each training sample, the target last, and the tree that each may belong to.

    Every training event but a user's first is a target exactly once, after up to `history_length` items.
    """
    items, offsets = sequences.training()
    items = np.asarray(items)
    first = np.repeat(offsets[:-1], np.diff(offsets))  # (T,) where the event's user begins
    targets = np.flatnonzero(np.arange(len(items)) > first)
    starts = np.maximum(first[targets], targets - history_length)
    trees = np.unique(starts, return_inverse=True)[1]
    return [items[start : target + 1] for start, target in zip(starts, targets, strict=True)], trees


def make_samples(
    tokenizer: Any,
    titles: list[str],
    item_sequences: list[np.ndarray],
    trees: np.ndarray,
    *,
    max_title_tokens: int,
    separator: bool,
) -> Samples:
    """The samples of item sequences (item indices 1..N, at least two, the target last), tokenised.

    Args:
        trees: (S,) ascending; samples with the same number share the start of their history.
        max_title_tokens: a longer title is cut after its last whole token.
        separator: whether history and target are separated too. The comma then ends the history and the
            space begins the target, as they do inside the history; the authors leave both out.

    Raises:
        ArtifactError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ArtifactError(
            "the tokenizer has no end-of-sequence token to end the authors' samples with; use csft.mode=packed"
        )
    texts = shorten(tokenizer, item_texts(titles), max_title_tokens)
    comma, space = (JOINT[0], JOINT[1:]) if separator else ("", "")
    targets = _tokenised(tokenizer, [f"{space}{text}{END}" for text in texts])
    prefix, end = (np.array(ids, np.int32) for ids in (added_tokens(tokenizer)[0], [tokenizer.eos_token_id]))
    rows: list[np.ndarray] = []
    first_label = np.empty(len(item_sequences), dtype=np.int64)
    for begin in range(0, len(item_sequences), TOKENISED_AT_ONCE):
        chosen = item_sequences[begin : begin + TOKENISED_AT_ONCE]
        histories = [JOINT.join(texts[item - 1] for item in items[:-1]) + comma for items in chosen]
        for items, history in zip(chosen, _tokenised(tokenizer, histories), strict=True):
            first_label[len(rows)] = len(prefix) + len(history)
            rows.append(np.concatenate([prefix, history, targets[items[-1] - 1], end]))
    lengths = np.array([len(row) for row in rows])
    return Samples(TokenisedTexts(np.concatenate(rows), np.append(0, np.cumsum(lengths))), first_label, trees)


def _tokenised(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    tokens = tokenise(tokenizer, texts, None, special_tokens=False)
    return [tokens[row].astype(np.int32) for row in range(len(tokens))]


def merge(sequences: list[np.ndarray]) -> Tree:
    """The tree of token sequences: one node for each different beginning."""
    tokens, parents, paths = _nodes(sequences)
    visible = np.eye(len(tokens), dtype=bool)
    depths = np.zeros(len(tokens), dtype=np.int64)
    for child, parent in enumerate(parents):
        if parent >= 0:
            visible[child] |= visible[parent]
            depths[child] = depths[parent] + 1
    return Tree(np.array(tokens, dtype=np.int64), depths, visible, paths)


def tree_size(sequences: list[np.ndarray]) -> int:
    """Nodes of `merge(sequences)`."""
    return len(sequences[0]) if len(sequences) == 1 else len(_nodes(sequences)[0])


def _nodes(sequences: list[np.ndarray]) -> tuple[list[int], list[int], list[np.ndarray]]:
    """Token and parent (-1: none) of each node, and the nodes of each sequence."""
    numbers: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    paths = []
    for sequence in sequences:
        node, path = -1, np.empty(len(sequence), dtype=np.int64)
        for place, token in enumerate(sequence.tolist()):
            child = numbers.setdefault((node, token), len(tokens))
            if child == len(tokens):
                tokens.append(token)
                parents.append(node)
            path[place] = node = child
        paths.append(path)
    return tokens, parents, paths


def supervise_samples(samples: Samples, chosen: np.ndarray) -> Batch:
    """A packed row of samples, one by one, as `csft.supervise` gives it."""
    tokens, lengths = gather_texts(samples.texts, chosen)
    tokens = tokens.astype(np.int64)
    places = np.flatnonzero(positions_within(lengths) >= np.repeat(samples.first_label[chosen], lengths))
    return {
        **pack(tokens, lengths),
        "rows": torch.from_numpy(places - 1),
        "labels": torch.from_numpy(tokens[places]),
        "n_targets": len(places),
    }


def supervise_trees(samples: Samples, groups: list[np.ndarray]) -> Batch:
    """A packed row of trees, one of each group of samples; every sample keeps all of its labels.

    Returns:
        As `supervise_samples`, in the order of `groups`, with `visible` in each block of the segments. A node
        that several samples pass through stands several times in `rows` where it has several labels.
    """
    trees = [merge([samples.texts[sample] for sample in group]) for group in groups]
    sizes = np.array([len(tree.tokens) for tree in trees])
    rows, labels = [], []
    for tree, group, start in zip(trees, groups, np.cumsum(sizes) - sizes, strict=True):
        for path, sample in zip(tree.paths, group, strict=True):
            first = samples.first_label[sample]
            rows.append(start + path[first - 1 : -1])
            labels.append(tree.tokens[path[first:]])
    packed = pack(np.concatenate([tree.tokens for tree in trees]), sizes)
    packed["position_ids"] = torch.from_numpy(np.concatenate([tree.depths for tree in trees]))[None]
    for block in packed["segments"]["blocks"].values():
        longest = block["gather"].shape[1]
        visible = np.stack([np.eye(longest, dtype=bool)] * len(block["members"]))
        for own, member in zip(visible, block["members"].tolist(), strict=True):
            own[: sizes[member], : sizes[member]] = trees[member].visible
        block["visible"] = torch.from_numpy(visible)
    return {
        **packed,
        "rows": torch.from_numpy(np.concatenate(rows)),
        "labels": torch.from_numpy(np.concatenate(labels)),
        "n_targets": sum(len(part) for part in labels),
    }
