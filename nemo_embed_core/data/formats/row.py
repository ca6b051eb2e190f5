"""What every format of training data is read as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One training row, texts as in the file, without instruction; line: of a BEIR folder in the qrels."""

    query: str
    pos: list[str]
    neg: list[str]
    path: str
    line: int
    lang: str = ""  # of the query, where the file says so: only reports group by it
    id: str = ""  # the row's own; of a BEIR folder the query's _id
    group: str = ""  # its class: documents of the same group are not negatives of each other
    pos_ids: Sequence[str] = ()  # of the documents, one per text where the file has them; "": not known
    neg_ids: Sequence[str] = ()
