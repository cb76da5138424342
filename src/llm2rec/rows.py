"""The grammar of row names: what a table of results compares, `sasrec-llm2rec+sum` taken apart."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from llm2rec.errors import ConfigError

FLOORS = ("popularity", "markov", "item-knn", "ease")
LARGEST_EASE = 30_000  # items; the row holds N^2 numbers
ARCHITECTURES = ("sasrec", "gru4rec", "esasrec")
CONTEXT = "sasrec-context"
VECTORS = ("id", "backbone", "csft", "mntp", "llm2rec")  # besides, text encoders by the names that a recipe gives
# What no text encoder may be called: the probes of the data stand beside those of vector sets, CONTEXT is a row.
RESERVED = ("data", "context")
FUSIONS = ("sum", "concatenation", "delta", "average")
ATTENTIONS = ("causal", "bidirectional")  # of models that were trained to look back only
LOOKING_BACK = ("backbone", "csft")
LATEST_FIRST = ("llm2rec", "mntp", "csft", "backbone")  # what the stages of the language model make
ENCODER_NAME = r"[a-z0-9_]+"
ROW_NAMES = (
    f"{', '.join(FLOORS)}, {CONTEXT}, or ARCHITECTURE-VECTORS of {', '.join(ARCHITECTURES)} and "
    f"{', '.join(VECTORS)} or a name in encode.text_encoders, with learned ids beside text as "
    f"+{', +'.join(FUSIONS)} (sasrec-llm2rec+sum); "
    f"{' and '.join(LOOKING_BACK)} may name their attention (sasrec-backbone-causal), else validation chooses it"
)
_NAME = re.compile(ENCODER_NAME)


@dataclass(frozen=True)
class Row:
    """A row name taken apart: `sasrec-llm2rec+sum` -> sasrec over llm2rec vectors, summed with learned ids.

    Attributes:
        architecture: None for floors.
        vectors: vector set, None for floors and learned ids; any that is not of VECTORS is a text encoder's.
        fusion: how learned ids stand beside the vectors, None where they do not.
        attention: of the encoding model, where the name says it; None: its own, or what validation chooses.
    """

    name: str
    architecture: str | None = None
    vectors: str | None = None
    fusion: str | None = None
    attention: str | None = None

    @classmethod
    def parse(cls, name: str) -> Row:
        """The parts of a row name.

        Raises:
            ConfigError: there is no such row, whatever text encoders there are.
        """
        if name in FLOORS:
            return cls(name)
        if name == CONTEXT:
            return cls(name, CONTEXT)
        stem, plus, fusion = name.partition("+")
        architecture, _, encoded = stem.partition("-")
        vectors, dash, attention = encoded.partition("-")
        known = architecture in ARCHITECTURES and _NAME.fullmatch(vectors) is not None and vectors not in RESERVED
        known = known and (not dash or (vectors in LOOKING_BACK and attention in ATTENTIONS))
        if not known or (plus and (fusion not in FUSIONS or vectors == "id")):
            raise ConfigError(f"unknown row {name!r}; rows are {ROW_NAMES}")
        return cls(name, architecture, None if vectors == "id" else vectors, fusion or None, attention or None)

    @property
    def text_encoder(self) -> str | None:
        """The name that the recipe gives the text encoder whose vectors these are, if they are one's."""
        return self.vectors if self.vectors not in (None, *VECTORS) else None

    @property
    def parents(self) -> tuple[str, ...]:
        """The rows that an averaged row is made of; a trained row has none."""
        if self.fusion != "average":
            return ()
        return f"{self.architecture}-id", self.name.partition("+")[0]


def preferred_row(names: Iterable[str]) -> str:
    """The row that answers where none is named: SASRec over the vectors of the latest stage, or what is next.

    Text comes before learned ids, which know no new item, plain before fused, and floors and rows that need times
    last; of equals the first.
    """

    def place(name: str) -> tuple[bool, int, int, bool]:
        row = Row.parse(name)
        if row.architecture not in ARCHITECTURES:
            return True, 0, 0, False
        vectors = _place_of_set(row.vectors) if row.vectors else len(LATEST_FIRST) + 1
        return False, vectors, ARCHITECTURES.index(row.architecture), row.fusion is not None

    return min(names, key=place)


def preferred_set(names: Iterable[str]) -> str:
    """The vector set that answers where none is named: of the latest stage, causal where there are both."""
    return min(names, key=lambda name: (_place_of_set(name.partition("-")[0]), not name.endswith("-causal"), name))


def _place_of_set(name: str) -> int:
    """Text encoders come after every stage of the language model."""
    return LATEST_FIRST.index(name) if name in LATEST_FIRST else len(LATEST_FIRST)
