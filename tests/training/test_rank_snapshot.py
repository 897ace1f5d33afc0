"""A rank's state in memory, written by one process and taken by another that was built anew, is the same to the bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ranks import RankFailed, run_ranks
from test_resume import everything
from tiny import config_for, plans, rollout, start, start_ppo

from slime.training import rank_snapshot
from slime.training.rank_snapshot import RankSnapshot

pytestmark = pytest.mark.slow

WARM = dict(global_batch_size=4, lr_decay_style="cosine", lr_warmup_iters=3, weight_decay=0.1)
LAYOUTS = {
    "one rank": (1, {}),
    "DP2 bf16": (2, dict(params_dtype="bf16")),
    "GLM EP2": (2, dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1)),
}


def begin(folder, changes):
    if changes.get("advantage_estimator") == "ppo":
        trainer = start_ppo(config_for(folder, **WARM | changes))
    else:
        trainer = start(config_for(folder, **WARM | changes), load=False)
    return trainer


def train(trainer, rollout_ids) -> list:
    told = []
    for rollout_id in rollout_ids:
        batch = rollout(rollout_id)
        told.append(trainer.train(batch, plans(batch, trainer.config, trainer.ranks.world_size)).per_step)
    return told


def state(trainer) -> dict[str, torch.Tensor]:
    found = everything(trainer)
    if trainer.critic is not None:
        found |= {f"critic {name}": value for name, value in everything(trainer.critic.trainer).items()}
    return found


def straight(rank: int, folder, memory: Path, changes: dict, before: int, after: int) -> tuple:
    trainer = begin(folder, changes)
    trainer.load()
    train(trainer, range(before))
    torch.rand(3)
    snapshot = RankSnapshot(trainer)
    file = memory / f"{rank}"
    file.write_bytes(bytes(snapshot.nbytes))
    snapshot.write(str(file))
    return train(trainer, range(before, after)), state(trainer)


def continued(rank: int, folder, memory: Path, changes: dict, before: int, after: int) -> tuple:
    trainer = begin(folder, changes)
    rank_snapshot.restore(trainer, str(memory / f"{rank}"))
    return train(trainer, range(before, after)), state(trainer)


def both(world, folder, memory, changes, before=1, after=2) -> None:
    memory.mkdir(exist_ok=True)
    whole = run_ranks(world, straight, folder, memory, changes, before, after)
    parts = run_ranks(world, continued, folder, memory, changes, before, after)
    for (told, end), (again, same) in zip(whole, parts, strict=True):
        assert told == again and told
        assert end.keys() == same.keys() and any("exp_avg" in name for name in end)
        assert [name for name in end if not torch.equal(end[name], same[name])] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_process_goes_on_to_the_bit(qwen3, glm, tmp_path, layout):
    world, changes = LAYOUTS[layout]
    both(world, glm if "GLM" in layout else qwen3, tmp_path / "memory", changes)


def test_before_the_first_step_there_are_weights_alone(qwen3, tmp_path):
    both(1, qwen3, tmp_path / "memory", {}, before=0, after=1)
    first = (tmp_path / "memory" / "0").stat().st_size
    both(1, qwen3, tmp_path / "memory", {})
    # float32 weights are their own main parameters; a step adds two moments of the same size.
    assert (tmp_path / "memory" / "0").stat().st_size == pytest.approx(3 * first, rel=0.1)


def measured(rank: int, folder) -> tuple[int, int, int]:
    trainer = start(config_for(folder, global_batch_size=8))
    train(trainer, [0])
    parameters = [parameter for chunk in trainer.model for parameter in chunk.parameters()]
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return RankSnapshot(trainer).nbytes, trained, sum(parameter.numel() for parameter in parameters) - trained


def test_its_size_is_the_predicted_one(glm_tiny):
    """12 bytes of each trained parameter, 4 of each frozen one (the indexers); index and random streams are 0.3% here."""
    ((found, trained, frozen),) = run_ranks(1, measured, glm_tiny)
    assert (trained, frozen) == (1_900_416, 599_040)
    assert found == pytest.approx(12 * trained + 4 * frozen, rel=0.005)


def test_the_critic_goes_on_too(qwen3, tmp_path):
    both(1, qwen3, tmp_path / "memory", dict(advantage_estimator="ppo"))


def spoilt(rank: int, folder, memory: Path) -> None:
    trainer = begin(folder, {})
    trainer.load()
    snapshot = RankSnapshot(trainer)
    (memory / "0").write_bytes(bytes(snapshot.nbytes))
    snapshot.write(str(memory / "0"))
    with open(memory / "0", "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    rank_snapshot.restore(begin(folder, {}), str(memory / "0"))


def test_weights_that_are_not_those_of_the_snapshot_are_refused(qwen3, tmp_path):
    with pytest.raises(RankFailed, match="rank 0: the weights made from a snapshot are not those that it was taken of"):
        run_ranks(1, spoilt, qwen3, tmp_path)
