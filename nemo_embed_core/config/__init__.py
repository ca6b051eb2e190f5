"""Every option of every launcher, a tree of frozen dataclasses: a file by launcher, texts below the fields.

No torch import here: arguments are refused in a tenth of a second, before anything heavy is loaded.
Modules receive values (`hidden_size=...`), never the tree.
"""

from nemo_embed_core.config.data import DataConfig, DatasetConfig, PrepareConfig
from nemo_embed_core.config.evaluate import EvaluateConfig
from nemo_embed_core.config.experiment import ExperimentConfig, JudgeConfig
from nemo_embed_core.config.held_out import EvalConfig, EvalDatasetConfig
from nemo_embed_core.config.lora import LoraConfig
from nemo_embed_core.config.mine import MineConfig, MineDatasetConfig, Selection, check_threshold
from nemo_embed_core.config.model import ModelConfig, ModelType, Pooling
from nemo_embed_core.config.pipeline import PipelineConfig
from nemo_embed_core.config.plan import ClusterConfig, LengthsConfig, PlanConfig
from nemo_embed_core.config.rope import RopeScaling
from nemo_embed_core.config.synthesize import (
    GenerateConfig,
    GeneratorConfig,
    SelfPairsConfig,
    SynthesizeConfig,
)
from nemo_embed_core.config.train import (
    CheckpointConfig,
    LossConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from nemo_embed_core.options import Options

LAUNCHERS: dict[str, type[Options]] = {
    "train": TrainConfig,
    "prepare": PrepareConfig,
    "mine": MineConfig,
    "evaluate": EvaluateConfig,
    "plan": PlanConfig,
    "experiment": ExperimentConfig,
    "synthesize": SynthesizeConfig,
    "pipeline": PipelineConfig,
}
