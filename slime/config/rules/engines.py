"""Models and groups of engines, and the sizes that each engine is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slime.config.engine_groups import groups_without_yaml, read_models
from slime.config.engine_sizes import RETIRED, EngineSizes, sizes_of_groups
from slime.config.errors import ConfigError

if TYPE_CHECKING:
    from slime.config.rules.book import Values


def groups(v: Values) -> None:
    """Models and groups of engines; their GPUs must add up."""
    if v["debug_train_only"]:
        v.notes.append("no engine is started (--debug-train-only)")
        return
    per_engine = v["rollout_num_gpus_per_engine"]
    v.require(
        v["sglang_config"] is None or v["prefill_num_servers"] is None,
        "--sglang-config and --prefill-num-servers exclude each other",
    )
    v.stop_if_wrong()
    if v["sglang_config"] is not None:
        _from_yaml(v, per_engine)
        return
    v.require(v["rollout_num_gpus"] is not None, "--rollout-num-gpus is needed without --colocate (0 starts the router alone)")
    v.stop_if_wrong()
    v["groups"] = groups_without_yaml(
        rollout_num_gpus=v["rollout_num_gpus"],
        gpus_per_engine=per_engine,
        prefill_num_servers=v["prefill_num_servers"],
        model_path=v["hf_checkpoint"],
    )


def _from_yaml(v: Values, per_engine: int) -> None:
    file = v["sglang_config"]
    models, notes = read_models(file, hf_checkpoint=v["hf_checkpoint"], default_gpus_per_engine=per_engine)
    v.notes += notes
    listed = [group for model in models for group in model.server_groups]
    total = sum(group.num_gpus for group in listed)
    if v["rollout_num_gpus"] is None:
        v.derive("rollout_num_gpus", total, f"the groups of {file} add up to it")
    v.require(
        total == v["rollout_num_gpus"],
        f"{file}: num_gpus of all groups is {' + '.join(str(group.num_gpus) for group in listed)} = {total}, but rollout has "
        f"{v['rollout_num_gpus']} GPUs"
        + (" (all training GPUs, because of --colocate)" if v["colocate"] and "rollout_num_gpus" not in v.given else "")
        + "; change num_gpus of a group, or the number of GPUs",
        holds=f"the groups take all {total} rollout GPUs",
        values=" + ".join(f"{group.num_gpus} {group.worker_type}" for group in listed),
    )
    trained = [model.name for model in models if model.update_weights]
    v.require(
        trained,
        f"{file}: update_weights is false for {', '.join(model.name for model in models)}, so no engine would get what is "
        "trained; leave the line out for one",
    )
    v.require(
        not trained or trained[0] == models[0].name,
        f"{file}: {models[0].name} stands first, so prompts would go to it, and {''.join(trained[:1])} is the model that is "
        "trained; write that first",
    )
    v.require(
        any(group.num_engines for group in listed),
        f"{file} has {'only placeholder groups' if listed else 'no groups'}, so nothing would answer; add a group with engines",
    )
    for model in models:
        kinds = {group.worker_type for group in model.server_groups}
        v.require(
            "regular" not in kinds or not kinds & {"prefill", "decode"},
            f"{file}: {model.name} mixes regular groups with prefill and decode groups, which one router cannot "
            "serve; keep one "
            "kind",
        )
    v["groups"] = models


def engines_of(v: Values) -> list[EngineSizes]:
    """Sizes of one engine of each group, as far as they have sizes."""
    return [sizes for sizes in _answers(v) if isinstance(sizes, EngineSizes)]


def _answers(v: Values) -> list[EngineSizes | ConfigError]:
    flags, per_node = v["sglang"], max(v["num_gpus_per_node"], 1)
    return list(sizes_of_groups(v["groups"], flags, gpus_per_node=per_node, hf_checkpoint=v["hf_checkpoint"]))


def trained_apart(v: Values) -> list[EngineSizes]:
    """Of the groups that take the trainer's weights, those with an engine on none of the trainer's GPUs."""
    trainer = v["actor_num_nodes"] * v["actor_num_gpus_per_node"] if v["colocate"] else 0
    found, end, answers = [], 0, iter(_answers(v))
    for model in v["groups"]:
        for group in model.server_groups:
            end += group.num_gpus
            answer = None if group.worker_type == "placeholder" else next(answers)
            last_begins = end - group.num_gpus_per_engine
            if isinstance(answer, EngineSizes) and model.update_weights and last_begins >= trainer:
                found.append(answer)
    return found


def sizes(v: Values) -> None:
    """Each group's engines are made of ranks that divide, and lie on whole nodes or inside one."""
    for switch in RETIRED.keys() & v["sglang"].keys():
        meant = ["ep_size of all ranks of an engine", *(f"{name} {value}" for name, value in RETIRED[switch].items())]
        v.notes.append(f"--sglang-{switch.replace('_', '-')} is read as {' and '.join(meant)}")
    for answer in _answers(v):
        if isinstance(answer, ConfigError):
            v.mistakes.append(str(answer))
        else:
            v.holds(
                f"{answer.where}: {answer.num_gpus} GPUs = TP {answer.tp} x PP {answer.pp}",
                f"attention DP {answer.dp}, EP {answer.ep}, {answer.num_nodes} nodes",
            )
    _nodes(v)


def _nodes(v: Values) -> None:
    offset, per_node = 0, max(v["num_gpus_per_node"], 1)
    for model in v["groups"]:
        for group in model.server_groups:
            if group.worker_type == "placeholder":
                offset += group.num_gpus
                continue
            gpus = group.num_gpus_per_engine
            for _ in range(group.num_engines):
                first, last = offset // per_node, (offset + gpus - 1) // per_node
                if gpus <= per_node and first != last:
                    v.mistakes.append(
                        f"{model.name} {group.worker_type}: an engine of {gpus} GPUs would lie on GPUs {offset} to "
                        f"{offset + gpus - 1}, across two nodes of {per_node}; choose sizes that divide {per_node}, "
                        "or order the "
                        "groups by size"
                    )
                    return
                if gpus > per_node and offset % per_node:
                    v.mistakes.append(
                        f"{model.name} {group.worker_type}: an engine over {gpus // per_node} nodes would begin at "
                        f"GPU {offset}, "
                        f"inside a node of {per_node}; put the groups of whole nodes first"
                    )
                    return
                offset += gpus
