"""Training of bidirectional Llama embedding models: train, mine, merge, evaluate.

Nothing is imported here: `import nemo_embed_core` costs no torch, and `launch/*.py --help` stays instant.
"""

__version__ = "0.1.0"
