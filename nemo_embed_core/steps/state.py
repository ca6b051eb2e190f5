"""What of a plan lies on its disk: which steps are done, which are to do, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.steps.step import Step, closure
from nemo_embed_core.steps.verbs import HERE

DONE = "done.json"


def real(value: Any, output: Path) -> Any:
    """With the folder of the plan in place of HERE."""
    if isinstance(value, dict):
        return {key: real(item, output) for key, item in value.items()}
    if isinstance(value, list):
        return [real(item, output) for item in value]
    return str(output / value[len(HERE) :]) if isinstance(value, str) and value.startswith(HERE) else value


def place(step: Step, output: Path) -> Path:
    return Path(real(step.folder, output))


def is_done(step: Step, output: Path) -> bool:
    return (place(step, output) / DONE).is_file()


def is_there(step: Step, output: Path) -> bool:
    """Done, and its product was not deleted since."""
    return is_done(step, output) and Path(real(step.product, output)).exists()


def to_do(ends: Iterable[Step], output: Path) -> set[str]:
    """Digests of the steps that have to run for those of `ends` that are not done."""
    found: set[str] = set()

    def want(step: Step) -> None:
        if step.digest not in found and not is_there(step, output):
            found.add(step.digest)
            for needed in step.needs:
                want(needed)

    for step in ends:
        if not is_done(step, output):
            want(step)
    return found


def texts(step: Step) -> int | None:
    """That a step encodes at most: of training, queries and documents of all its steps."""
    options = step.options
    if step.verb.name != "train" or options["steps"] is None:
        return None
    return options["steps"] * options["global_batch_size"] * (2 + options["data"]["num_hard_negatives"])


def listed(plan: Sequence[Step], ends: Sequence[Step], output: Path) -> Iterator[str]:
    """What `ends` need of a plan's steps, and what it costs, as far as steps that are done tell it."""
    todo, used = to_do(ends, output), closure(ends)
    steps = [step for step in plan if step.digest in used]
    seconds, unknown = 0.0, list[str]()
    for step in steps:
        cost = seconds_of(step, plan, output)
        state = "done" if step.digest not in todo else "to do"
        size = "" if (n := texts(step)) is None else f"{n:,} texts"
        took = "" if cost is None else f"{cost:.0f} s"
        yield f"{state:6} {Path(step.folder).name:40} {step.verb.name:9} {size:>16} {took:>8}"
        if step.digest in todo:
            seconds += cost or 0
            unknown += [step.name] if cost is None else []
    names = ", ".join(dict.fromkeys(unknown))
    rest = f"; of {names} nothing is known yet: run one cell (--only)" if unknown else ""
    yield f"{len(todo)} of {len(steps)} steps to do, about {seconds / 60:.0f} minutes one after another{rest}"


def seconds_of(step: Step, steps: Sequence[Step], output: Path) -> float | None:
    """As it took; else the mean of the done steps of its name, in proportion to the texts."""
    if is_done(step, output):
        return read_object(place(step, output) / DONE)["seconds"]
    own = texts(step)
    took = [
        read_object(place(other, output) / DONE)["seconds"] * ((own or 1) / (texts(other) or 1))
        for other in steps
        if other.name == step.name and is_done(other, output)
    ]
    return sum(took) / len(took) if took else None
