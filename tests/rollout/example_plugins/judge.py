"""A reward that asks a model: the served one, through the router, with a sentence around the answer."""

import numpy as np

from slime.rollout.sglang_rollout import get_model_url
from slime.utils.http_utils import post


async def reward(args, sample, **kwargs):
    from slime.utils.processing_utils import load_tokenizer

    ids = load_tokenizer(args.hf_checkpoint).encode(f"Is this right? {sample.response}", add_special_tokens=False)
    payload = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
    output = await post(get_model_url(args, "judge", "/generate"), payload)
    return np.float32(output["text"].startswith("yes"))
