"""A save that is written beside training holds the moment it was asked for, or says why it could not be written."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import RankFailed, run_ranks
from tiny import config_for, plans, rollout, start
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from slime.model.dist_ckpt import TRACKER, read_tracker
from slime.model.dist_writer import FileSystemWriterAsync
from slime.training.checkpoint import whole_iterations

pytestmark = pytest.mark.slow

SAMPLES = dict(global_batch_size=8)


def trained(folder, **changes):
    """A trainer after rollout 0, so that moments and main parameters are not their first values."""
    trainer = start(config_for(folder, **SAMPLES, **changes))
    one_rollout(trainer, 0)
    return trainer


def one_rollout(trainer, rollout_id: int) -> None:
    batch = rollout(rollout_id)
    trainer.train(batch, plans(batch, trainer.config, trainer.ranks.world_size))


def writers(trainer) -> list[int]:
    return [process.pid for _, process, _ in trainer.pending_save._writing._writers]


def hold_writers(gate: Path) -> None:
    """Writers that this rank starts from now on write nothing until the file `gate` exists."""
    write = FileSystemWriterAsync.write_preloaded_data

    def held(*arguments, **named) -> None:
        while not gate.exists():
            time.sleep(0.005)
        write(*arguments, **named)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(held)


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = dcp.FileSystemReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


LAYOUTS = {
    "DP2 bf16": ("qwen3", dict(params_dtype="bf16")),
    "GLM EP2": ("glm", dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_holds_the_step_it_was_asked_for_although_training_goes_on(request, tmp_path, layout):
    model, changes = LAYOUTS[layout]
    folder = request.getfixturevalue(model)

    def run(rank: int) -> tuple:
        trainer = trained(folder, async_save=True, save=str(tmp_path / "beside"), **changes)
        object.__setattr__(trainer.config.checkpoint, "save", str(tmp_path / "waited"))
        trainer.save(0, data_state={"sample_offset": 4})
        trainer.finish_save()
        object.__setattr__(trainer.config.checkpoint, "save", str(tmp_path / "beside"))
        hold_writers(tmp_path / f"gate-{rank}")
        trainer.save(0, data_state={"sample_offset": 4})
        before = {name: weight.clone() for name, weight in trainer.named_weights()}
        for rollout_id in (1, 2):
            one_rollout(trainer, rollout_id)
        changed = sum(not torch.equal(before[name], weight) for name, weight in trainer.named_weights())
        meanwhile = read_tracker(tmp_path / "beside"), whole_iterations(tmp_path / "beside")
        (tmp_path / f"gate-{rank}").touch()
        while not trainer.pending_save.is_written():
            time.sleep(0.01)
        one_rollout(trainer, 3)  # a step puts it in force
        return changed, len(before), meanwhile, trainer.pending_save, read_tracker(tmp_path / "beside")

    for changed, count, meanwhile, pending, after in run_ranks(2, run):
        assert changed > 0.8 * count and meanwhile == (None, []) and pending is None and after == "0"
    waited, beside = (whole_tensors(tmp_path / name / "iter_0000000") for name in ("waited", "beside"))
    assert waited.keys() == beside.keys() and len([name for name in beside if "exp_avg_sq" in name]) > 10
    assert [name for name in waited if not torch.equal(waited[name], beside[name])] == []
    common = torch.load(tmp_path / "beside" / "iter_0000000" / "common.pt", weights_only=False)
    assert common["data_state"] == {"sample_offset": 4} and common["rollout_id"] == 0
    assert not list((tmp_path / "beside").glob(".*"))


def test_a_second_save_waits_for_the_first_and_both_can_be_continued(qwen3, tmp_path):
    root = tmp_path / "run"
    files = dict(load=str(root), save=str(root), async_save=True)

    def run(rank: int) -> list:
        trainer = trained(qwen3, **files)
        hold_writers(tmp_path / "gate")
        trainer.save(0, data_state={"sample_offset": 4})
        one_rollout(trainer, 1)
        seen = [read_tracker(root)]
        threading.Timer(0.5, (tmp_path / "gate").touch).start()
        trainer.save(1, data_state={"sample_offset": 8})
        seen.append(read_tracker(root))
        trainer.finish_save()
        trainer.finish_save()
        return [*seen, read_tracker(root)]

    assert run_ranks(1, run) == [[None, "0", "1"]]

    def resume(rank: int) -> tuple:
        loaded = start(config_for(qwen3, **SAMPLES, **files), load=False).load()
        return loaded.start_rollout_id, loaded.data_state

    assert whole_iterations(root) == [0, 1]
    assert run_ranks(1, resume) == [(2, {"sample_offset": 8})]


@pytest.mark.parametrize("reached", ["step", "save", "end"])
def test_a_disk_that_fills_up_beside_training_stops_every_rank_at_the_next(qwen3, tmp_path, reached):
    root = tmp_path / "run"

    def run(rank: int) -> tuple[str, bool]:
        trainer = trained(qwen3, save=str(root), async_save=True)
        trainer.save(0, data_state=None)
        trainer.finish_save()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        trainer.save(1, data_state=None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        while not trainer.pending_save.is_written():
            time.sleep(0.01)
        act = {"step": lambda: one_rollout(trainer, 2), "save": lambda: trainer.save(2, data_state=None)}
        try:
            act.get(reached, trainer.finish_save)()
        except ValueError as error:
            told = str(error)
        # Said once; a run that goes on saves again.
        trainer.save(3, data_state=None)
        trainer.finish_save()
        return told, read_tracker(root)

    (first, after), (second, _) = run_ranks(2, run)
    assert first == second and after == "3"
    assert "saving iteration 1" in first and "failed on rank 1 of 2" in first and "full disk" in first
    assert f"the newest checkpoint stays {root / 'iter_0000000'}" in first
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000000", "iter_0000003", TRACKER]


def test_a_writer_that_is_killed_is_told_and_nothing_is_published(qwen3, tmp_path):
    root = tmp_path / "run"

    def run(rank: int) -> None:
        trainer = trained(qwen3, save=str(root), async_save=True)
        hold_writers(tmp_path / "gate")
        trainer.save(0, data_state=None)
        os.kill(writers(trainer)[0], signal.SIGKILL)
        (tmp_path / "gate").touch()
        trainer.finish_save()

    with pytest.raises(RankFailed, match=r"__0_0.distcp ended with exit code -9 before .* there is no earlier checkpoint"):
        run_ranks(1, run)
    assert list(root.iterdir()) == []


def test_a_run_killed_while_a_save_is_written_resumes_from_the_one_before(qwen3, tmp_path):
    root = tmp_path / "run"
    files = dict(load=str(root), save=str(root), async_save=True)

    def run(rank: int) -> None:
        trainer = trained(qwen3, **files)
        trainer.save(0, data_state={"sample_offset": 4})
        one_rollout(trainer, 1)
        trainer.finish_save()
        hold_writers(tmp_path / "gate")
        trainer.save(1, data_state={"sample_offset": 8})
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankFailed, match="exit code -9"):
        run_ranks(1, run)
    assert len(list(root.glob(".saving_iter_0000001*"))) == 1 and read_tracker(root) == "0"

    def again(rank: int) -> tuple:
        trainer = start(config_for(qwen3, **SAMPLES, **files), load=False)
        loaded = trainer.load()
        one_rollout(trainer, 1)
        trainer.save(1, data_state={"sample_offset": 8})
        trainer.finish_save()
        return loaded.start_rollout_id, loaded.data_state

    assert run_ranks(1, again) == [(1, {"sample_offset": 4})]
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000000", "iter_0000001", TRACKER]


def test_writers_end_with_their_rank(qwen3, tmp_path):
    """Even stopped ones, and without the test harness's help: the rank is a child of this test's rank."""

    def run(rank: int) -> list[bool]:
        import multiprocessing

        from slime.model.dist_writer import Writing

        child_to_parent = multiprocessing.Pipe(duplex=False)

        def child() -> None:
            from types import SimpleNamespace

            hold = (str(tmp_path / "f.distcp"), "f.distcp", ([], []))
            # A bucket whose file is a named pipe that nobody reads: opening it blocks the writer.
            os.mkfifo(hold[0])
            request = SimpleNamespace(
                async_fn=SimpleNamespace(args=[[]]),
                async_fn_args=[0, [hold], None],
                preload_fn=lambda: [hold],
                finalize_fns=[],
            )
            writing = Writing(request, checksums=False)
            child_to_parent[1].send(writing._writers[0][1].pid)
            os.kill(os.getpid(), signal.SIGKILL)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        pid = child_to_parent[0].recv()
        process.join()
        for _ in range(500):
            if not _alive(pid):
                return [True]
            time.sleep(0.01)
        return [False]

    assert run_ranks(1, run) == [[True]]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
