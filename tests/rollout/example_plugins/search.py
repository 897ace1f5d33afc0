"""Search in turns: tokens, mask and log-probs are kept in lists of the plugin's own and given to the sample at the end."""

import re

from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample

TURNS = 2
LIBRARY = {"sum": "Adding two numbers gives their sum."}


async def look_up(query: str) -> str:
    return LIBRARY.get(query, "nothing found")


async def generate(args, sample: Sample, sampling_params) -> Sample:
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt_ids = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    response, tokens, mask, log_probs = "", [], [], []
    for _ in range(TURNS):
        payload = {"input_ids": prompt_ids + tokens, "sampling_params": sampling_params, "return_logprob": True}
        output = await post(url, payload)
        new = output["meta_info"]["output_token_logprobs"]
        tokens += [token for _, token, _ in new]
        log_probs += [value for value, _, _ in new]
        mask += [1] * len(new)
        response += output["text"]
        asked = re.search(r"<search>(.*?)</search>", output["text"])
        if asked is None:
            break
        found = f"<information>{await look_up(asked[1])}</information>"
        ids = state.tokenizer(found, add_special_tokens=False)["input_ids"]
        tokens += ids
        log_probs += [0.0] * len(ids)
        mask += [0] * len(ids)
        response += found
    sample.tokens = prompt_ids + tokens
    sample.response_length = len(tokens)
    sample.response = response
    sample.loss_mask = mask
    sample.rollout_log_probs = log_probs
    match output["meta_info"]["finish_reason"]["type"]:
        case "length":
            sample.status = Sample.Status.TRUNCATED
        case "abort":
            sample.status = Sample.Status.ABORTED
        case "stop":
            sample.status = Sample.Status.COMPLETED
    return sample


async def reward(args, sample, **kwargs):
    return 0.2 + 0.8 * float(f"<answer>{sample.label}</answer>" in sample.response)
