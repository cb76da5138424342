"""What a recommender is made of, as one value: which model, over which items, of which sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm2rec.errors import ConfigError

ATTENTION = ("sasrec", "sasrec-context", "esasrec")
MODELS = (*ATTENTION, "gru4rec")
ITEM_TABLES = ("id", "text", "sum", "concatenation", "delta")
ADAPTERS = ("linear", "mlp")
WHITENINGS = ("none", "half", "full")
WIDEST = 4096


@dataclass(frozen=True)
class Architecture:
    """The shape of a recommender; plain values, written to its `config.json`.

    name: one of MODELS; `heads` concerns those of ATTENTION alone.
    items: one of ITEM_TABLES; the options below concern those over item vectors, all but `id`.
    hidden_size: H, width of the states and of the item vectors that they are compared with.
    dropout: share in [0, 1).
    history_length: the window, in items; older ones are not looked at.
    adapter: one of ADAPTERS, from the item vectors' width to H; adapter_size: hidden units of `mlp`, None = H.
    smoothing: share of an item's vector that is the mean of the items consumed beside it, in [0, 1) (see
        `rec.smoothing`).
    whitening: one of WHITENINGS; dimensions: principal components kept, None = all (see `rec.vectors`).
    delta_share: of `items="delta"`, how far a vector may be moved, in its own length.
    temperature: divides the cosine that scores; None scores by the dot product.

    Raises:
        ConfigError: an unknown name, or a size that is out of range or fits no other.
    """

    name: str
    items: str
    hidden_size: int
    layers: int
    heads: int
    dropout: float
    history_length: int
    adapter: str = "linear"
    adapter_size: int | None = None
    smoothing: float = 0.0
    whitening: str = "none"
    dimensions: int | None = None
    delta_share: float = 0.5
    temperature: float | None = None

    def __post_init__(self) -> None:
        require_one_of("recommender", self.name, MODELS)
        require_one_of("item table", self.items, ITEM_TABLES)
        require_one_of("adapter", self.adapter, ADAPTERS)
        require_one_of("whitening", self.whitening, WHITENINGS)
        self._check_sizes()
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"smoothing is {self.smoothing}; it must be at least 0 and below 1")
        if not 0 < self.delta_share <= 1:
            raise ConfigError(f"delta_share is {self.delta_share}; it must be above 0 and at most 1")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; it must be above 0, or None for dot products")

    def _check_sizes(self) -> None:
        for size in ("hidden_size", "layers", "heads", "history_length", "dimensions", "adapter_size"):
            value = getattr(self, size)
            if value is not None and value < 1:
                raise ConfigError(f"{size} is {value}; it must be at least 1")
        if self.hidden_size > WIDEST:
            raise ConfigError(f"hidden_size is {self.hidden_size:,}; recommenders are 16 to {WIDEST:,} wide")
        if self.name in ATTENTION and self.hidden_size % self.heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}; choose one that is"
            )


def require_one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a name that is not allowed.

    Raises:
        ConfigError: naming what is allowed.
    """
    if value not in allowed:
        raise ConfigError(f"no {what} {value!r}; allowed: {', '.join(allowed)}")
