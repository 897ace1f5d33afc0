"""What a contract is called with: a config, its args, samples, a router that answers."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from slime.config import Config
from slime.config.errors import load_yaml
from slime.types.sample import Sample, Status


@dataclass
class Stage:
    """Where a plugin is called: a config, its args, samples, and a router that answers."""

    make_config: Callable[..., Config]
    runtime_args: Callable[[Config], Any]
    router: Any
    group_rm: bool = False
    random_rewards: bool = False
    yaml: str | None = None

    def config(self, **values: Any) -> Config:
        """Of 4 prompts with 2 samples each."""
        said = load_yaml(self.yaml, flag="--contract-args") if self.yaml else {}
        assert isinstance(said, dict), f"--contract-args {self.yaml} is no mapping"
        own = {"custom": said.pop("custom", {}), **{name.replace("-", "_"): value for name, value in said.items()}}
        return self.make_config(rollout_max_response_len=64, **{**own, **values})

    def args(self, config: Config | None = None) -> Any:
        """As one call of a plugin gets them."""
        return self.runtime_args(config or self.config()).for_call()

    def sample(self, response: str = "\\boxed{4}", *, index: int = 0, label: str = "4", reward: Any = None) -> Sample:
        """A finished one."""
        prompt = "What is the sum of 2 plus 2?"
        ids = self.router.tokenizer.encode(prompt, add_special_tokens=False)
        sample = Sample(prompt=prompt, tokens=list(ids), index=index, group_index=index // 2, label=label, reward=reward)
        new = self.router.tokenizer.encode(response, add_special_tokens=False)
        if new:
            sample.append_response_tokens(tokens=new, log_probs=[-0.5] * len(new), text=response)
        sample.status = Status.COMPLETED
        return sample

    def pending(self, *, index: int = 0) -> Sample:
        sample = self.sample("", index=index)
        sample.tokens, sample.status = [], Status.PENDING
        return sample

    def group(self, rewards: list[float], *, of: int = 0) -> list[Sample]:
        return [self.sample(index=2 * of + number, reward=reward) for number, reward in enumerate(rewards)]


Promise = Callable[[Callable[..., Any], Stage], None]
"""(the loaded function, stage)."""


def attribute(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def within(seconds: float, call: Awaitable[Any]) -> Any:
    """What it gives; one that waits for ever is a broken promise."""

    async def bounded() -> Any:
        return await asyncio.wait_for(call, seconds)

    try:
        return asyncio.run(bounded())
    except TimeoutError:
        raise AssertionError(f"it has not answered within {seconds:g} s") from None


def unchanged(what: str, before: Any, after: Any) -> None:
    assert before == after, f"it changed {what} from {str(before)[:80]} to {str(after)[:80]}"


def tokens_of(samples: list[Sample]) -> list[list[int]]:
    return copy.deepcopy([list(sample.tokens) for sample in samples])
