"""DemoConfig: size, text and training of an embedded model. The defaults are the product's; tests use small ones."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoConfig:
    """Everything that decides which embedded model is trained; a part of its cache key.

    n_files: how many of the standard library's files are read (None: all). held_out: fraction of the text's
    characters kept for test. steps, batch (sequences), length (tokens): the training; learning_rate is of the
    embedding and the gains (AdamW), matrix_rate of all other weights (Muon); second_limit: seconds above which
    a slow machine's schedule is shortened.
    """

    n_files: int | None = None
    held_out: float = 0.06
    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    steps: int = 700
    batch: int = 4
    length: int = 256
    learning_rate: float = 8e-3
    matrix_rate: float = 0.02
    warmup_steps: int = 30
    weight_decay: float = 0.1
    seed: int = 0
    second_limit: float = 360.0
