"""Training data where there is none, as dataset folders that training and evaluation take.

    python launch/synthesize.py --documents docs/ --output data/docs
    python launch/synthesize.py --config configs/synthesize-models.yaml --generate.budget 20

Without a model: titles, headings, summaries, questions and sentences become queries, and the texts that they
were taken out of their documents; output/test is of held-out documents. With generate.models: rows that
models write, out of nothing or for the documents. A command that was killed goes on when it is given again,
and asks for nothing twice that it has an answer of.
"""

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import SynthesizeConfig
from nemo_embed_core.errors import user_errors


def main() -> None:
    with user_errors():
        config = load_config(SynthesizeConfig)
        # After the arguments are parsed, so that --help and typing errors answer at once.
        if config.generate.models:
            from nemo_embed_core.synthesize.generate import generate

            generate(config)
        else:
            from nemo_embed_core.synthesize import write_self_pairs

            write_self_pairs(config)


if __name__ == "__main__":
    main()
