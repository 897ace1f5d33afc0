"""Multi-turn generation with a tool: the model asks <calc>2+3</calc>, the environment answers, the loss sees the model alone.

Habits: the mask is a list of the plugin's own that append_response_tokens extends; requests go to the router by `post`; the
status of the last request decides; extra attributes on the sample tell the reward what happened.
"""

import re

from slime.rollout.rm_hub.math_dapo_utils import compute_score
from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample

MAX_TURNS = 3
CALL = re.compile(r"<calc>(\d+)\+(\d+)</calc>")


async def generate(args, sample: Sample, sampling_params) -> Sample:
    assert not args.partial_rollout
    sample.rollout_log_probs, sample.response, sample.response_length = None, "", 0
    sample.loss_mask = []
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt_ids = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    sample.tokens = list(prompt_ids)
    masks, response_ids, text = sample.loss_mask, [], ""
    sample.num_calls = 0
    for _ in range(MAX_TURNS):
        params = dict(sampling_params, max_new_tokens=sampling_params["max_new_tokens"] - len(response_ids))
        output = await post(url, {"input_ids": prompt_ids + response_ids, "sampling_params": params, "return_logprob": True})
        meta = output["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            sample.status = Sample.Status.ABORTED
            return sample
        ids = [item[1] for item in meta["output_token_logprobs"]]
        log_probs = [item[0] for item in meta["output_token_logprobs"]]
        response_ids += ids
        text += output["text"]
        sample.append_response_tokens(args, tokens=ids, log_probs=log_probs, trainable=True, meta_info=meta)
        call = CALL.search(output["text"])
        if call is None:
            break
        sample.num_calls += 1
        answer = f"<result>{int(call[1]) + int(call[2])}</result>"
        ids = state.tokenizer(answer, add_special_tokens=False)["input_ids"]
        response_ids += ids
        text += answer
        sample.append_response_tokens(args, tokens=ids, trainable=False)
    sample.tokens = prompt_ids + response_ids
    sample.response_length = len(response_ids)
    sample.response = text
    sample.loss_mask = masks
    return sample


async def reward(args, sample: Sample, **kwargs):
    result = compute_score(sample.response, str(sample.label), strict_box_verify=True)
    if result["score"] < 0:
        result["score"] = min(-0.6, result["score"] + 0.1 * sample.num_calls)
    return result
