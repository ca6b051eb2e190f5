"""What is checked before the seconds that importing torch takes; imports no torch."""

from __future__ import annotations

from nemo_embed_core.checkpoint.hf_folder import find_folder, has_weights, open_folder
from nemo_embed_core.config import TrainConfig
from nemo_embed_core.data.tokenizer import load_tokenizer
from nemo_embed_core.model.spec import check_fp8
from nemo_embed_core.parallel.layout import check_layout, world_size_from_env


def check_early(config: TrainConfig) -> None:
    """What a config, a config.json and a tokenizer.json already tell, that is wrong; UserError.

    `prepare` checks the same again with everything that needs torch; the shape of a checkpoint of ours is
    read there.
    """
    model = None if config.init_from else config.model
    folder = find_folder(config.init_from)[0] if config.init_from else None
    if folder is not None and (has_weights(folder) or (folder / "config.json").is_file()):
        model = open_folder(folder).model
    check_layout(config.parallel, world_size_from_env(), model)
    if model is not None and config.precision == "fp8":
        check_fp8(model, config.parallel.tp_size)
    if model is not None and (tokenizer := config.tokenizer or folder):
        load_tokenizer(tokenizer).check_fits(model.vocab_size)
