"""The weight-name table of the DSA models, under slime's name for it: registered for `deepseek_v32` and `glm_moe_dsa`.

The two share one layout of tensors. Their indexers are stored rotary dimensions first, as in the checkpoint: nothing is
swapped.
"""

from __future__ import annotations

from slime.model.hf_config import as_hf_config
from slime.model.names import NameTable

MODEL_TYPES = ("deepseek_v32", "glm_moe_dsa")


def name_table(hf_config: object, *, with_mtp: bool = True) -> NameTable:
    """The table of a DSA model. Raises ValueError for any other model_type."""
    hf = as_hf_config(hf_config)
    if hf.model_type not in MODEL_TYPES:
        raise ValueError(f"{hf.source} is a {hf.model_type} model; this bridge is for {' and '.join(MODEL_TYPES)}")
    return NameTable.for_model(hf, with_mtp=with_mtp)


__all__ = ["MODEL_TYPES", "name_table"]
