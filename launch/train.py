"""Train an embedding model.

torchrun --nproc-per-node 8 launch/train.py --config configs/train-8b-stage1.yaml --output_dir runs/stage1
"""

from nemo_embed_core.config import TrainConfig, load_config, run_rank, user_errors


def main() -> None:
    config = load_config(TrainConfig)  # before torch is imported: a typo or a wrong layout costs a tenth of a second
    with user_errors():
        from nemo_embed_core.parallel.layout import check_layout, world_size_from_env

        check_layout(config.parallel, world_size_from_env(), None if config.init_from else config.model)
        from nemo_embed_core.parallel.mesh import distributed
        from nemo_embed_core.train.trainer import NON_FINITE_EXIT_CODE, NonFiniteError, Trainer, prepare

        prepared = prepare(config)
        with distributed(config.parallel, config.device, prepared.model) as mesh:
            try:
                Trainer(config, mesh, prepared).run()
            except NonFiniteError as error:
                if mesh.rank == 0:
                    print(f"error: {error}", flush=True)
                raise SystemExit(NON_FINITE_EXIT_CODE) from None


if __name__ == "__main__":
    run_rank(main)
