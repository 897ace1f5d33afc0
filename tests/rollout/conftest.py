"""Tokenizer folders, a prompt file, a running fake router, and the args that a rollout function gets."""

from __future__ import annotations

import json

import pytest
from rollout_helpers import FakeRouter, make_config, sum_in

from slime.config import Config


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> str:
    from tools.tiny_tokenizer import write_tokenizer

    folder = tmp_path_factory.mktemp("glm-tokenizer")
    write_tokenizer(folder, "glm", max_length=4096)
    return str(folder)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory) -> str:
    from tools.tiny_tokenizer import write_tokenizer

    folder = tmp_path_factory.mktemp("qwen-tokenizer")
    write_tokenizer(folder, "qwen", max_length=4096)
    return str(folder)


@pytest.fixture
def prompt_file(tmp_path) -> str:
    rows = [
        {"prompt": [{"role": "user", "content": f"What is the sum of {a} plus {b}?"}], "label": str(a + b)}
        for a in range(6)
        for b in range(5)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def router(tokenizer_folder):
    from slime.rollout.tokenizer import load_tokenizer

    fake = FakeRouter(load_tokenizer(tokenizer_folder))
    fake.answer = lambda text, payload: (f"\\boxed{{{sum_in(text)}}}<|endoftext|>", "stop")
    fake.start()
    yield fake
    fake.aborted.set()
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def rollout_config(tokenizer_folder, prompt_file, router):
    """(values) -> Config of a rollout of 4 prompts x 2 samples."""

    def build(**values) -> Config:
        defaults = {
            "hf_checkpoint": tokenizer_folder,
            "prompt_data": prompt_file,
            "input_key": "prompt",
            "label_key": "label",
            "apply_chat_template": True,
            "rollout_batch_size": 4,
            "n_samples_per_prompt": 2,
            "rollout_max_response_len": 8,
            "rm_type": "math",
            "over_sampling_batch_size": 4,
        }
        return make_config(**(defaults | values))

    return build


@pytest.fixture
def runtime_args(router):
    """Config -> the args that a rollout function gets."""

    def build(config: Config):
        return config.args.with_runtime(
            engine_token="t0ken", sglang_router_ip="127.0.0.1", sglang_router_port=router.server.server_port
        )

    return build


@pytest.fixture
def agent_rollout(rollout_config, runtime_args):
    """(generate function, **config values) -> (output, RolloutBatch) of a rollout of 4 prompts x 2 samples."""
    import agent_helpers

    from slime.rollout.plugins import load_plugins
    from slime.rollout.to_batch import make_rollout_batch

    def one(function, *, args_of_the_run=None, **values):
        agent_helpers.use(function)
        defaults = {"rollout_max_response_len": 256, "apply_chat_template": False, "sglang": {"tool_call_parser": "glm47"}}
        config = rollout_config(custom_generate_function_path=agent_helpers.GENERATE_PATH, **(defaults | values))
        args, plugins = runtime_args(config), load_plugins(config)
        args = args.with_runtime(**(args_of_the_run or {}))
        output = plugins.rollout(args, 0, plugins.data_source(args))
        return output, make_rollout_batch(output.samples, rollout_id=0, config=config)

    return one
