"""STS tables: two texts and score (or label), how similar they are. A row is a graded pair.

The contrastive loss takes pairs that belong together: those of a grade of at least the dataset's min_grade.
"""

from __future__ import annotations

from typing import Any

from nemo_embed_core.data.formats.row import Row, check_number
from nemo_embed_core.data.lines import check_text, short

NAME = "sts"
EXAMPLE = '{"sentence1": "...", "sentence2": "...", "score": 4.2}'
OPTIONAL: tuple[str, ...] = ()
COLUMNS = True
NUMBERS = ("score", "label")  # in CSV and TSV, where every cell is text
_OTHER = {"label", "labels", "label_text", "id", "idx", "lang"}


def sniff(fields: dict[str, Any]) -> bool:
    if "score" not in fields or isinstance(fields["score"], list):
        return False
    texts = [name for name in fields if name != "score"]
    is_pair = len(texts) == 2 and not _OTHER & set(texts) and all(isinstance(fields[n], str) for n in texts)
    return {"sentence1", "sentence2"} <= fields.keys() or is_pair


def row(fields: dict[str, Any], path: str, line: int) -> Row:
    numbers = [name for name in NUMBERS if name in fields]
    texts = [name for name in fields if name not in NUMBERS]
    if len(numbers) != 1 or len(texts) != 2:
        raise ValueError(
            f"columns {short(list(fields))}: an STS table has two texts and a score or label; ignore others"
        )
    query, pos = (check_text(fields[name], name) for name in texts)
    return Row(query, [pos], [], path, line, grade=check_number(fields[numbers[0]], numbers[0]))
