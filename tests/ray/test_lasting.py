"""A trainer whose rank is killed goes on from main memory: real Ray, real ranks over gloo, the same weights to the bit."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from by_hand import by_hand
from recording_engine import RecordingEngine

from slime.config.cluster import ClusterConfig, EngineConfig
from slime.config.upkeep import UpkeepConfig
from slime.ray.calls import ProcessLost
from slime.ray.destinations import Destinations, EngineTarget
from slime.ray.lasting import LastingTrainers, Restarts, make_trainers
from slime.ray.placement import place
from slime.ray.standstill import Patience
from slime.ray.train_group import TrainGroup
from slime.ray.weight_receivers import WeightReceiver, with_processes
from slime.weights.serving import Receiver

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]

# Rank 1 ends itself the first time that the step named in a file comes; the file is then gone.
STEP_HOOK = """
import os
import signal
from pathlib import Path

import torch.distributed as dist


def die(args, rollout_id, step_id, model, optimizer, scheduler):
    order = Path(args.save) / f"die-{rollout_id}-{step_id}"
    if dist.get_rank() == 1 and order.exists():
        if order.read_text() != "again":
            order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    hooks = tmp_path_factory.mktemp("hooks")
    (hooks / "dying_step.py").write_text(STEP_HOOK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{hooks}:{TESTS / 'training'}:{TESTS}:{TESTS.parent}")
        patch.syspath_prepend(str(TESTS / "training"))
        ray.init("local", num_cpus=6, num_gpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def placement(cluster):
    placement = place(num_trainer=2, num_engine=0, colocate=False)
    yield placement
    placement.remove()


def config_for(folder: Path, save: Path, **upkeep):
    import tiny

    save.mkdir(exist_ok=True)
    config = tiny.config_for(
        folder, pipeline_model_parallel_size=2, params_dtype="fp32", global_batch_size=4, lr_decay_style="cosine",
        lr_warmup_iters=3, save=str(save), custom_megatron_before_train_step_hook_path="dying_step.die",
    )  # fmt: skip
    config.upkeep = UpkeepConfig(**upkeep)
    config.cluster, config.trains = ClusterConfig(actor_num_gpus_per_node=2), True
    return config


@pytest.fixture(scope="module")
def model(cluster, tmp_path_factory):
    import tiny

    return tiny.qwen3(tmp_path_factory.mktemp("qwen3"))


def trained(config, placement, rollouts: int, *, between=lambda trainers, number: None) -> tuple:
    """(the trainers, what each rollout's steps told) after so many rollouts of two steps each."""
    trainers = make_trainers(config, placement, Patience())
    told = []
    trainers.start()
    trainers.load()
    for number in range(rollouts):
        told.append(train(trainers, config, number))
        between(trainers, number)
    return trainers, told


def train(trainers, config, number: int) -> list:
    import tiny

    batch = tiny.rollout(number)
    return trainers.train(ray.put(batch), tiny.plans(batch, config, 2)).per_step


def checkpoint(trainers, rollout_id: int) -> dict:
    from tools.drills.exact import tensors

    trainers.save(rollout_id, None)
    return tensors(Path(trainers._config.checkpoint.save) / f"iter_{rollout_id:07d}")


@pytest.fixture(scope="module")
def straight(model, placement, tmp_path_factory):
    """What four rollouts come to, of a trainer that nobody disturbs."""
    config = config_for(model, tmp_path_factory.mktemp("straight"))
    trainers, told = trained(config, placement, 4)
    assert isinstance(trainers, TrainGroup)
    trainers._config = config
    tensors = checkpoint(trainers, 3)
    trainers.stop_and_wait()
    return told, tensors


def test_a_killed_rank_costs_a_restart_from_memory_and_the_end_is_the_same_to_the_bit(
    model, placement, straight, tmp_path, caplog
):
    import torch

    told, tensors = straight
    config = config_for(model, tmp_path / "save", snapshot_interval=2, max_trainer_restarts=3)
    # In the second step of rollout 4, two rollouts behind the snapshot; then while nobody is asked anything.
    (tmp_path / "save" / "die-3-1").write_text("once")

    def kill_between(trainers, number):
        if number == 0:
            os.kill(trainers._group.processes["trainer rank 0"].pid, signal.SIGKILL)

    with caplog.at_level(logging.WARNING):
        trainers, again = trained(config, placement, 4, between=kill_between)
    assert isinstance(trainers, LastingTrainers)
    assert again == told
    same = checkpoint(trainers, 3)
    assert same.keys() == tensors.keys() and any("exp_avg" in name for name in tensors)
    assert [name for name in tensors if not torch.equal(tensors[name], same[name])] == []
    lines = [record.getMessage() for record in caplog.records if "runs again after" in record.getMessage()]
    assert re.search(r"from its snapshot of rollout 0: 1 rollout trained again; restart 1 of 3", lines[0])
    assert re.search(r"from its snapshot of rollout 2: 1 rollout trained again; restart 2 of 3", lines[1])
    causes = [r.getMessage().splitlines()[0] for r in caplog.records if "starting the trainer anew" in r.getMessage()]
    assert all("was killed by signal 9 (SIGKILL)" in cause and cause.endswith("while training") for cause in causes), causes
    # A step that kills its rank each time ends the run with the reason.
    (tmp_path / "save" / "die-4-1").write_text("again")
    with pytest.raises(RuntimeError, match="was killed by signal 9") as error:
        train(trainers, config, 4)
    assert str(error.value).endswith("it is the second loss while training rollout 5: starting the trainer anew does not help")
    (keeper,) = trainers._store._keepers.values()
    pid = ray.get(keeper.pid.remote())
    trainers.stop()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists(), "the memory goes with the keeper"


def destinations(engine: RecordingEngine, way: str, logs: Path) -> tuple[Destinations, list]:
    """(one engine of two ranks behind the trainer's two, what to end afterwards)"""
    target = EngineTarget("decode-0", engine.url, "secret", Receiver(0, (2, 3), 2))
    actors = []
    if way == "receivers":
        actors = [WeightReceiver.options(num_cpus=0).remote(f"receiver-{number}", 0, logs) for number in range(2)]
        target = replace(target, receivers=with_processes({"decode-0": actors})["decode-0"])
    else:
        target = replace(target, receiver=Receiver(0, (2,), 1))
    return Destinations((target,), (0,) * (2 + len(target.receiver.gpus))), actors


@by_hand("two minutes")
@pytest.mark.parametrize("way", ["nccl", "receivers"])
def test_a_rank_that_is_killed_amid_a_transfer_to_devices_of_their_own_is_replaced_and_all_is_sent_anew(
    model, placement, tmp_path, way
):
    """To engines that joined a broadcast (over gloo), and to receivers; each rank in turn, with a rollout between them."""
    config = config_for(model, tmp_path / "save", snapshot_interval=1, max_trainer_restarts=2)
    config.engine = EngineConfig(update_weight_transport=way, update_weight_buffer_size=20_000)
    trainers, _ = trained(config, placement, 1)
    engine = RecordingEngine()
    trainers.destinations, actors = destinations(engine, way, tmp_path)
    sent = []
    for number, victim in enumerate(("trainer rank 0", "trainer rank 1")):
        process = trainers._group.processes[victim]
        engine.then = lambda pid=process.pid: os.kill(pid, signal.SIGKILL)
        with pytest.raises(ProcessLost) as lost:
            trainers.stream(number)
        first = str(lost.value).splitlines()[0]
        assert first.startswith(f"{victim} ({process}) was killed by signal 9") and f"while sending weights v{number}" in first
        assert 2 <= len(engine.digests) < 6, "amid the transfer"
        engine.then = lambda: None
        assert trainers.can_recover(lost.value)
        trainers.recover(lost.value)
        for _ in range(2):  # by the new ranks, and once more with nobody disturbed
            engine.digests = []
            report = trainers.stream(number)
            assert report.lost == () and report.buckets > 6
            sent.append(engine.digests)
        engine.digests = []
        train(trainers, config, number + 1)
    assert sent[0] == sent[1] and sent[2] == sent[3] and len(sent[0]) == report.buckets
    assert sent[0] != sent[2], "the rollout between them changed the weights"
    trainers.stop()
    for actor in actors:
        ray.kill(actor)
    engine.close()


def test_restarts_are_counted_and_a_place_has_one():
    restarts, lost = Restarts(2), ProcessLost("trainer rank 1 was killed")
    restarts.allow(lost, "training rollout 3")
    with pytest.raises(RuntimeError, match="trainer rank 1 was killed\nit is the second loss while training rollout 3: "):
        restarts.allow(lost, "training rollout 3")
    restarts.allow(lost, "saving rollout 3")
    with pytest.raises(RuntimeError, match=r"the trainer was started anew 2 times before \(--max-trainer-restarts\)"):
        restarts.allow(lost, "training rollout 4")
