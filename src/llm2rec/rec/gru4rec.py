"""GRU4Rec: a gated recurrent network over the history.

Source: Hidasi et al. (2016), Session-based Recommendations with Recurrent Neural Networks, over item vectors
instead of one-hot items, as in the LLM2Rec paper. Differences, all usual today: dropout on the inputs, a linear
map from the recurrent state to the width of the item vectors, batches of windows instead of parallel sessions.
"""

from __future__ import annotations

from torch import Tensor, nn

from llm2rec.rec.architecture import Architecture
from llm2rec.rec.dropout import dropout
from llm2rec.rec.items import ItemTable, lookup
from llm2rec.rec.sequential import SequentialRecommender


class GRU4Rec(SequentialRecommender):
    """`layers` GRUs of H units over item vectors, then a linear map H -> H; order alone tells positions apart."""

    def __init__(self, items: ItemTable, architecture: Architecture) -> None:
        super().__init__(items, architecture)
        hidden_size, layers = architecture.hidden_size, architecture.layers
        between = architecture.dropout if layers > 1 else 0.0  # torch warns where there is no layer between
        self.recurrent = nn.GRU(hidden_size, hidden_size, layers, batch_first=True, dropout=between)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, histories: Tensor, vectors: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """(B, L) -> (B, L, H); see the base class."""
        vectors = self.items.vectors() if vectors is None else vectors
        # Item vectors are small (std 0.02); the gates see them as large as SASRec's blocks do.
        inputs = lookup(vectors, histories) * self.hidden_size**0.5
        states, _ = self.recurrent(dropout(inputs, self.dropout, self.training))  # (B, L, H)
        projected: Tensor = self.output(states)
        return projected
