"""Items and histories as text. Strings only; tokens are `packing`'s business."""

from __future__ import annotations

SEPARATOR = "\n"


def item_texts(titles: list[str]) -> list[str]:
    r"""The text of each item: its title on one line, inner white space collapsed.

    A line break inside a title would read as the end of the title: CSFT ends every title with "\n".
    """
    return [" ".join(title.split()) for title in titles]
