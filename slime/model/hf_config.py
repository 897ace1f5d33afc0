"""Reading config.json of a checkpoint folder; what its fields mean is in slime.config.hf_config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slime.config.hf_config import HfConfig

__all__ = ["HfConfig", "as_hf_config", "read_hf_config"]


def read_hf_config(folder: str | Path) -> HfConfig:
    """config.json of a checkpoint folder. Raises ValueError when there is none or it is no JSON object."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json; --hf-checkpoint wants the folder of a Hugging Face checkpoint")
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as broken:
        raise ValueError(f"{path} is not valid JSON ({broken}); download it again") from broken
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is no JSON object but a {type(raw).__name__}; download it again")
    return HfConfig(raw, str(path))


def as_hf_config(config: Any) -> HfConfig:
    """From an HfConfig, a plain mapping or a transformers PretrainedConfig."""
    if isinstance(config, HfConfig):
        return config
    if isinstance(config, Mapping):
        return HfConfig(config)
    return HfConfig(config.to_dict(), type(config).__name__)
