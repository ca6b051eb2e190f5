"""One training row, whatever format it was written in, and the checks of its fields.

Every format gives rows whose texts are the file's own: strings with content, valid Unicode, at least one
positive, and no positive among the negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_embed_core.data.lines import Findings, check_id, check_text, check_unicode, short, type_name


class Row(NamedTuple):
    """One training row, texts as in the file, without instruction; line: of a BEIR folder in the qrels, of a
    columnar file the row from 1."""

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
    prompt: str | None = None  # the row's own instruction, in place of the dataset's task; "": none
    grade: float | None = None  # of a graded pair (STS): how similar query and pos[0] are
    pos_scores: Sequence[float] = ()  # a teacher's, one per text, where the file has them
    neg_scores: Sequence[float] = ()


def text_list(value: Any, field: str) -> list[str]:
    """A list of texts; [] is one."""
    return [check_text(text, f"{field}[{i}]") for i, text in enumerate(check_list(value, field, "strings"))]


def check_list(value: Any, field: str, what: str, count: int | None = None) -> list[Any]:
    if not isinstance(value, list) or count not in (None, len(value)):
        got = f"{len(value)} entries" if isinstance(value, list) else type_name(value)
        want = f"a list of {what}" if count is None else f"a list of {count} {what} (one per text)"
        raise ValueError(f"field {field!r} must be {want}, got {got}")
    return value


FP32_MAX = (2 - 2**-23) * 2.0**127  # a store keeps scores and grades in fp32


def check_number(value: Any, field: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= FP32_MAX:
        most = f"; fp32 has room for {FP32_MAX:.4g}" if is_number and abs(value) > FP32_MAX else ""
        raise ValueError(f"{field} must be a finite number, got {short(value)}{most}")
    return float(value)


def check_scores(value: Any, field: str, count: int) -> list[float]:
    scores = check_list(value, field, "numbers", count)
    return [check_number(score, f"{field}[{i}]") for i, score in enumerate(scores)]


def check_string(value: Any, field: str, example: str) -> str:
    """A string, "" too, of valid Unicode."""
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be a string such as {example}, got {type_name(value)}")
    check_unicode(value, field)
    return value


def check_known(
    fields: dict[str, Any], known: Sequence[str], *, required: Sequence[str] = (), example: str = "",
    hints: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Every field is one that the format knows, as one that is passed over is a mistake that nobody sees; and
    every required one is there. For messages: example of a row, hints by an unknown field's name."""
    unknown = sorted(field for field in fields if field not in known)
    missing = [field for field in required if field not in fields]
    said = [hints[field] for field in unknown if hints and field in hints]
    for field in unknown:
        if (name := field.strip().lower()) in known and name not in fields:
            said.append(f"{short(field)} is called {name}")
    more = "".join(f"; {one}" for one in said)
    if unknown and missing:
        like = f"not a training row: it has {short(unknown)} and no {', '.join(missing)}"
        raise ValueError(f"{like}{f'; write rows like {example}' if example else ''}{more}")
    if unknown:
        raise ValueError(
            f"unknown fields {short(unknown)}: remove them, or name them in the dataset's ignore (known: "
            f"{', '.join(known)}){more}"
        )
    if missing:
        fix = f': write "{missing[0]}": [] when there are none' if missing[0].startswith("neg") else ""
        raise ValueError(f"field {missing[0]!r} is missing{fix}")


def check_disjoint(
    pos: Sequence[str], neg: Sequence[str], name: Callable[[str, int], str] = "{0}[{1}]".format
) -> None:
    """name("pos", i) is the field of pos[i], as the file calls it."""
    both = set(pos).intersection(neg)
    if both:
        i = next(i for i, text in enumerate(pos) if text in both)
        j = neg.index(pos[i])
        raise ValueError(
            f"{name('pos', i)} is also {name('neg', j)}: remove it from 'neg' (the loss would push the "
            "positive away)"
        )


def with_grades(rows: Iterable[Row], findings: Findings) -> Iterator[Row]:
    """Of a dataset whose rows keep their grade."""
    for row in rows:
        if row.grade is None:
            what = "a row without a grade, and the dataset's grades is set"
            findings.bad(Path(row.path), row.line, f"{what}: remove that option")
            return  # every other line would be as bad
        yield row


def positive(rows: Iterable[Row], min_grade: float | None, findings: Findings) -> Iterator[Row]:
    """Of graded pairs those that belong together."""
    found, row = False, None
    for row in rows:
        if (row.grade is None) != (min_grade is None):
            what, fix = "a row without a grade, and the dataset's min_grade is set", "remove that option"
            if row.grade is not None:
                what = f"a graded pair (grade {row.grade:g}), which the contrastive loss has no use for"
                fix = "set the dataset's min_grade to the grade from which pairs belong together, or its "
                fix += "grades and loss.cosent_weight"
            findings.bad(Path(row.path), row.line, f"{what}: {fix}")
            return  # every other line would be as bad
        if is_below(row, min_grade, findings):
            continue
        found = True
        yield row
    if row is not None and not found:
        assert min_grade is not None
        none_left(Path(row.path), row.line, min_grade, findings)


def is_below(row: Row, min_grade: float | None, findings: Findings) -> bool:
    """A graded pair that is left out, and noted."""
    if row.grade is None or min_grade is None or row.grade >= min_grade:
        return False
    findings.note(f"pairs with a grade below min_grade={min_grade:g}, left out", Path(row.path), row.line)
    return True


def none_left(path: Path, line: int, min_grade: float, findings: Findings) -> None:
    """line: the last one."""
    findings.bad(path, line, f"no row is left: none has a grade of min_grade={min_grade:g} or more")


def optional_id(fields: dict[str, Any], field: str) -> str:
    return check_id(fields[field], field) if field in fields else ""
