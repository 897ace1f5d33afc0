"""Who grades the samples, and what the grader needs of the flags."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from slime.config.graders import GRADERS, grader_facts, unknown_grader

if TYPE_CHECKING:
    from slime.config.rules.book import Values

GRADED_BY_US = ("slime.rollout.sglang_rollout.", "slime.rollout.fully_async_rollout.")
"""Rollout functions that ask the grader of the flags; a function of the user's may grade as it likes."""


def grading(v: Values) -> None:
    """The rollout's grader is named, and has the label, the key and the address that it asks for."""
    if v["debug_train_only"] or not v["rollout_function_path"].startswith(GRADED_BY_US):
        return
    own = v["custom_rm_path"] or v["custom_generate_function_path"]
    if v["num_rollout"] != 0:
        # Rows may each name their grader in their metadata.
        v.require(
            own or v["rm_type"] or "metadata_key" in v.given,
            f"nothing grades the samples; pass --rm-type ({', '.join(sorted(GRADERS))}) or --custom-rm-path, or --metadata-key "
            "where rows name their grader themselves",
        )
        _needs(v, v["rm_type"], "--rm-type", label=v["label_key"], key=v["reward_key"], key_flag="--reward-key")
    for one in v["datasets"]:
        said = one.rm_type or one.metadata_overrides.get("rm_type")
        name = said or v["rm_type"]
        v.require(
            own or one.custom_rm_path or one.custom_generate_function_path or name or "metadata_key" in v.given,
            f"evaluation {one.name}: nothing grades the samples; pass --rm-type or --custom-rm-path",
        )
        if own or one.custom_rm_path or one.custom_generate_function_path:
            continue
        v.require(
            said is None or grader_facts(str(said)),
            f"evaluation {one.name}: {unknown_grader(str(said)).removeprefix('--')}",
        )
        if said not in (None, v["rm_type"]):
            _needs(
                v,
                str(said),
                f"evaluation {one.name}: rm_type",
                label=one.label_key,
                key=v["eval_reward_key"],
                key_flag="--eval-reward-key",
            )


def _needs(v: Values, name: str | None, where: str, *, label: str | None, key: str | None, key_flag: str) -> None:
    facts = grader_facts(name) if name and not v["custom_rm_path"] else None
    if facts is None:
        return
    v.require(
        label is not None or not facts.needs_label or facts.label_in_metadata or v["custom_generate_function_path"],
        f"{where} {name} compares with a label, and --label-key names no column; give it",
    )
    if facts.reward_keys and not v["custom_reward_post_process_path"]:
        v.require(
            key in facts.reward_keys,
            f"{where} {name} gives a mapping with {' and '.join(facts.reward_keys)}, {key_flag} is {key or 'not given'}; pass "
            f"{key_flag} {facts.reward_keys[0]}",
        )
    if facts.name != "remote_rm":
        return
    if v.require(v["rm_url"], f"{where} remote_rm asks a server; give its address with --rm-url"):
        address(v)


def address(v: Values) -> None:
    """--rm-url, which is given, can be asked."""
    v.require(
        re.match(r"https?://[^/\s]+", v["rm_url"]) and _has_sound_port(v["rm_url"]),
        f"--rm-url {v['rm_url']} is no address of a server; write it as http://HOST:PORT/PATH",
    )


def _has_sound_port(url: str) -> bool:
    """No port, or one that there is."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False
