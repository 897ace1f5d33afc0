"""Data sets of the evaluation and when it comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slime.config.errors import ConfigError
from slime.config.eval_datasets import read_eval_datasets
from slime.config.rules.lengths import takes_rows

if TYPE_CHECKING:
    from slime.config.rules.book import Values


def evaluation(v: Values) -> None:
    try:
        v["datasets"], notes = read_eval_datasets(v)
    except ConfigError as error:
        v.mistakes.append(str(error))
        return
    v.notes += notes
    if v["datasets"]:
        v["eval_prompt_data"] = tuple(word for one in v["datasets"] for word in (one.name, one.path))
    v.require(v["eval_interval"] is None or v["datasets"], "--eval-interval needs --eval-prompt-data or --eval-config")
    v.require(
        v["num_rollout"] != 0 or v["datasets"], "--num-rollout 0 only evaluates; give --eval-prompt-data or --eval-config"
    )
    if v["eval_function_path"] is None:
        v.derive("eval_function_path", v["rollout_function_path"], "it defaults to --rollout-function-path")
    for one in v["datasets"]:
        takes_rows(v, f"evaluation {one.name}:", one.path)
    _files(v)
    if v["eval_reward_key"] is None and v["reward_key"] is not None:
        v.derive("eval_reward_key", v["reward_key"], "it defaults to --reward-key")


def _files(v: Values) -> None:
    """Every data set's file can be read, also of an evaluation far ahead; a function of the user's reads what it likes."""
    if v.door != "train" or not v["eval_function_path"].startswith("slime.rollout."):
        return
    for one in v["datasets"]:
        problem = v.facts.prompt_file_problem(one.path)
        v.require(not problem, f"evaluation {one.name}: {problem}")


def responses(v: Values) -> None:
    """Every request says how many tokens it may have at most; the engines would take all that their cache holds."""
    if v["debug_train_only"] or not v["rollout_function_path"].startswith("slime.rollout.sglang_rollout."):
        return
    _stops(v, "--rollout-stop", v["rollout_stop"], v["rollout_stop_token_ids"])
    if v["num_rollout"] != 0:
        v.require(
            v["rollout_max_response_len"] is not None,
            "how long may a response be? Nothing says; pass --rollout-max-response-len",
        )
    for one in v["datasets"]:
        v.require(
            one.max_response_len is not None,
            f"evaluation {one.name}: how long may a response be? Nothing says; pass --eval-max-response-len",
        )
        if (one.stop, one.stop_token_ids) != (v["rollout_stop"], v["rollout_stop_token_ids"]):
            _stops(v, f"evaluation {one.name}: stop", one.stop, one.stop_token_ids)
        least, most = one.min_new_tokens or 0, one.max_response_len
        v.require(
            most is None or least <= most,
            f"evaluation {one.name}: min_new_tokens {least} is above max_response_len {most}, which engines refuse; lower it",
        )


def _stops(v: Values, where: str, texts: Sequence[str] | None, tokens: Sequence[int] | None) -> None:
    """What ends a response can be said, and not by every response at once."""
    v.require(
        all(texts or ()), f"{where} has an empty text, which every response holds: each would end at its first token; remove it"
    )
    rows, beyond = v["vocab_size"], [token for token in tokens or () if v["vocab_size"] and token >= v["vocab_size"]]
    v.require(
        not beyond,
        f"{where}{'-' if where[0] == '-' else '_'}token{'-' if where[0] == '-' else '_'}ids "
        f"{' '.join(map(str, beyond))}: the vocabulary ends at {(rows or 0) - 1}; give tokens of it",
    )
