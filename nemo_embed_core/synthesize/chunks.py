"""A document's texts of bounded length along its structure: blocks that go together, and sentences.

chunks(section, 1500) -> pieces of at most 1,500 characters that end where a block or else a sentence ends
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from nemo_embed_core.synthesize.structure import Section

# After these a full stop ends no sentence.
_SHORT = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|cf|vs|approx|fig|eq|sec|dr|mr|mrs|ms|prof|st|inc|ltd|dept|resp|al|z\.B|bzw|ca|Nr)"
    r"|\b[A-Z])\.$",
    re.I,
)
_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[^\W\d_a-zà-ÿ]|[\"'“‘(\[]*\d)|(?<=[。！？])")


def sentences(text: str) -> list[str]:
    """Sentences of one block, whose pieces in order are the text but for the spaces between them."""
    found, start = list[str](), 0
    for match in _END.finditer(text):
        before = text[start : match.start()].rstrip()
        if _SHORT.search(before[-12:]) and text[match.start() - 1 : match.start()] == ".":
            continue
        if piece := text[start : match.end()].strip():
            found.append(piece)
        start = match.end()
    return [*found, piece] if (piece := text[start:].strip()) else found


def chunks(section: Section, max_chars: int) -> list[list[str]]:
    """Blocks of each chunk: as many as fit, joined by a blank line; a block that alone does not fit is parted
    at ends of sentences, then of words, and characters where even a word is longer."""
    found, size = list[list[str]](), 0
    for block in section.blocks:
        for piece in _fitting(block, max_chars):
            if found and size + 2 + len(piece) <= max_chars:
                found[-1].append(piece)
                size += 2 + len(piece)
            else:
                found.append([piece])
                size = len(piece)
    return found


def _fitting(block: str, max_chars: int) -> Iterator[str]:
    held = ""
    for piece in sentences(block) if len(block) > max_chars else [block]:
        if held and len(held) + 1 + len(piece) > max_chars:
            yield held
            held = ""
        while len(piece) > max_chars:
            at = max(piece.rfind("\n", 1, max_chars), piece.rfind(" ", 1, max_chars))
            at = at if at > 0 else max_chars
            yield piece[:at].rstrip()
            piece = piece[at:].lstrip()
        held = f"{held} {piece}" if held else piece
    if held:
        yield held
