"""Tokenise datasets once into the memory-mapped store that training opens.

    python launch/prepare.py --tokenizer DIR --data.datasets '[{path: train.jsonl, task: "Given a ..."}]'
    python launch/prepare.py --config configs/prepare.yaml
    python launch/prepare.py --data.datasets '[{path: beir/nq}]' --dataset data/nq
    python launch/prepare.py --data.datasets '[{path: train.jsonl}]' --check true
    python launch/prepare.py --config configs/prepare.yaml --inspect true --output nq.json --against beir/nq

Training does this by itself when the store is missing; run it beforehand on a cheap machine to check the data
and to keep accelerators from waiting. Bad rows end it with `path:line: what is wrong and what to change`,
exit code 2; --data.on_bad drop leaves them out, counted and listed. A command that was killed goes on when it
is given again. With --data.store DIGEST it checks a store that is there, without its sources.
"""

import time

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import PrepareConfig
from nemo_embed_core.errors import user_errors


def main() -> None:
    with user_errors():
        config = load_config(PrepareConfig)
        # After the arguments are parsed, so that --help and typing errors answer at once.
        from nemo_embed_core.data.build import open_store, with_store
        from nemo_embed_core.data.population import longest_draws
        from nemo_embed_core.data.prepare import check_datasets, write_datasets
        from nemo_embed_core.data.tokenizer import load_tokenizer

        start, data = time.perf_counter(), config.data
        if config.inspect:  # packs with torch, whose 190 MiB and seconds nothing else here needs
            from nemo_embed_core.data import inspect, inspect_page

            inspect.check(config.data, config.against, config.output)
        tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
        if config.check:
            check_datasets(data, tokenizer)
            return
        if config.dataset:
            data = write_datasets(data, config.dataset, tokenizer=tokenizer)
        if tokenizer is None:
            return
        store = open_store(with_store(data), tokenizer)
        store.verify()
        seconds = time.perf_counter() - start
        # For training's max_tokens and num_hard_negatives; the store is the same for any.
        tokens = longest_draws(store, config.data.num_hard_negatives, config.data.negatives)
        long = (tokens > config.data.max_tokens).nonzero()[0]
        if len(long):
            what, first = config.data.on_long_row, store.where(int(long[0]))
            most = f"data.max_tokens={config.data.max_tokens} tokens (first: {first})"
            print(f"WARNING: {len(long):,} rows can have more than {most}; training: data.on_long_row={what}")
        if config.inspect:
            inspect_page.present(inspect.inspect(data, tokenizer, store, config.against), config.output)
        print(f"verified in {seconds:.1f} s; largest token id {store.max_token_id}, digest {store.digest}")


if __name__ == "__main__":
    main()
