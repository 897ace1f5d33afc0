"""GLM-4 (9B and 32B), the dense models with a norm behind attention and feed-forward too, by the name that recipes know:

--spec slime_plugins.models.glm4 get_glm_spec
"""

from __future__ import annotations

from typing import Any

from slime.model.hf_config import read_hf_config
from slime.model.spec import decoder_spec


def get_glm_spec(args: Any, config: Any, vp_stage: int | None) -> Any:
    """The layers of this stage, as they are built without --spec. Raises ValueError for a checkpoint of another family."""
    hf = read_hf_config(args.hf_checkpoint)
    if hf.model_type != "glm4":
        raise ValueError(
            f"--spec slime_plugins.models.glm4 get_glm_spec is for GLM-4 (model_type glm4), but {args.hf_checkpoint} is a "
            f"{hf.model_type}; leave --spec out, or for GLM-5 use slime_plugins.models.glm5.glm5 get_glm5_spec"
        )
    return decoder_spec(config, hf, contiguous_cp=args.allgather_cp, vp_stage=vp_stage)
