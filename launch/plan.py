"""What a training run would need and take on a cluster that need not be there.

    python launch/plan.py --train configs/train-8b-stage1.yaml --cluster.gpu H100 --cluster.nodes 8
    python launch/plan.py --config plan.yaml --store data-cache/DIGEST --output plan.json

Runs the training engine itself on pretended GPUs and process groups for every layout, and prints the best of
them: memory by component, wire by axis, disk, tokens/s, MFU and hours as intervals with what they assume,
what does not fit and why.
"""

import json
import sys
from pathlib import Path

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config.plan import PlanConfig
from nemo_embed_core.errors import user_errors


def main() -> None:
    with user_errors():
        config = load_config(PlanConfig)
        # After the arguments are parsed, so that --help and typing errors answer at once.
        from nemo_embed_core.files.durable import probe_file, write_atomically
        from nemo_embed_core.plan.plan import plan
        from nemo_embed_core.plan.report import report, to_json

        if config.output:
            probe_file(Path(config.output))
        found = plan(config, lambda line: print(line, file=sys.stderr, flush=True))
        print(report(found))
        if config.output:
            text = json.dumps(to_json(found), indent=1) + "\n"
            write_atomically(Path(config.output), text.encode())


if __name__ == "__main__":
    main()
