"""config.json of released models, for machines on which the checkpoint is not: enough of it to prove a layout.

A folder whose name is a model's (GLM-5.2, GLM-5.2-FP8) is taken for that release; the -FP8 name adds its block quantisation.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from slime.model.hf_config import HfConfig

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@lru_cache(maxsize=1)
def _stored() -> dict[str, dict]:
    return json.loads((Path(__file__).parent / "known_models.json").read_text())


def known_names() -> list[str]:
    return list(_stored())


def known_config(folder: str) -> HfConfig | None:
    """The stored config of the release that `folder` is named after; None for a name that is not stored."""
    name = Path(folder).name
    base = name.removesuffix("-FP8")
    if base not in _stored():
        return None
    raw = dict(_stored()[base])
    if name.endswith("-FP8"):
        raw["quantization_config"] = FP8
    return HfConfig(raw, f"the stored config of {name}")
