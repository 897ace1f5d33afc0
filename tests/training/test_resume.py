"""Nothing is lost between two runs, and a damaged checkpoint says so."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import RankFailed, run_ranks
from tiny import config_for, plans, rollout, start

from slime.training.checkpoint import MANIFEST, PINNED, TRACKER, resolve, whole_iterations

pytestmark = pytest.mark.slow


def everything(trainer) -> dict[str, torch.Tensor]:
    """Weights, moments, step counts, learning rates and random streams."""
    state = {name: weight.clone() for name, weight in trainer.named_weights()}
    for part, optimizer in enumerate(trainer.optimizer.chained_optimizers):
        for number, values in enumerate(optimizer.optimizer.state.values()):
            state |= {f"{part}.{number}.{key}": torch.as_tensor(value).clone() for key, value in values.items()}
        for number, group in enumerate(optimizer.param_groups):
            state |= {
                f"{part}.lr{number}": torch.tensor(group["lr"]),
                f"{part}.wd{number}": torch.tensor(group["weight_decay"]),
            }
    state["schedule"] = torch.tensor(trainer.scheduler.num_steps)
    state["next random numbers"] = torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])
    return state


def run(rank: int, folder, changes: dict, num_rollouts: int, saves: bool) -> tuple:
    trainer = start(config_for(folder, **changes), load=False)
    loaded = trainer.load()
    reports = []
    for rollout_id in range(loaded.start_rollout_id, num_rollouts):
        batch = rollout(rollout_id)
        report = trainer.train(batch, plans(batch, trainer.config, trainer.ranks.world_size))
        reports.append(report.per_step)
        torch.rand(3), random.random(), np.random.rand(2)
        if saves:
            trainer.save(rollout_id, data_state={"sample_offset": 4 * (rollout_id + 1), "epoch": 0})
    return loaded, reports, everything(trainer)


LAYOUTS = {
    "one rank": (1, dict(params_dtype="fp32")),
    "one rank bf16": (1, dict(params_dtype="bf16")),
    "DP2": (2, dict(params_dtype="fp32")),
    "PP2": (2, dict(pipeline_model_parallel_size=2)),
    "GLM EP2": (2, dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_and_one_more_is_two_to_the_bit(qwen3, glm, tmp_path, layout):
    world, changes = LAYOUTS[layout]
    qwen3 = glm if "GLM" in layout else qwen3
    # Two steps per rollout, warm-up and decay: every part of the schedule is on the way.
    changes = changes | dict(global_batch_size=4, lr_decay_style="cosine", lr_warmup_iters=3, weight_decay=0.1)
    straight = run_ranks(world, run, qwen3, changes, 2, False)
    files = changes | dict(load=str(tmp_path / "run"), save=str(tmp_path / "run"))
    run_ranks(world, run, qwen3, files, 1, True)
    resumed = run_ranks(world, run, qwen3, files, 2, False)
    for (_, whole, end), (loaded, second, again) in zip(straight, resumed, strict=True):
        assert loaded.start_rollout_id == 1 and loaded.data_state == {"sample_offset": 4, "epoch": 0}
        assert loaded.train_steps == 2 and [step["train/step"] for steps in whole for step in steps] == [1, 2, 3, 4]
        assert whole[1] == second[0]
        assert end.keys() == again.keys()
        different = [key for key in end if not torch.equal(end[key], again[key])]
        assert not different, different


@pytest.fixture(scope="module")
def saved(qwen3, tmp_path_factory):
    """A run with the checkpoints of rollouts 0 and 1."""
    root = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(1, run, qwen3, dict(load=str(root), save=str(root)), 2, True)
    return root


def test_a_checkpoint_of_one_layout_continues_under_another(qwen3, saved):
    changes = dict(load=str(saved), ckpt_step=0)
    _, (alone,), end = run_ranks(1, run, qwen3, changes, 2, False)[0]
    for parallel, world in (
        (dict(pipeline_model_parallel_size=2), 2),
        (dict(tensor_model_parallel_size=2, sequence_parallel=True), 2),
    ):
        loaded, (other,), _ = run_ranks(world, run, qwen3, changes | parallel, 2, False)[0]
        assert loaded.start_rollout_id == 1
        for name, value in alone[0].items():
            assert other[0][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


DAMAGES = {
    "cut short": lambda folder: os.truncate(folder / "__0_0.distcp", 1000),
    "missing": lambda folder: (folder / "__0_1.distcp").unlink(),
    "one bit": lambda folder: flip(folder / "__0_0.distcp", 5000),
    "one bit of the metadata": lambda folder: flip(folder / ".metadata", 100),
    "the manifest": lambda folder: os.truncate(folder / MANIFEST, 200),
}
SAID = {
    "cut short": "__0_0.distcp has 1000 bytes instead of",
    "missing": "__0_1.distcp is missing",
    "one bit": "content of __0_0.distcp",
    "one bit of the metadata": "content of .metadata",
    "the manifest": f"{MANIFEST} is damaged",
}


def flip(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_one_to_use_instead(qwen3, saved, tmp_path, damage):
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    DAMAGES[damage](root / "iter_0000001")
    with pytest.raises(RankFailed) as told:
        run_ranks(1, run, qwen3, dict(load=str(root)), 3, False)
    assert "iter_0000001 is damaged" in str(told.value) and SAID[damage] in str(told.value)
    assert f"whole checkpoints in {root}: 0; to use one: --load {root} --ckpt-step 0" in str(told.value)
    # What the message says works.
    loaded = run_ranks(1, run, qwen3, dict(load=str(root), ckpt_step=0), 1, False)[0][0]
    assert loaded.start_rollout_id == 1


def test_a_checkpoint_that_is_recommended_has_been_compared(qwen3, saved, tmp_path):
    """One flipped bit leaves every size as it was: neither the damaged one nor another damaged one is advice."""
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    for name in ("iter_0000000", "iter_0000001"):
        flip(root / name / "__0_0.distcp", 3000)
    with pytest.raises(RankFailed, match=f"iter_0000001 is damaged: the content of .*; no other whole checkpoint is in {root}"):
        run_ranks(1, run, qwen3, dict(load=str(root)), 3, False)
    (root / TRACKER).unlink()
    with pytest.raises(ValueError, match=f"so none of them is in force; no whole checkpoint is in {root}"):
        resolve(config_for(qwen3, load=str(root)))


def test_the_newest_checkpoints_are_kept_and_the_pinned_ones(qwen3, tmp_path):
    root = tmp_path / "run"
    run_ranks(1, run, qwen3, dict(save=str(root)), 2, True)
    (root / "iter_0000000" / PINNED).touch()
    for manifest in root.glob(f"iter_*/{MANIFEST}"):  # by a machine whose clock was an hour ahead
        os.utime(manifest, (time.time() + 3600, time.time() + 3600))
    run_ranks(1, run, qwen3, dict(load=str(root), save=str(root), keep_checkpoints=2), 4, True)
    assert sorted(path.name for path in root.iterdir()) == [
        "iter_0000000", "iter_0000002", "iter_0000003", TRACKER
    ]  # fmt: skip
    # Back to 0, and on from there: what was saved last stays, whatever its number.
    run_ranks(1, run, qwen3, dict(load=str(root), ckpt_step=0, save=str(root), keep_checkpoints=1), 2, True)
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000000", "iter_0000001"]
    assert (root / TRACKER).read_text() == "1"


def test_a_damaged_reference_names_its_own_flags(qwen3, saved, tmp_path):
    root = tmp_path / "ref"
    shutil.copytree(saved, root)
    (root / "iter_0000001" / "common.pt").unlink()
    with pytest.raises(RankFailed, match=rf"common.pt is missing; .*: 0; to use one: --ref-load {root} --ref-ckpt-step 0"):
        run_ranks(1, run, qwen3, dict(ref_load=str(root)), 1, False)


def test_checkpoints_without_a_tracker_are_no_empty_folder(qwen3, saved, tmp_path):
    """Starting from the reference instead would, at its first save, put a new run on top of the old one."""
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    (root / TRACKER).unlink()
    with pytest.raises(ValueError, match=rf"no {TRACKER}, so none of them is in force; .*--load {root} --ckpt-step 1"):
        resolve(config_for(qwen3, load=str(root), ref_load=str(saved)))
    assert resolve(config_for(qwen3, load=str(root), ckpt_step=1)).folder.name == "iter_0000001"


@pytest.mark.parametrize("moment", ["between the renames", "before the tracker"])
def test_a_run_killed_while_it_publishes(qwen3, saved, tmp_path, monkeypatch, moment):
    """Iteration 1 is saved again; SIGKILL comes when its old folder is aside, or when only the tracker is missing."""
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    (root / TRACKER).write_text("0")
    renames = []
    published = Path.rename  # torch's writers use it too, for their metadata

    def rename(self, target):
        published(self, target)
        renames.extend([target] if "iter_" in target.name else [])
        if len(renames) == (1 if moment == "between the renames" else 2):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(RankFailed, match="exit code -9"):
        run_ranks(1, run, qwen3, dict(load=str(root), save=str(root)), 2, True)
    monkeypatch.undo()
    assert run_ranks(1, run, qwen3, dict(load=str(root)), 1, False)[0][0].start_rollout_id == 1
    if moment == "before the tracker":
        assert whole_iterations(root) == [0, 1]
        return
    (root / TRACKER).write_text("1")
    old, new = root / ".replaced_iter_0000001", root / "iter_0000001"
    with pytest.raises(ValueError, match=rf"iter_0000001, which does not exist; .*--ckpt-step 0; .*: mv {old} {new}"):
        resolve(config_for(qwen3, load=str(root)))
    old.rename(new)
    assert run_ranks(1, run, qwen3, dict(load=str(root)), 2, False)[0][0].start_rollout_id == 2


def test_a_tracker_without_its_folder_names_the_whole_checkpoints(qwen3, saved, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    (root / TRACKER).write_text("7")
    with pytest.raises(ValueError, match=r"iter_0000007, which does not exist; whole checkpoints in .*: 0, 1; .*--ckpt-step 1"):
        resolve(config_for(qwen3, load=str(root)))


@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_fills_up_during_a_save_leaves_the_previous_checkpoint_in_force(qwen3, tmp_path, world):
    root = tmp_path / "run"
    files = dict(load=str(root), save=str(root))
    run_ranks(world, run, qwen3, files, 1, True)

    def full(rank: int) -> str:
        trainer = start(config_for(qwen3, **files), load=False)
        trainer.load()
        # What a full disk does to a writer: the write fails half-way (EFBIG here, ENOSPC there).
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            trainer.save(1, data_state=None)
        except ValueError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return "saved"

    messages = run_ranks(world, full)
    assert all("saving iteration 1" in message and "full disk" in message for message in messages), messages
    assert f"the newest checkpoint stays {root / 'iter_0000000'}" in messages[-1]
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000000", TRACKER]
    assert run_ranks(world, run, qwen3, files, 1, False)[0][0].start_rollout_id == 1


def test_a_disk_without_room_is_told_before_anything_is_written(qwen3, tmp_path, monkeypatch):
    root = tmp_path / "run"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(RankFailed, match=r"it needs 0\.00. GB, \d\.\d{3} MB more than .* has free"):
        run_ranks(1, run, qwen3, dict(save=str(root)), 1, True)
    assert list(root.iterdir()) == []


def test_saving_the_same_iteration_again_replaces_it(qwen3, saved, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    before = (root / "iter_0000001" / MANIFEST).read_text()
    run_ranks(
        1, run, qwen3, dict(load=str(root), save=str(root), ckpt_step=0, lr=5e-3, override_opt_param_scheduler=True), 2, True
    )
    assert json.loads(before) != json.loads((root / "iter_0000001" / MANIFEST).read_text())
    assert whole_iterations(root) == [0, 1] and not list(root.glob(".*"))


def test_a_changed_schedule_is_refused_with_both_values(qwen3, saved):
    with pytest.raises(RankFailed, match=r"max_lr 0\.5 \(checkpoint: 0\.01\).*--override-opt-param-scheduler"):
        run_ranks(1, run, qwen3, dict(load=str(saved), lr=0.5), 3, False)


def test_where_weights_come_from(qwen3, saved, tmp_path):
    def of(**changes):
        source = resolve(config_for(qwen3, **changes))
        return source.kind, source.folder.name, source.resumes, source.start_rollout_id(changes.get("start_rollout_id"))

    nothing = tmp_path / "nothing yet"
    assert of(load=str(saved)) == ("megatron", "iter_0000001", True, 2)
    assert of(load=str(saved), ckpt_step=0) == ("megatron", "iter_0000000", True, 1)
    assert of(load=str(saved / "iter_0000000")) == ("megatron", "iter_0000000", True, 1)
    assert of(load=str(saved), finetune=True) == ("megatron", "iter_0000001", False, 0)
    assert of(load=str(saved), start_rollout_id=7) == ("megatron", "iter_0000001", True, 7)
    assert of(load=str(nothing), ref_load=str(saved)) == ("megatron", "iter_0000001", False, 0)
    assert of(load=str(nothing), ref_load=str(saved), ref_ckpt_step=0) == ("megatron", "iter_0000000", False, 0)
    assert of(load=str(qwen3), ref_load=str(saved)) == ("hf", qwen3.name, False, 0)
    assert of(load=str(nothing)) == ("hf", qwen3.name, False, 0)
    with pytest.raises(ValueError, match="--ref-load .* has neither"):
        of(load=str(nothing), ref_load=str(nothing))
