"""No flag in vain: what two whole tiny runs read of the config, in driver, actors and trainer ranks, by attribute access.

Every field is read there, or is spent before a run (tests/readers.py), or a flag that is off in both runs keeps it from being
read: GATES says which, and code that reads it by attribute access exists.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
from readers import FOR_PLUGINS, SPENT, accepted, read_by_attribute

from slime.config.config import section_of

pytestmark = pytest.mark.slow

GATES: Mapping[str, str] = {
    "enable_mtp_training": "model.mtp_loss_scaling_factor",
    "weight_decay_incr_style=linear": "optimizer.end_weight_decay",
    "use_precision_aware_optimizer": """optimizer.main_grads_dtype optimizer.main_params_dtype optimizer.exp_avg_dtype
        optimizer.exp_avg_sq_dtype""",
    "optimizer_cpu_offload": "optimizer.overlap_cpu_optimizer_d2h_h2d",
    "rollouts_done": """checkpoint.no_load_optim checkpoint.no_load_rng optimizer.override_opt_param_scheduler
        optimizer.use_checkpoint_opt_param_scheduler""",
    "num_rollout=null": "data.num_epoch",
    "use_dynamic_batch_size=false": "batch.micro_batch_size",
    "rm_type=remote_rm": "rollout.rm_url",
    "advantage_estimator=ppo": """algorithm.value_clip algorithm.gamma algorithm.lambd algorithm.num_critic_only_steps
        algorithm.critic_lr algorithm.critic_lr_warmup_iters algorithm.critic_load algorithm.critic_save algorithm.critic""",
    "overlong_buffer_len": "algorithm.overlong_penalty_factor",
    "use_rs": "algorithm.rs_level algorithm.rs_upper_bound algorithm.rs_lower_bound algorithm.rs_veto_threshold",
    "use_opsm": "algorithm.opsm_delta",
    "use_opd": "algorithm.opd_type algorithm.opd_kl_coef algorithm.opd_teacher_load algorithm.opd_teacher_ckpt_step",
    "update_weight_transport=disk": """engine.update_weight_mode engine.update_weight_disk_dir
        engine.update_weight_disk_keep_files engine.update_weight_delta_encoding engine.update_weight_delta_checksum
        engine.update_weight_local_checkpoint_dir""",
    "schedule=fully-async": "loop.max_weight_staleness loop.on_stale_group",
    "load_debug_rollout_data": "debug.load_debug_rollout_data_subsample",
    "ci_test": "debug.ci_disable_kl_checker debug.ci_train_rollout_logprob_abs_diff_threshold",
    "save_on_signal": "upkeep.save_on_signal_seconds",
    "use_wandb": """tracking.wandb_always_use_train_step tracking.wandb_dir tracking.wandb_group tracking.wandb_host
        tracking.wandb_key tracking.wandb_mode tracking.wandb_project tracking.wandb_random_suffix tracking.wandb_run_id
        tracking.wandb_team""",
    "snapshot_interval": "upkeep.snapshot_peer upkeep.snapshot_versions upkeep.max_trainer_restarts",
}
"""What opens the gate (a flag that is on, or has that value) -> section.field that are read behind it."""
GATED = {field: gate for gate, fields in GATES.items() for field in fields.split()}


def load(folder: Path) -> tuple[dict[str, set[str]], dict[str, list[object]]]:
    """(section.field -> modules that read it, field -> the values that it had), over all processes of all runs."""
    read: dict[str, set[str]] = defaultdict(set)
    values: dict[str, list[object]] = defaultdict(list)
    for row in (json.loads(line) for file in folder.rglob("*.jsonl") for line in file.read_text().splitlines()):
        if "read" in row:
            section, name, module = row["read"]
            read[f"{section}.{name}"].add(module)
        else:
            for name, value in row["fields"].items():
                values[name].append(value)
    return read, values


@pytest.fixture(scope="module")
def recorded(reads: Path) -> tuple[dict[str, set[str]], dict[str, list[object]]]:
    if missing := {"test_tiny_run", "test_tiny_qwen3"} - {folder.name for folder in reads.iterdir()}:
        pytest.skip(f"goes with the recorded runs of {' and '.join(sorted(missing))}, which this call did not make")
    return load(reads)


def test_every_field_is_read_by_a_run_or_named_with_what_keeps_it_from_being_read(recorded) -> None:
    read, _ = recorded
    rooms = {module.split(".")[1] for modules in read.values() for module in modules}
    assert {"train", "ray", "rollout", "training", "model", "engine"} <= rooms, "driver, actors and ranks were recorded"
    unread = set(accepted()) - read.keys()
    assert unread - SPENT - FOR_PLUGINS - GATED.keys() == set(), (
        "read by nobody: read them, refuse them, or say in GATES what opens the gate"
    )
    assert (SPENT | GATED.keys()) & read.keys() == set(), "these are read after all: take them from the table"
    assert GATED.keys() <= set(accepted())


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_was_shut_and_what_lies_behind_it_has_a_reader(recorded, gate: str) -> None:
    _, values = recorded
    flag, _, opens = gate.partition("=")
    assert flag in section_of() and values[flag]
    is_open = [value for value in values[flag] if (_text(value) == opens if opens else value)]
    assert is_open == [], "the runs had it"
    assert set(GATES[gate].split()) <= read_by_attribute()


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
