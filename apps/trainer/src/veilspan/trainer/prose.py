"""Paragraphs and lists of a privacy statement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Block:
    """A paragraph, or a list with its items.

    Args:
        text: The paragraph; empty for a list.
        items: The items; empty for a paragraph.
    """

    text: str = ""
    items: tuple[str, ...] = ()


def parse(markdown: str) -> list[Block]:
    """Split Markdown into paragraphs and dashed lists; nothing else is recognised."""
    blocks = []
    for part in filter(None, (part.strip() for part in markdown.split("\n\n"))):
        lines = part.split("\n")
        if all(line.startswith("- ") for line in lines):
            blocks.append(Block(items=tuple(line[2:] for line in lines)))
        else:
            blocks.append(Block(text=" ".join(lines)))
    return blocks
