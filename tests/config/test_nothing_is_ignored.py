"""A flag that is accepted is read somewhere: an ignored setting is a wrong run that looks right."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from slime.config.command_line import SECTIONS
from slime.config.config import SECTION_NAMES

ROOT = Path(__file__).resolve().parents[2]

USED_UP_BY_CONFIG = {
    "offload", "train_backend", "distributed_backend",  # become or contradict other fields; notes say so
    "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank",  # virtual_pipeline_model_parallel_size
    "use_rotary_position_embeddings", "add_position_embedding", "position_embedding_type",  # one answer is left: rotary
    "rotary_percent", "rotary_base", "max_position_embeddings", "seq_length",  # checked, or in Megatron's fields
    "group_query_attention", "multi_latent_attention", "swiglu", "untie_embeddings_and_output_weights", "bf16",
    "post_self_attn_layernorm", "post_mlp_layernorm", "make_vocab_size_divisible_by", "vocab_size",
    "enable_mtp_training",  # mtp_num_layers
    "rollouts_done",  # Config.nothing_to_train
    "enable_experimental", "freeze_indexer",  # consents to what is on anyway; a note says so
    "accumulate_allreduce_grads_in_fp32", "use_distributed_optimizer",  # always on
    "num_steps_per_rollout",  # global_batch_size
    "sglang_config", "prefill_num_servers",  # groups
    "keep_old_actor",  # a note says why it changes nothing
    "critic", "critic_lr", "critic_lr_warmup_iters", "megatron_config_path",  # slime.config.roles
    "dump_details",  # save_debug_rollout_data
    "custom_config_path", "rollout_data_transport", "update_weight_mode", "update_weight_transport",  # one value is legal
    "eval_prompt_data", "eval_config", "eval_input_key", "eval_label_key", "eval_tool_key", "eval_temperature", "eval_top_p",
    "eval_top_k", "eval_max_response_len", "eval_max_prompt_len", "eval_min_new_tokens", "eval_max_context_len",  # datasets
}  # fmt: skip
"""Attributes whose meaning resolve() carries on, mostly into another field."""


def test_every_accepted_flag_is_read_outside_the_config():
    files = [*(ROOT / "slime").rglob("*.py"), *(ROOT / "slime_plugins").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    text = "\n".join(file.read_text() for file in files if "config" not in file.relative_to(ROOT).parts[:2])
    words = set(re.findall(r"\w+", text))
    words |= {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z0-9-]+)", text)}  # plugins are looked up by flag
    assert "rollout_batch_size" in words
    ignored = [
        f"{section}.{item.name}"
        for section, cls in SECTIONS.items()
        for item in dataclasses.fields(cls)
        if not item.metadata.get("flag", {}).get("later") and item.name not in words and item.name not in USED_UP_BY_CONFIG
    ]
    assert ignored == [], "implement these flags or refuse them with flag(..., later='what is missing')"


def test_no_room_reads_a_setting_that_does_not_exist():
    fields = {section: {item.name for item in dataclasses.fields(cls)} for section, cls in SECTIONS.items()}
    pattern = re.compile(rf"\bconfig\.({'|'.join(SECTION_NAMES)})\.(\w+)")
    wrong = [
        f"{file.relative_to(ROOT)}: config.{section}.{name}"
        for folder in ("slime", "slime_plugins", "tools")
        for file in (ROOT / folder).rglob("*.py")
        for section, name in pattern.findall(file.read_text())
        if name not in fields[section]
    ]
    assert wrong == []


def test_no_room_reads_a_missing_setting_through_a_short_name():
    """`rules = config.optimizer` ... `rules.lrr`: the attribute behind a local name is checked too."""
    properties = {section: {name for name in dir(cls) if not name.startswith("_")} for section, cls in SECTIONS.items()}
    fields = {
        section: {item.name for item in dataclasses.fields(cls)} | properties[section] for section, cls in SECTIONS.items()
    }
    wrong = []
    for folder in ("slime", "slime_plugins", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            for function in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)):
                wrong += [f"{file.relative_to(ROOT)}: {found}" for found in _missing_attributes(function, fields)]
    assert wrong == []


def _missing_attributes(function: ast.FunctionDef, fields: dict[str, set[str]]) -> list[str]:
    short: dict[str, str] = {}
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        target = node.targets[0]
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        values = node.value.elts if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) else [node.value]
        if len(names) == len(values):
            for name, value in zip(names, values, strict=True):
                match = re.fullmatch(r"(?:self\.)?_?config\.(\w+)", ast.unparse(value))
                if isinstance(name, ast.Name) and match and match.group(1) in fields:
                    short[name.id] = match.group(1)
    stored = [node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    short = {name: section for name, section in short.items() if stored.count(name) == 1}  # else it may be something else there
    return [
        f"{node.value.id}.{node.attr} (config.{short[node.value.id]})"
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in short
        if node.attr not in fields[short[node.value.id]]
    ]
