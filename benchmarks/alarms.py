"""How often alarms sound where nothing is wrong, and how large a fault has to be that they do.

    python -m benchmarks.alarms [--sets 400] [--models DIR ... --data FOLDER] [--runs RUN ...]

Simulated: two models' nDCG@10 of 300 queries of 1, 5 and 14 languages (benchmarks/intervals.py), alike or one
language worse by 0.05, 0.1 and 0.2: the share of sets in which `degradation` sounds. --models: the spread of
512 documents of FOLDER, a BEIR folder, and of its queries. --runs: alarms of the steps in metrics.jsonl, told
anew.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.intervals import ndcg_differences
from nemo_embed_core.config import TrainConfig
from nemo_embed_core.evaluation.alarms import collapse, degradation, differences, spread

QUERIES, DRAWS = 300, 2000


def rate(languages: int, worse_by: float, sets: int) -> float:
    """Share of sets in which `degradation` names the first language; where nothing is worse, any."""
    spoken, sounded = [f"l{i % languages}" for i in range(QUERIES)], 0
    is_first = np.array(spoken) == "l0"
    for seed in range(sets):
        generator = np.random.default_rng([seed, languages])
        gained_n = ndcg_differences(generator, 1, QUERIES)[0] - worse_by * is_first
        found = differences(np.zeros(QUERIES), gained_n, None, "mean", spoken, DRAWS, [seed])
        named = [one for one in found if one["group"] == "l0"] if worse_by else found
        sounded += degradation(named, "the base") is not None
    return sounded / sets


def spreads(model: str, folder: str) -> dict[str, dict[str, float]]:
    from nemo_embed_core.config import DatasetConfig
    from nemo_embed_core.data.readers import read_beir
    from nemo_embed_core.encoders import open_encoder

    beir = read_beir(DatasetConfig(path=folder, split="dev"))
    encoder = open_encoder(model)
    found = {}
    for side, texts in (("queries", beir.queries), ("documents", beir.corpus)):
        step = max(1, len(texts) // 512)
        found[side] = spread(encoder.encode(list(islice(texts.values(), 0, 512 * step, step))))
    return found


def told(run: str) -> Counter[str]:
    """{kind: steps in which it sounds}, by the run's own metrics."""
    from nemo_embed_core.train.watch import Watch

    config = TrainConfig.from_yaml(Path(run) / "config.yaml")
    watch, found = Watch(config.global_batch_size, config.loss, lambda line: None), Counter[str]()
    for line in (Path(run) / "metrics.jsonl").read_text().splitlines():
        kinds = watch.recall([values := json.loads(line)])
        found.update(kinds if "loss" in values else ())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=400)
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--data", default="")
    parser.add_argument("--runs", nargs="*", default=[])
    options = parser.parse_args()
    worse = (0.0, 0.05, 0.1, 0.2)
    print("languages  worse by " + "".join(f"{by:>8g}" for by in worse))
    for languages in (1, 5, 14) if options.sets else ():
        rates = "".join(f"{rate(languages, by, options.sets):>8.1%}" for by in worse)
        print(f"{languages:>9}           {rates}")
    for model in options.models:
        for side, figures in spreads(model, options.data).items():
            shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"{model} {side}: {shown}: {'collapse' if collapse(figures, side) else 'no alarm'}")
    for run in options.runs:
        print(f"{run}: {dict(told(run)) or 'no alarm'}")


if __name__ == "__main__":
    main()
