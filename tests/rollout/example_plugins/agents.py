"""Two solvers and one who chooses: one prompt fans out into a sample per agent, weighted by how the whole ended.

Habits: settings are written into `args`, which is then copied deeply and written again; a function is named by a dotted path
and loaded; the sample itself hangs on `args`.
"""

import asyncio
import random
from copy import deepcopy

from slime.rollout.rm_hub import batched_async_rm
from slime.utils.http_utils import post
from slime.utils.misc import load_function
from slime.utils.processing_utils import load_tokenizer

SETTINGS = {"agents_function_path": "example_plugins.agents.solve_and_choose", "num_solvers": 2, "right_weight": 1.5}


async def generate(args, sample, sampling_params, evaluation=False):
    args.sampling_params = sampling_params
    args.tokenizer = load_tokenizer(args.hf_checkpoint, trust_remote_code=True)
    args.rollout_max_context_len = args.rollout_max_context_len or 512
    for key, value in SETTINGS.items():
        setattr(args, key, value)
    samples = await load_function(args.agents_function_path)(args, sample)
    for one in samples:
        one.rollout_id = sample.index
    random.shuffle(samples)
    return samples


async def ask(args, words, key):
    sample = deepcopy(args.sample)
    ids = args.tokenizer(words, add_special_tokens=False)["input_ids"]
    sample.prompt, sample.tokens = words, ids
    params = deepcopy(args.sampling_params)
    params["max_new_tokens"] = min(params["max_new_tokens"], args.rollout_max_context_len - len(ids))
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    output = await post(url, {"input_ids": ids, "sampling_params": params, "return_logprob": True})
    items = output["meta_info"]["output_token_logprobs"]
    sample.tokens = sample.tokens + [item[1] for item in items]
    sample.rollout_log_probs = [item[0] for item in items]
    sample.response_length += len(items)
    sample.response = output["text"]
    sample.status = sample.Status.COMPLETED
    args.results[key].append(sample)
    return output["text"]


async def solve_and_choose(args, sample):
    args = deepcopy(args)
    args.sample = sample
    args.results = {"solver": [], "chooser": []}
    answers = await asyncio.gather(*(ask(args, f"{sample.prompt} Solver {n}.", "solver") for n in range(args.num_solvers)))
    await ask(args, f"{sample.prompt} Choose: {' or '.join(answers)}", "chooser")
    everybody = args.results["solver"] + args.results["chooser"]
    for one, reward in zip(everybody, await batched_async_rm(args, everybody), strict=True):
        one.reward = reward
    if args.results["chooser"][0].reward == 1:
        for one in everybody:
            one.reward *= args.right_weight
    return everybody
