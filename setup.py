"""Package metadata. kernels/, csrc/ and launch/ reach the wheel through the symlinks in nemo_embed_core/
(docs/design.md)."""

import re
from pathlib import Path

from setuptools import setup

init = Path(__file__).parent / "nemo_embed_core" / "__init__.py"
version = re.search(r'__version__ = "(.+)"', init.read_text())
assert version is not None

setup(
    name="nemo_embed_core",
    version=version[1],
    description="Contrastive training of bidirectional text-embedding models: train, mine, merge, evaluate",
    license="Apache-2.0",
    python_requires=">=3.11",
    # By name, not by find_packages: kernels/ has no __init__.py and would be left out without a word.
    packages=[
        "nemo_embed_core",
        "nemo_embed_core.checkpoint",
        "nemo_embed_core.config",
        "nemo_embed_core.data",
        "nemo_embed_core.data.formats",
        "nemo_embed_core.demo",
        "nemo_embed_core.encoders",
        "nemo_embed_core.evaluation",
        "nemo_embed_core.experiments",
        "nemo_embed_core.export",
        "nemo_embed_core.export.remote",
        "nemo_embed_core.files",
        "nemo_embed_core.kernels",
        "nemo_embed_core.launch",
        "nemo_embed_core.loss",
        "nemo_embed_core.merge",
        "nemo_embed_core.mine",
        "nemo_embed_core.mine.search",
        "nemo_embed_core.model",
        "nemo_embed_core.parallel",
        "nemo_embed_core.pipeline",
        "nemo_embed_core.plan",
        "nemo_embed_core.steps",
        "nemo_embed_core.synthesize",
        "nemo_embed_core.train",
    ],
    package_data={"nemo_embed_core": ["py.typed", "csrc/*.cu", "csrc/*.cuh", "csrc/*.h", "csrc/*.cpp"]},
    entry_points={"console_scripts": ["nemo-embed = nemo_embed_core.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=2.0",
        "safetensors>=0.8",
        "tokenizers>=0.22",
        "transformers>=5.2,<6",  # first release whose LlamaModel reads is_causal from its config
        "jsonargparse[signatures]>=4.53,<5",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "pyarrow>=18",
    ],
    extras_require={
        "eval": ["mteb>=2.26,<3", "sentence-transformers>=6,<7"],
        "demo": ["sentencepiece>=0.2", "matplotlib>=3.9", "gguf>=0.17"],
        # The other trackers of report_to by their own names: wandb, mlflow, trackio.
        "log": ["tensorboard>=2.18"],
        "inspect": ["datasketch>=2,<3"],  # near-duplicates of prepare --inspect
        "synthesize": ["openai>=3,<4", "datasketch>=2,<3"],  # data that models write
        # Writes and runs the files of merge --format onnx and gguf; xllamacpp is llama.cpp's server.
        "serve": ["onnx>=1.19", "onnxscript>=0.5", "onnxruntime>=1.23", "gguf>=0.17", "xllamacpp>=2026.10"],
        # Faster attention; built against the installed torch: pip install --no-build-isolation.
        "flash": ["flash-attn>=2.8"],
        # Compiles csrc/ at first use; the number is torch.version.cuda's.
        "cupy": ["cupy-cuda13x>=14"],
        "dev": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "coverage>=7.10",
            "hypothesis>=6.150",
            "ruff>=0.17,<0.18",  # the next minor release formats differently
            "mypy>=2.4,<3",
            "import-linter>=2.16,<3",
            "types-PyYAML",
        ],
        # NVIDIA's apex is not on PyPI: the package of that name there is unrelated, so it is never a
        # dependency.
    },
)
