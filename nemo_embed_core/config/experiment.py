"""Options of launch/experiment.py, and of the judge of mined negatives that its grids may have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Options):
    """A grid of ordinary runs (train, mine, merge, evaluate) over several seeds, and one table of them with
    intervals. A command that was killed goes on when it is given again."""

    grid: str
    """YAML file of the experiment (docs/experiments.md): steps, axes, seeds, what is evaluated and
    compared."""
    output: str
    """Folder of all that it makes: steps/ with a folder for each run, results.json, .md and .png."""
    constants: dict[str, str] = field(default_factory=dict)
    """Values by name in place of the grid's own constants (--constants.base exports/model): a text where that
    is one, else as YAML reads it."""
    only: list[str] = field(default_factory=list)
    """Cells to run, by axis=value and seed=N (--only threshold=0.95 seed=1); the others are left to another
    call, which may run at the same time, and the table waits for them."""
    dry_run: bool = False
    """Whether the steps are only listed: which are done, which are to do, and what they cost."""
    jobs: int = 0
    """Steps that run at a time, each on GPUs of its own; 0: as many as the GPUs allow, one without a GPU."""
    ranks: int = 1
    """Data-parallel ranks of a step that trains or mines, under torchrun."""
    delete_models: bool = False
    """Whether weights are deleted as soon as no step that is left needs them; scores and logs stay, links and
    what a step was given by its path too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jobs < 0 or self.ranks < 1:
            raise UserError(f"jobs={self.jobs} must not be negative, ranks={self.ranks} must be at least 1")
        if bad := [item for item in self.only if not all(item.partition("="))]:
            raise UserError(f"only={bad[0]} must be AXIS=VALUE or seed=N")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(Options):
    """How many mined negatives are relevant after all, as labels or a cross-encoder say."""

    mined: str
    """What mining has written: JSON lines, or a dataset folder."""
    output: str
    """JSON file to write."""
    labels: str = ""
    """BEIR folder whose judgements know more than those that were mined with: a negative whose text it calls
    relevant to the query is one."""
    split: str = "test"
    """Split of these labels: qrels/{split}.tsv."""
    cross_encoder: str = ""
    """Folder of a sentence-transformers cross-encoder with one score: a negative that it scores at least as
    high as the lowest positive of its row is relevant."""
    max_rows: int = 0
    """Rows that are judged, the first of the file; 0: all."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the cross-encoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.labels) == bool(self.cross_encoder):
            raise UserError("give labels or cross_encoder: one of them says which negatives are relevant")
        if self.max_rows < 0:
            raise UserError(f"max_rows={self.max_rows} must not be negative; 0 judges all")
