"""An agent of OpenAI's client against a real engine, for the engines' tests."""

from __future__ import annotations

from pathlib import Path

import openai
from engine.engines import TOKEN
from rollout.rollout_helpers import make_config

from slime.engine.client import EngineClient
from slime.rollout.agents.calls import Parsers, read_answer
from slime.rollout.agents.endpoint import serve_agent
from slime.rollout.generation import state_for
from slime.types.sample import Sample

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


async def three_turns(address) -> float:
    client = openai.AsyncOpenAI(base_url=address.base_url, api_key=address.api_key)
    messages = list(address.messages)
    for question in ("and then?", "and now?", ""):
        answer = await client.chat.completions.create(model="policy", messages=messages, tools=[ADD], max_tokens=9)
        messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": question}]
    return 1.0


async def trained_and_scored(checkpoint: Path, router_url: str, engine_url: str) -> tuple[Sample, list[float], list]:
    """(the sample of three turns, the engine's log-prob of each of its response tokens given all before, and what the engine
    read of a call as GLM's models write it and as Qwen's do)."""
    host, port = router_url.removeprefix("http://").split(":")
    config = make_config(hf_checkpoint=str(checkpoint), rollout_max_response_len=200, sglang={"tool_call_parser": "glm47"})
    args = config.args.with_runtime(sglang_router_ip=host, sglang_router_port=int(port), engine_token=TOKEN)
    state = state_for(args)
    sample = Sample(index=7, prompt=[{"role": "user", "content": "What is 2 plus 3?"}], session_id="s")
    [made] = await serve_agent(args, sample, state.sampling_params, three_turns)
    body = {"input_ids": made.tokens, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
    scored = (await EngineClient(engine_url, TOKEN).generate(body))["meta_info"]["input_token_logprobs"]
    texts = {
        "glm47": "So <tool_call>add<arg_key>a</arg_key><arg_value>2</arg_value></tool_call>",
        "qwen25": 'So\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>',
    }
    read = [await read_answer(text, [ADD], Parsers(name, None), state.client) for name, text in texts.items()]
    await state.client.close()
    return made, [item[0] for item in scored[-made.response_length :]], read
