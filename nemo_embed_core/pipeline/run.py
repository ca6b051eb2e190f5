"""A pipeline run: everything checked, its stages run as steps, its page written.

run(config)        # output/steps/STAGE-DIGEST, output/model, output/report.html and report.json
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_embed_core.config import PipelineConfig
from nemo_embed_core.errors import failpoint
from nemo_embed_core.files.durable import link_atomically, probe
from nemo_embed_core.pipeline.checks import checked
from nemo_embed_core.pipeline.cost import cost
from nemo_embed_core.pipeline.stages import Setting, Stages, stages_of
from nemo_embed_core.steps.runner import Runner, shown
from nemo_embed_core.steps.state import place, to_do

Say = Callable[[str], None]
_print = functools.partial(print, flush=True)


def run(config: PipelineConfig, say: Say = _print) -> dict[str, Any] | None:
    """What report.json has; None of a dry run. UserError, before the first stage, for all that can be known
    to be wrong then, and of the first stage that fails."""
    output, digests = Path(config.output).absolute(), dict[str, str]()
    setting = checked(config)
    stages = stages_of(config, setting, output, digests)
    for line in opening(config, setting):
        say(line)
    if config.dry_run:
        for line in listed(config, setting, stages, output):
            say(line)
        return None
    probe(output)
    ranks = setting.machine.ranks
    if "written" in stages.steps:  # which tasks got rows is known behind it
        wanted = [stages.steps[name] for name in ("pairs", "written")]
        Runner(output, stages.all, wanted, wanted, say, ranks).run()
        stages = stages_of(config, setting, output, digests)
    todo = len(to_do(stages.all, output))
    say(f"{todo} of {len(stages.all)} stages to do, logs: {output / 'steps'}/STAGE-*/log.txt")
    Runner(output, stages.all, stages.all, stages.all, say, ranks).run()
    from nemo_embed_core.pipeline.page import write

    link_atomically(output / "model", place(stages.steps["export"], output) / "model")
    failpoint("pipeline", "report")
    return write(config, setting, stages, output, say)


# ------------------------------------------------------------------------------------------ said


def opening(config: PipelineConfig, setting: Setting) -> Iterator[str]:
    chosen, machine = setting.chosen, setting.machine
    how = {
        "full": "all weights are trained",
        "lora": f"adapters of rank {config.lora_rank} are trained",
        "layers": f"the first {chosen.layers} of {setting.model.num_hidden_layers} layers are trained",
    }[chosen.method]
    yield (
        f"{config.base} on {machine.words}: {how} (method={chosen.method}), micro-batches of "
        f"{chosen.max_tokens:,} tokens, recompute {chosen.recompute}: at most {chosen.needed / 1e9:.1f} of "
        f"{machine.memory / 1e9:.1f} GB"
    )


def listed(config: PipelineConfig, setting: Setting, stages: Stages, output: Path) -> Iterator[str]:
    """Each stage with its state, what it costs and its command."""
    todo, costs = to_do(stages.all, output), cost(config, setting, stages, output)
    for name, step in stages.steps.items():
        state = "to do" if step.digest in todo else "done"
        yield f"{state:6} {name:12} {costs[name].words}"
        yield f"       $ {shown(step, output, setting.machine.ranks)}"
    known = [costs[name] for name, step in stages.steps.items() if step.digest in todo]
    low, high = (sum(c.seconds[i] for c in known if c.seconds) for i in (0, 1))
    unknown = [name for name, step in stages.steps.items() if step.digest in todo and not costs[name].seconds]
    rest = f"; of {', '.join(unknown)} nothing is known yet" if unknown else ""
    yield f"{len(todo)} of {len(stages.all)} stages to do: {low / 60:.1f} to {high / 60:.1f} minutes{rest}"
