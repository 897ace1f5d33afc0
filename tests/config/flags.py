"""The shortest command line that is right, for tests to change."""

from __future__ import annotations

from slime.config import Config, ConfigError, parse
from slime.config.facts import Facts
from tests.words import strange_words

MODEL = ["--num-layers", "8", "--hidden-size", "128", "--num-attention-heads", "4", "--vocab-size", "320"]
MOE = ["--num-experts", "8", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "64"]
MINIMAL = [
    *MODEL, "--hf-checkpoint", "/models/x", "--colocate", "--actor-num-gpus-per-node", "2", "--prompt-data", "p.jsonl",
    "--rollout-batch-size", "4", "--n-samples-per-prompt", "2", "--num-rollout", "3",
    "--rm-type", "random", "--rollout-max-response-len", "64",
]  # fmt: skip

NOTHING = Facts()
"""A disk without checkpoints."""


def config_of(*more: str, facts: Facts = NOTHING, door: str = "train") -> Config:
    """MINIMAL plus `more`, which wins; what is said of it is in words that the documents have."""
    try:
        config = parse([*MINIMAL, *more], door=door, facts=facts)  # type: ignore[arg-type]
    except ConfigError as error:
        assert not (strange := strange_words(str(error))), (strange, str(error))
        raise
    assert not (strange := [(note, words) for note in config.notes if (words := strange_words(note))]), strange
    return config
