"""From the hidden states of a packed row to one vector a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.packing import Packed

# Our mode -> the one of sentence-transformers' Pooling module that gives the same vectors.
MODES = {"mean": "mean", "last": "lasttoken", "weighted-mean": "weightedmean"}


@dataclass(frozen=True)
class Pooling:
    """How a title becomes a vector.

    mode: `mean` of its tokens' states; the `last` token's; or `weighted-mean`, token i of n (from 1) weighing
        i / (1 + ... + n), for models that look back only (SGPT, Muennighoff 2022, arXiv 2202.08904).
    layer: whose states; 0 = the embeddings, k = layer k, -1 = the last one, which by either number comes after the
        final norm.

    Raises:
        ConfigError: an unknown mode.
    """

    mode: str = "mean"
    layer: int = -1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"pooling must be one of {', '.join(MODES)}; got {self.mode!r}")

    def __str__(self) -> str:
        return self.mode if self.layer == -1 else f"{self.mode} of layer {self.layer}"

    def check_layer(self, lm: Backbone) -> None:
        """Raises ConfigError where the model has no such layer."""
        layers = lm.body.config.num_hidden_layers
        if not -1 <= self.layer <= layers:
            raise ConfigError(f"pooling layer {self.layer}: this model has 0 (embeddings) to {layers}, or -1")

    def exported(self) -> str:
        """The mode of sentence-transformers' Pooling module that gives the same vectors.

        Raises:
            ArtifactError: it has none.
        """
        if self.layer != -1:
            raise ArtifactError(
                f"a SentenceTransformer folder pools the last layer only, it cannot express the {self}; use layer "
                "-1 for the encoder (vectors of other layers can be encoded all the same)"
            )
        return MODES[self.mode]


MEAN = Pooling()


def embed(lm: Backbone, packed: Packed, pooling: Pooling = MEAN) -> Tensor:
    """Pooled vectors of the sequences of a packed row, (S, D) float32."""
    hidden = lm.hidden_states(packed, pooling.layer)
    sequence, sequences = packed["segments"]["sequence"], len(packed["segments"]["lengths"])
    if pooling.mode == "last":
        return pool_last(hidden, sequence, sequences)
    if pooling.mode == "weighted-mean":
        return pool_weighted_mean(hidden, sequence, sequences, packed["position_ids"][0] + 1)
    return pool_mean(hidden, sequence, sequences)


def pool_mean(hidden: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Mean of each sequence's hidden states in a packed row, (S, H) float32.

    Args:
        hidden: (1, T, H).
        sequence: (T,) the sequence of each position.
        sequences: S.
    Source: LLM2Rec section 3.3 (mean of the last hidden states over the title).
    """
    flat = hidden[0].float()
    total = flat.new_zeros(sequences, flat.shape[1]).index_add(0, sequence, flat)
    counts = torch.bincount(sequence, minlength=sequences).to(flat.dtype)
    return total / counts[:, None]


def pool_weighted_mean(hidden: Tensor, sequence: Tensor, sequences: int, weights: Tensor) -> Tensor:
    """Mean of each sequence's hidden states, weighted by `weights` (T,) > 0, (S, H) float32; see `pool_mean`."""
    flat = hidden[0].float()
    scaled = flat * weights[:, None]
    total = flat.new_zeros(sequences, flat.shape[1]).index_add(0, sequence, scaled)
    sums = flat.new_zeros(sequences).index_add(0, sequence, weights.to(flat.dtype))
    return total / sums[:, None]


def pool_last(hidden: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Hidden state of each sequence's last token, (S, H) float32; see `pool_mean`."""
    ends = torch.bincount(sequence, minlength=sequences).cumsum(0) - 1
    return hidden[0].float().index_select(0, ends)
