"""Small logs made on the spot, for the small form of a study: what comes next is half certain, half chance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

THEMES = {
    "games": {
        "racing": ("Car", "Kart", "Rally", "Track", "Drift", "Engine", "Lap", "Pit", "Garage", "Tyre"),
        "space": ("Star", "Planet", "Comet", "Rocket", "Moon", "Alien", "Orbit", "Galaxy", "Laser", "Probe"),
        "castle": ("Knight", "Dragon", "Sword", "Queen", "Tower", "Wizard", "Crown", "Dungeon", "Siege", "Shield"),
        "farm": ("Harvest", "Tractor", "Cow", "Seed", "Orchard", "Barn", "Pony", "Mill", "Market", "Meadow"),
    },
    "tools": {
        "measuring": ("Ruler", "Gauge", "Level", "Caliper", "Scale", "Meter", "Square", "Laser", "Tape", "Probe"),
        "cutting": ("Saw", "Blade", "Shear", "Knife", "Mill", "Drill", "File", "Chisel", "Plane", "Cutter"),
        "fixing": ("Bolt", "Nut", "Screw", "Rivet", "Clamp", "Anchor", "Staple", "Glue", "Tape", "Hook"),
        "moving": ("Cart", "Crane", "Belt", "Pulley", "Winch", "Tractor", "Ramp", "Jack", "Hoist", "Engine"),
    },
    "films": {
        "war": ("Soldier", "Bridge", "Siege", "General", "Trench", "Letter", "Bomber", "Captain", "River", "Flag"),
        "love": ("Summer", "Letter", "Wedding", "Rain", "Garden", "Kiss", "Dance", "Moon", "Street", "Promise"),
        "crime": (
            "Detective",
            "Garage",
            "Heist",
            "Knife",
            "Alley",
            "Witness",
            "Judge",
            "Shadow",
            "Train",
            "Alibi",
        ),
        "quest": ("Island", "Map", "Dragon", "Crown", "Desert", "Temple", "Star", "Sword", "Mountain", "Ring"),
    },
}
FIRST_YEAR = 1980
SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class World:
    """A log of 40 items in four themes of ten; equal worlds are equal files.

    A user keeps to one theme: the item after the present one in three of five events, else any of the theme.
    Titles name the theme in words, the column `theme` holds it as a category.

    Attributes:
        name: one of THEMES.
        users: who each have `events` events, some hours to some days apart.
    """

    name: str
    users: int
    events: int = 9

    def files(self, folder: Path) -> tuple[Path, Path]:
        """Where in `folder` the interactions and the items are written."""
        return folder / f"{self.name}-interactions.csv", folder / f"{self.name}-items.csv"

    def write(self, folder: Path) -> None:
        """Writes the two tables."""
        folder.mkdir(parents=True, exist_ok=True)
        for table, path in zip(_tables(self.name, self.users, self.events), self.files(folder), strict=True):
            table.write_csv(path)


def _tables(name: str, users: int, events: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Interactions and items of a world."""
    generator = np.random.default_rng([*name.encode()])
    themes = THEMES[name]
    words = [(theme, word) for theme, inside in themes.items() for word in inside]
    size = len(words) // len(themes)
    of_users = generator.integers(0, len(themes), users)
    places = np.empty((users, events), dtype=np.int64)
    places[:, 0] = generator.integers(0, size, users)
    for event in range(1, events):
        goes_on = generator.random(users) < 0.6
        elsewhere = generator.integers(0, size, users)
        places[:, event] = np.where(goes_on, (places[:, event - 1] + 1) % size, elsewhere)
    items = (of_users[:, None] * size + places).ravel()
    times = np.cumsum(generator.integers(SECONDS_A_DAY // 8, 4 * SECONDS_A_DAY, (users, events)), axis=1).ravel()
    log = pl.DataFrame(
        {
            "user_id": np.repeat([f"u{user:04d}" for user in range(users)], events),
            "item_id": [f"{name[0]}{item:02d}" for item in items],
            "timestamp": times,
        }
    )
    catalogue = pl.DataFrame(
        {
            "item_id": [f"{name[0]}{item:02d}" for item in range(len(words))],
            "title": [
                f"The {theme} {word.lower()} ({FIRST_YEAR + item})" for item, (theme, word) in enumerate(words)
            ],
            "theme": [theme for theme, _ in words],
        }
    )
    return log, catalogue
