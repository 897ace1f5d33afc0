"""Real actors and real gloo ranks that are killed, stopped or wrong: who is named, with why, and that nobody waits for ever."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import ray

from slime.config.upkeep import UpkeepConfig
from slime.ray import calls, engine_nodes
from slime.ray.calls import gather
from slime.ray.cluster_watch import parts_here
from slime.ray.engine_nodes import EngineNode
from slime.ray.fates import Process, end, read_fate, stopped_below, this_process
from slime.ray.rollout_actor import RolloutSide
from slime.ray.standstill import Patience, missing
from slime.ray.witness import GroupState

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init("local", num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_rays_own_processes_are_found_by_their_session():
    found = parts_here(ray.get_runtime_context().get_session_name())
    titles = {name: Path(f"/proc/{pid}/comm").read_text().strip() for name, pid in found.items()}
    assert titles == {"Ray's control process (gcs_server)": "gcs_server", "Ray's raylet": "raylet"}
    assert parts_here("session_of_another") == {}


def stop(pid: int) -> None:
    """Until it stands still: a busy machine delivers a signal only when the process is due to run."""
    os.kill(pid, signal.SIGSTOP)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)


@ray.remote(num_cpus=0)
class Rank:
    """A rank as the trainer has it: a gloo group over a store that rank 0 serves."""

    def process(self) -> Process:
        import torch.distributed  # noqa: F401  a busy machine may take longer for it than ranks wait for each other

        return this_process()

    def open_store(self) -> int:
        import torch.distributed as dist

        self.store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        return self.store.port

    def join(self, rank: int, port: int) -> None:
        import torch.distributed as dist

        if rank:
            self.store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
        dist.init_process_group("gloo", store=self.store, rank=rank, world_size=2, timeout=timedelta(seconds=6))

    def reduce(self, rank: int, wrong: bool = False) -> None:
        import torch
        import torch.distributed as dist

        if wrong and rank == 1:
            raise ValueError("the gradient of rank 1 is not finite")
        for _ in range(10**6):
            dist.all_reduce(torch.ones(8))
            time.sleep(0.01)

    def miss_one(self, rank: int) -> None:
        """Three collectives together; rank 0 goes on to a fourth, to which rank 1 does not come."""
        import torch
        import torch.distributed as dist

        for _ in range(3):
            dist.all_reduce(torch.ones(8))
        if rank == 1:
            self.look_at_a_file()
        dist.all_reduce(torch.ones(8))

    def look_at_a_file(self) -> None:
        time.sleep(100)

    def keep_nothing(self) -> None:
        from types import SimpleNamespace

        from slime.rollout.sglang_rollout import Ledger, tell_drops

        args = SimpleNamespace(rollout_batch_size=4, max_drops_in_a_row=3, dynamic_sampling_filter_path="my.filter")
        tell_drops(args, 2, Ledger(in_a_row=3))

    def break_elsewhere(self) -> None:
        import torch

        torch.ones(2) @ torch.ones(3)


def test_a_sentence_of_our_own_comes_without_a_traceback_and_an_error_of_others_with_it():
    rank = Rank.remote()
    with pytest.raises(RuntimeError) as told:
        gather({"rollout": rank.keep_nothing.remote()}, doing="generating rollout 3")
    first, second = str(told.value).splitlines()
    assert first == "rollout failed while generating rollout 3:"
    assert second.startswith("rollout 3: 0 of 4 groups are kept so far, and none of the last 3 was")
    with pytest.raises(RuntimeError, match="Traceback|inconsistent tensor size") as told:
        gather({"rollout": rank.break_elsewhere.remote()}, doing="generating rollout 3")
    assert 'test_deaths.py", line' in str(told.value)


@ray.remote(num_cpus=0)
class Unmade:
    def __init__(self):
        raise KeyError("no such plugin")

    def start(self) -> None:
        pass


def test_an_actor_whose_constructor_raised_is_told_with_that_traceback():
    with pytest.raises(RuntimeError, match="rollout could not be made: (.|\n)*KeyError: 'no such plugin'") as told:
        gather({"rollout": Unmade.remote().start.remote()}, doing="loading plugins")
    assert 'test_deaths.py", line' in str(told.value)


@pytest.fixture
def ranks():
    actors = {f"trainer rank {rank}": Rank.remote() for rank in range(2)}
    processes = ray.get([actor.process.remote() for actor in actors.values()])
    port = ray.get(actors["trainer rank 0"].open_store.remote())
    ray.get([actor.join.remote(rank, port) for rank, actor in enumerate(actors.values())])
    yield actors, dict(zip(actors, processes, strict=True))
    end(dict(zip(actors, processes, strict=True)))


def told(actors, processes, **how) -> str:
    refs = {name: actor.reduce.remote(rank, **how) for rank, (name, actor) in enumerate(actors.items())}
    with pytest.raises(RuntimeError) as error:
        gather(refs, doing="training", processes=processes)
    return str(error.value)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_was_killed_is_named_with_its_signal_and_not_the_one_that_lost_it(ranks, victim):
    actors, processes = ranks
    name, other = f"trainer rank {victim}", f"trainer rank {1 - victim}"
    # A second before it dies both are in the collective; the other then reports a lost peer, at its own time.
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {processes[name].pid}"])
    message = told(actors, processes)
    first = message.splitlines()[0]
    assert first.startswith(f"{name} (pid {processes[name].pid} on ") and first.endswith(", while training")
    assert "was killed by signal 9 (SIGKILL)" in first and other not in first
    assert f"(it took others with it: {other})" in message


def test_a_rank_that_was_stopped_is_named_and_not_the_one_that_waited_for_it(ranks, monkeypatch):
    monkeypatch.setattr(calls, "_DEATH_SECONDS", 3.0)
    actors, processes = ranks
    victim = processes["trainer rank 1"]
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -STOP {victim.pid}"])
    message = told(actors, processes)
    assert message.startswith(f"trainer rank 1 (pid {victim.pid} on {victim.node_ip}) is stopped (SIGSTOP")
    assert "while training; trainer rank 0 waited for it:" in message
    # The run's end reaches it all the same.
    end(processes)
    deadline = time.monotonic() + 30
    while read_fate(victim) != "is gone" and "SIGKILL" not in str(read_fate(victim)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert read_fate(victim) == "is gone" or "was killed by signal 9" in read_fate(victim)


def test_a_rank_whose_own_code_failed_is_the_cause_whatever_happens_to_the_others(ranks):
    message = told(*ranks, wrong=True)
    assert message.startswith("trainer rank 1 failed while training:\nValueError: the gradient of rank 1 is not finite")


def test_a_stopped_rank_is_told_while_the_others_still_wait(ranks, monkeypatch, caplog):
    actors, processes = ranks
    victim = processes["trainer rank 1"]
    monkeypatch.setattr(calls, "_LOOK_SECONDS", 1.0)
    monkeypatch.setattr(calls, "_DEATH_SECONDS", 3.0)
    stop(victim.pid)
    told(actors, processes)
    (line,) = [record.getMessage() for record in caplog.records if " has lasted " in record.getMessage()]
    assert line.startswith(
        f"trainer rank 1 (pid {victim.pid} on {victim.node_ip}) is stopped (SIGSTOP, or a debugger; kill -CONT"
    )


def test_a_stopped_process_that_is_not_called_is_told_and_named_by_those_that_wait_for_it(ranks, monkeypatch, caplog):
    """As a receiver of weights is, which trainer ranks send to."""
    monkeypatch.setattr(calls, "_LOOK_SECONDS", 1.0)
    actors, processes = ranks
    victim = processes["trainer rank 1"]
    actors["trainer rank 1"].reduce.remote(1)
    stop(victim.pid)
    with pytest.raises(RuntimeError) as told:
        one = {"trainer rank 0": processes["trainer rank 0"]}
        call = {"trainer rank 0": actors["trainer rank 0"].reduce.remote(0)}
        gather(call, doing="sending weights v1", processes=one, beside={"receiver 1 of engine a": victim})
    stopped = f"receiver 1 of engine a (pid {victim.pid} on {victim.node_ip}) is stopped (SIGSTOP, or a debugger; kill -CONT"
    (line,) = [record.getMessage() for record in caplog.records if " has lasted " in record.getMessage()]
    assert line.startswith(stopped) and "; sending weights v1 has lasted " in line
    first = str(told.value).splitlines()[0]
    assert first.startswith(stopped) and first.endswith(", while sending weights v1; trainer rank 0 waited for it:")
    assert not isinstance(told.value, calls.ProcessLost), "new trainer ranks would wait for it too"
    with pytest.raises(calls.ProcessLost) as late:
        gather(
            {"receiver 1": actors["trainer rank 1"].process.remote()}, doing="x", processes={"receiver 1": victim}, timeout=1
        )
    assert str(late.value).startswith(stopped.replace(" of engine a", "")) and "did not answer within " in str(late.value)


def patience(processes, *, report: float, end: float | None) -> Patience:
    """Seconds, where the flags have minutes."""
    made = Patience(UpkeepConfig(hang_report_minutes=report / 60, hang_exit_minutes=end and end / 60))
    made.processes |= processes
    return made


def test_a_collective_to_which_a_rank_does_not_come_is_explained_and_ends_the_run(ranks):
    actors, processes = ranks
    refs = {name: actor.miss_one.remote(rank) for rank, (name, actor) in enumerate(actors.items())}
    with pytest.raises(RuntimeError) as error:
        gather(refs, doing="training", processes=processes, patience=patience(processes, report=3, end=3))
    first, *lines, last = str(error.value).splitlines()
    assert first.startswith("training has lasted 0.") and last.endswith("the run ends (--hang-exit-minutes)")
    told = {line.strip().split(" (pid")[0]: line for line in lines}
    assert re.search(
        r"rank 0 \(pid \d+ on [\d.]+\): all_reduce \(distributed_c10d.py:\d+\) < miss_one \(test_deaths.py:", lines[0]
    )
    assert "look_at_a_file (test_deaths.py:" in told["trainer rank 1"] and "all_reduce" not in told["trainer rank 1"]
    assert lines[-1].strip() == ("default_pg (ranks 0, 1): collective 4 has begun on trainer rank 0; trainer rank 1 is at 3")


def test_a_rank_that_is_stopped_is_explained_once_while_the_others_wait(ranks, monkeypatch, caplog):
    monkeypatch.setattr(calls, "_DEATH_SECONDS", 3.0)
    actors, processes = ranks
    victim = processes["trainer rank 1"]
    stop(victim.pid)
    refs = {name: actor.reduce.remote(rank) for rank, (name, actor) in enumerate(actors.items())}
    with pytest.raises(RuntimeError):  # gloo gives up after six seconds
        gather(refs, doing="training", processes=processes, patience=patience(processes, report=1, end=None))
    said = [record.getMessage() for record in caplog.records]
    (report,) = [line for line in said if "who is where" in line]
    (at_once,) = [line for line in said if "is stopped" in line and line != report]
    assert said.index(at_once) < said.index(report), "what is asked for the report may wait for a stopped process itself"
    assert int(re.search(r"; training has lasted (\d+) s$", at_once)[1]) >= 1
    assert f"trainer rank 1 (pid {victim.pid} on {victim.node_ip}): is stopped (SIGSTOP, or a debugger" in report
    assert "trainer rank 0 (pid " in report and "all_reduce (distributed_c10d.py:" in report


def test_a_call_with_a_limit_names_who_did_not_answer(ranks):
    actors, _ = ranks
    ref = actors["trainer rank 0"].reduce.remote(0)
    with pytest.raises(RuntimeError, match=r"engine a did not answer within \d s while starting again \(expected within 1 s\)"):
        gather({"engine a": ref}, doing="starting again", timeout=1)


# ------------------------------------------------------------------------------------------------------ engines' actors


@ray.remote(num_cpus=0, max_concurrency=4)
class Server:
    """What the fleet asks of an EngineActor, about a process that only sleeps."""

    def __init__(self):
        self.child = subprocess.Popen(["sleep", "1000"], start_new_session=True)

    def process(self) -> tuple[Process, int]:
        return this_process(), self.child.pid

    def obituary(self) -> str | None:
        return None if self.child.poll() is None else f"engine x was killed by signal {-self.child.returncode}"

    def condition(self) -> list[str]:
        return [f"engine x: {line}" for line in stopped_below(os.getpid())]

    def stop(self) -> None:
        self.child.kill()
        self.child.wait()


@pytest.fixture
def nodes(tmp_path):
    found = []
    for name in ("engine a", "engine b", "engine c"):
        actor = Server.remote()
        process, server = ray.get(actor.process.remote())
        log = tmp_path / f"{name[-1]}.log"
        log.write_text(f"{name} said this last\n")
        found.append((EngineNode(name, process.node_ip, actor, log, process=process), server))
    yield found
    for node, server in found:
        for pid in (node.process.pid, server):
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)


def test_an_engine_whose_actor_was_killed_is_dead_with_the_signal_and_its_last_words(nodes):
    (a, _), (b, server_of_b), _ = nodes
    os.kill(a.process.pid, signal.SIGKILL)
    os.kill(server_of_b, signal.SIGKILL)
    deadline, found = time.monotonic() + 60, {}
    while set(found) != {"engine a", "engine b"} and time.monotonic() < deadline:
        found = engine_nodes.deaths([node for node, _ in nodes])
    assert set(found) == {"engine a", "engine b"}, "engine c lives"
    assert found["engine a"].actor_is_lost and not found["engine a"].hangs
    why = found["engine a"].why
    assert why.startswith(f"engine a cannot be asked: its actor on {a.node_ip} was killed by signal 9 (SIGKILL)")
    assert why.endswith(f"its log {a.log_path} ends\n  engine a said this last")
    assert found["engine b"] == engine_nodes.Death("engine x was killed by signal 9")


def test_an_actor_that_does_not_answer_is_dead_and_out_of_reach_and_can_be_ended(nodes, monkeypatch, caplog):
    (a, _), *_ = nodes
    monkeypatch.setattr(engine_nodes, "_SOON_SECONDS", 1.0)
    monkeypatch.setattr(engine_nodes, "_ANSWER_SECONDS", 3.0)
    monkeypatch.setattr(engine_nodes, "_STOP_SECONDS", 3600.0)
    stop(a.process.pid)
    (death,) = engine_nodes.deaths([a]).values()
    assert death.actor_is_lost and death.hangs and "has not answered for 3 s" in death.why
    stopped = f"engine a: its actor ({a.process}) is stopped (SIGSTOP, or a debugger; kill -CONT {a.process.pid} there"
    assert [line.startswith(stopped) for line in caplog.messages] == [True], "told while it is waited for"
    monkeypatch.setattr(engine_nodes, "_ANSWER_SECONDS", 3600.0)
    assert set(engine_nodes.deaths([a], silent={"engine a"})) == {"engine a"}, "it is not waited for again"
    assert len(caplog.messages) == 1
    engine_nodes.stop([node for node, _ in nodes], silent={"engine a"})
    deadline = time.monotonic() + 60
    while read_fate(a.process) not in ("is gone",) and "signal 9" not in str(read_fate(a.process)):
        assert time.monotonic() < deadline, read_fate(a.process)
        time.sleep(0.1)


def test_a_report_names_the_stopped_actor_and_the_stopped_process_of_a_server(nodes):
    (a, _), (b, server_of_b), (c, _) = nodes
    known = [node for node, _ in nodes]
    assert engine_nodes.unwell(known, 10.0) == []
    stop(a.process.pid)
    stop(server_of_b)
    on_a = (
        f"engine a: its actor ({a.process}) is stopped (SIGSTOP, or a debugger; kill -CONT {a.process.pid} there lets it go on)"
    )
    on_b = f"engine x: its process {server_of_b} (sleep) is stopped (SIGSTOP, or a debugger; kill -CONT {server_of_b} there "
    first, second = engine_nodes.unwell(known, 10.0)
    assert first == on_a and second == f"{on_b}lets it go on)"


def test_a_machine_that_is_gone_is_named_and_ends_the_run(nodes):
    (a, _), *_ = nodes
    away = EngineNode("engine d", "203.0.113.9", a.actor, a.log_path, process=Process("203.0.113.9", 7))
    dead = {"engine d": engine_nodes.Death("its node is gone", True, True)}
    with pytest.raises(RuntimeError, match=r"node 203\.0\.113\.9 is gone, and with it engine d \(203\.0\.113\.9\)"):
        engine_nodes.refuse_lost_nodes({"engine a": a, "engine d": away}, dead)
    engine_nodes.refuse_lost_nodes({"engine a": a, "engine d": away}, {"engine a": engine_nodes.Death("killed")})


def test_a_rollout_actor_that_never_came_up_is_not_waited_for():
    """Its node was lost while Ray made it there: the run that ends for it has no server to ask after or to end."""
    side = RolloutSide(Server.options(num_gpus=1).remote(), Patience())  # there is no such node
    assert side.obituaries() == []
    side.stop()


# ------------------------------------------------------------------------------------------------------ who is behind


def test_who_has_not_come_to_which_collective_by_hand():
    """Two tensor-parallel pairs and the world of four. Rank 3 left its pair's collective 8 and waits in the world's 5th; rank
    2 is in the pair's 8th; ranks 0 and 1 are done with their pair's 8 and wait in the world's 5th. Nobody speaks for none."""

    def states(rank: int, world: int, pair: int) -> tuple[GroupState, GroupState]:
        first = rank - rank % 2
        own = GroupState(str(1 + rank // 2), "tensor-parallel", rank, (first, first + 1), pair)
        return GroupState("0", "default_pg", rank, (0, 1, 2, 3), world), own

    said = {f"r{rank}": states(rank, *counts) for rank, counts in enumerate([(5, 8), (5, 8), (4, 8), (5, 7)])}
    assert missing(said) == [
        "default_pg (ranks 0, 1, 2, 3): collective 5 has begun on r0, r1, r3; r2 is at 4",
        "tensor-parallel (ranks 2, 3): collective 8 has begun on r2; r3 is at 7",
    ]
    del said["r2"]
    assert missing(said, silent=["r2"]) == [
        "default_pg (ranks 0, 1, 2, 3): collective 5 has begun on r0, r1, r3; rank 2 of it says nothing",
        "tensor-parallel (ranks 2, 3): collective 7 has begun on r3; rank 2 of it says nothing",
    ]
    assert missing({"r0": states(0, 5, 8), "r1": states(1, 5, 8)}) == []
    assert missing({"r0": states(0, 0, 0)}, silent=["r1"]) == [], "nobody has begun anything"
