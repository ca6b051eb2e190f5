"""Training pairs out of a folder of documents, as dataset folders that training and evaluation take.

    python launch/synthesize.py --documents docs/ --output data/docs
    python launch/synthesize.py --config configs/synthesize.yaml

Without a model: titles, headings, summaries, questions and sentences become queries, and the texts that they
were taken out of their documents. output/test is of held-out documents.
"""

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import SynthesizeConfig
from nemo_embed_core.errors import user_errors


def main() -> None:
    with user_errors():
        config = load_config(SynthesizeConfig)
        # After the arguments are parsed, so that --help and typing errors answer at once.
        from nemo_embed_core.synthesize import write_self_pairs

        write_self_pairs(config)


if __name__ == "__main__":
    main()
