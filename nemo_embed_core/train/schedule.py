"""The learning rate of each step: linear warm-up and linear decay."""

from nemo_embed_core.config import OptimConfig


def num_warmup_steps(steps: int, config: OptimConfig) -> int:
    """warmup_steps, or min(100, steps // 10) where it is left out."""
    return min(100, steps // 10) if config.warmup_steps is None else config.warmup_steps


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Of step 0, 1, ..., steps - 1: from lr / warmup_steps up to lr, then down to min_lr after the last."""
    warmup_steps = num_warmup_steps(steps, config)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    remaining = (steps - step) / max(1, steps - warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * remaining
