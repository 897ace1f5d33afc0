"""Flags in, one frozen Config out.

Comes in: the words of a command line (and the YAML files that they name). Goes out: `Config`, a frozen dataclass with one
section per room, every default filled in, with a note for each derived value saying why. An unknown or contradictory word ends
the program with one line and status 2, before anything heavy is imported.

Must never know: torch, numpy, megatron, sglang, ray. A laptop reads a 256-GPU recipe in a fraction of a second.
"""

from slime.config.cluster import ClusterConfig, EngineConfig
from slime.config.config import SECTION_NAMES, Config, FlatArgs, view_for_call
from slime.config.engine_groups import EngineGroup, SglangModel
from slime.config.errors import ConfigError
from slime.config.eval_datasets import EvalDataset
from slime.config.flags import FrozenMap
from slime.config.loader import load, parse
from slime.config.model import ModelConfig, ParallelConfig
from slime.config.rollout import DataConfig, EvalConfig, RolloutConfig
from slime.config.run import DebugConfig, TrackingConfig
from slime.config.training import AlgorithmConfig, BatchConfig, CheckpointConfig, OptimizerConfig

__all__ = [
    "AlgorithmConfig", "BatchConfig", "CheckpointConfig", "ClusterConfig", "Config", "ConfigError", "DataConfig", "DebugConfig",
    "EngineConfig", "EngineGroup", "EvalConfig", "EvalDataset", "FlatArgs", "FrozenMap", "ModelConfig", "OptimizerConfig",
    "ParallelConfig", "RolloutConfig", "SECTION_NAMES", "SglangModel", "TrackingConfig", "load", "parse",
    "view_for_call",
]  # fmt: skip
