"""A folder of documents to a model that is proven on documents that it has not seen, and one page about it.

    python launch/pipeline.py --documents docs --base models/base --output runs/mine
    python launch/pipeline.py --documents docs --base models/base --output runs/mine --dry_run true
    python launch/pipeline.py --config configs/pipeline-models.yaml

Pairs of the documents, or written for them by models; negatives mined with the base; training of all weights,
adapters or some layers, as fits this machine; a Hugging Face folder, scored on held-out documents beside its
base and BM25 and checked in what serves it. Every stage is one of the launchers, in a process of its own with
its options and its log beside what it makes; it is left where nothing that it reads has changed.
"""

import signal

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import PipelineConfig
from nemo_embed_core.errors import user_errors


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of a job's end: the same as Ctrl-C
    with user_errors():
        config = load_config(PipelineConfig)
        from nemo_embed_core.pipeline.run import run

        run(config)


if __name__ == "__main__":
    main()
