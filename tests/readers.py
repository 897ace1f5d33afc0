"""Who reads a field of the config, from the sources: attribute access on a section or on the view for plugins, never words."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

from slime.config.command_line import SECTIONS
from slime.config.eval_datasets import FROM_FLAGS
from slime.config.front_end import WHY
from slime.config.rules.effects import ONE_ANSWER

ROOT = Path(__file__).resolve().parents[1]
VIEWS = frozenset({"args", "_args"})
"""Names under which rooms hold the flat view."""
BEFORE_A_RUN = ("rehearse", "preflight")
SECTION_OF_CLASS = {cls.__name__: section for section, cls in SECTIONS.items()}

SPENT: frozenset[str] = frozenset(
    """cluster.offload cluster.distributed_backend cluster.train_backend evaluation.n_samples_per_eval_prompt
    parallel.num_layers_per_virtual_pipeline_stage parallel.num_virtual_stages_per_pipeline_rank
    model.vocab_size model.make_vocab_size_divisible_by model.position_embedding_type model.use_rotary_position_embeddings
    model.add_position_embedding model.rotary_base model.rotary_percent model.max_position_embeddings
    model.group_query_attention model.post_self_attn_layernorm model.post_mlp_layernorm model.enable_experimental
    model.freeze_indexer model.enable_mtp_training optimizer.use_distributed_optimizer
    optimizer.accumulate_allreduce_grads_in_fp32 data.rollout_data_transport batch.num_steps_per_rollout
    evaluation.eval_prompt_data evaluation.eval_config evaluation.eval_input_key evaluation.eval_label_key
    evaluation.eval_tool_key evaluation.eval_temperature evaluation.eval_top_p evaluation.eval_top_k
    evaluation.eval_max_response_len evaluation.eval_max_prompt_len evaluation.eval_min_new_tokens
    evaluation.eval_max_context_len algorithm.tis_clip algorithm.tis_clip_low
    algorithm.megatron_config_path engine.sglang_config engine.prefill_num_servers debug.custom_config_path
    batch.log_probs_max_tokens_per_gpu rollout.http_proxy
    rollout.use_distributed_post model.model_name
    model.use_rope_scaling model.rope_scaling_factor model.recompute_activations""".split()
) | {f"front_end.{name}" for name in WHY}
"""section.field that rules carry into other fields, compare with config.json or answer with a note: nothing is left to read."""
FOR_PLUGINS = frozenset({"parallel.world_size"})
"""Derived, under Megatron's name."""


def accepted() -> Iterator[str]:
    """section.field of every flag or derived value that this version takes."""
    for section, cls in SECTIONS.items():
        for item in dataclasses.fields(cls):
            if not item.metadata.get("flag", {}).get("later"):
                yield f"{section}.{item.name}"


@functools.cache
def read_by_attribute() -> frozenset[str]:
    """section.field that code of a run reads: `config.batch.x`, `rules.x` where rules is a section, `args.x`, and getattr
    and calls with a flag's name of those that hold dotted paths."""
    found: set[str] = set()
    for file in _sources():
        tree = ast.parse(file.read_text())
        short = _short_names(tree)
        for node in ast.walk(tree):
            for base, name in _accesses(node):
                last = base.rpartition(".")[2].lstrip("_")
                sections = SECTIONS if last in VIEWS else short.get(base, {last} & SECTIONS.keys())
                found |= {f"{section}.{name}" for section in sections if name in SECTIONS[section].__dataclass_fields__}
    return frozenset(found)


@functools.cache
def read_by_rules() -> frozenset[str]:
    """Fields whose value a rule (or reading flags) takes: v["x"], .get("x"), names of a loop; or that a note answers."""
    names = {name for fallbacks in FROM_FLAGS.values() for name in fallbacks} | set(ONE_ANSWER)
    for file in (ROOT / "slime" / "config").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            asked = None
            if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
                names |= {one.value for one in node.iter.elts if isinstance(one, ast.Constant)}
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                asked = node.slice
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
                asked = node.args[0]
            if isinstance(asked, ast.Constant) and isinstance(asked.value, str):
                names.add(asked.value)
    return frozenset(names)


def _sources() -> Iterator[Path]:
    for package in ("slime", "slime_plugins"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if file.relative_to(ROOT).parts[1] not in BEFORE_A_RUN:
                yield file


def _accesses(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(what is asked, attribute) of a read."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield ast.unparse(node.value), node.attr
    elif isinstance(node, ast.Call):
        words = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if ast.unparse(node.func) == "getattr" and words:
            yield ast.unparse(node.args[0]), words[0]
        for word in words:
            if word.startswith("--") and word.endswith("-path"):
                yield "args", word[2:].replace("-", "_")
    elif isinstance(node, ast.Dict):
        for key in node.keys:
            if isinstance(key, ast.Constant) and str(key.value).startswith("--") and str(key.value).endswith("-path"):
                yield "args", str(key.value)[2:].replace("-", "_")


def _short_names(tree: ast.AST) -> dict[str, set[str]]:
    """Names that stand for a section somewhere in the file: `rules = config.optimizer`, `engine: EngineConfig`,
    `self._rules = rules`."""
    short: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            for word in ast.unparse(node.annotation).strip("'\"").split(" | "):
                if word in SECTION_OF_CLASS:
                    short.setdefault(node.arg, set()).add(SECTION_OF_CLASS[word])
    for _ in range(2):  # a name of a name
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign):
                continue
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                if len(names) != len(values):
                    continue
                for name, value in zip(names, values, strict=True):
                    value = value.values[0] if isinstance(value, ast.BoolOp) else value
                    said = ast.unparse(value)
                    owner, _, last = said.rpartition(".")
                    if owner.endswith("config") and last in SECTIONS:
                        short.setdefault(ast.unparse(name), set()).add(last)
                    elif said in short:
                        short.setdefault(ast.unparse(name), set()).update(short[said])
    return short
