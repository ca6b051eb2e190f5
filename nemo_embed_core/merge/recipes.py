"""Which weights the sources get. No torch import: the launcher asks check_recipe() before it has any.

mean       1 / N each
weighted   as given, sum 1
slerp      sin((1 - t) v) / sin v and sin(t v) / sin v, per tensor, v the angle between the two sources
soup       the mean of the sources that a greedy search keeps, by a score of the averages
"""

from __future__ import annotations

import math
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from nemo_embed_core.errors import UserError

Method = Literal["average", "slerp", "soup"]
# Of a folder with a model; higher is better. A command line prints it on its last line, given {folder}.
Score = str | Callable[[Path], float]


def check_recipe(
    method: str, weights: Sequence[float] | None = None, t: float | None = None, evaluate: Score | None = None
) -> None:
    """UserError for options that do not go together."""
    if method not in get_args(Method):
        raise UserError(f"method={method!r} must be one of {', '.join(get_args(Method))}")
    if (t is not None) != (method == "slerp"):
        raise UserError("--method slerp and --t T belong together")
    if (evaluate is not None) != (method == "soup"):
        raise UserError("--method soup and --evaluate COMMAND belong together")
    if weights is not None and method != "average":
        raise UserError(f"--weights are of an average; --method {method} has its own")
    if isinstance(evaluate, str):
        if "{folder}" not in evaluate:
            raise UserError("--evaluate COMMAND has no {folder}, the place of the folder to score")
        try:
            shlex.split(evaluate)
        except ValueError as error:
            raise UserError(f"--evaluate {evaluate!r} is no command line: {error}") from None


def check_weights(weights: Sequence[float], num_sources: int) -> None:
    """UserError unless there is one for each source and abs(sum(weights) - 1) <= 1e-6."""
    if len(weights) != num_sources:
        found = f"{len(weights)} weights for {num_sources} sources"
        raise UserError(f"{found}; give one for each, in their order")
    total = sum(weights)
    if not abs(total - 1) <= 1e-6:  # infinity and NaN too
        raise UserError(f"the weights {list(weights)} sum to {total!r}; they must sum to 1 (within 1e-6)")


def slerp_weights(aa: float, bb: float, ab: float, t: float) -> tuple[tuple[float, float], bool]:
    """sin((1 - t) v) / sin v and sin(t v) / sin v for cos v = ab / sqrt(aa * bb); else (1 - t, t), True.

    Else: where a or b is zero, and where sin v < 1e-6: parallel tensors, whose slerp weights differ from
    (1 - t, t) by less than v^2 < 1e-12, and opposite ones, between which every way round is as short.
    """
    norm = math.sqrt(aa) * math.sqrt(bb)
    if norm > 0 and math.isfinite(norm) and math.isfinite(ab):
        angle = math.acos(max(-1.0, min(1.0, ab / norm)))
        if math.sin(angle) >= 1e-6:
            return (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)), False
    return (1 - t, t), True


def greedy_soup(
    names: Sequence[str], score: Callable[[Sequence[int]], float]
) -> tuple[list[int], list[dict[str, Any]]]:
    """S = [best]; for i in the others, best first: S += [i] if score(S + [i]) >= score(S).

    score([i, ...]): of the average of these sources, higher is better.  Returns (S, every score in the order
    of asking: {"sources", "members", "score", and of an addition "kept"}). Greedy soup of Wortsman et al.
    2022, arXiv:2203.05482.
    """
    decisions: list[dict[str, Any]] = []

    def scored(members: list[int]) -> float:
        value = score(members)
        decisions.append({"sources": [names[i] for i in members], "members": members, "score": value})
        return value

    own = [scored([i]) for i in range(len(names))]
    first, *others = sorted(range(len(names)), key=lambda i: -own[i])  # stable: of equal ones the first given
    kept, best = [first], own[first]
    for i in others:
        value = scored([*kept, i])
        decisions[-1]["kept"] = value >= best
        if value >= best:
            kept, best = [*kept, i], value
    return kept, decisions


def score_name(evaluate: Score) -> str:
    return evaluate if isinstance(evaluate, str) else getattr(evaluate, "__name__", type(evaluate).__name__)


def score_of(folder: Path, evaluate: Score, sources: str) -> float:
    """evaluate(folder); of a command line the number on the last line that it prints.

    UserError names `sources`, whose average the folder holds, where that is no finite number, which neither
    ranks nor stands in a report.
    """
    if not isinstance(evaluate, str):
        score = float(evaluate(folder))
        if not math.isfinite(score):
            raise UserError(f"evaluate={score_name(evaluate)} returned {score} for the average of {sources}")
        return score
    command = [word.replace("{folder}", str(folder)) for word in shlex.split(evaluate)]
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise UserError(f"--evaluate: {command[0]} does not start: {error}") from None
    last = run.stdout.strip().split("\n")[-1].strip()
    try:
        score = math.nan if run.returncode else float(last)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        failed = f"ended with code {run.returncode}"
        ended = failed if run.returncode else f"printed {last!r} on its last line, not a finite number"
        raise UserError(f"--evaluate {evaluate!r} {ended} for the average of {sources}")
    return score
