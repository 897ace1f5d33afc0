"""What the tiny launcher would start over two nodes of one device slot each."""

from __future__ import annotations

from slime.config import parse
from tests.launchers.test_launchers import Desk, desk, make_tiny_base  # noqa: F401  (a fixture)


def test_a_stage_and_an_engine_on_each_of_two_nodes(desk: Desk):  # noqa: F811
    make_tiny_base(desk.root / "base", "cpu")
    (desk.root / "hostfile").write_text("10.0.0.1\n10.0.0.2\n")
    outcome = desk.run("run-glm5.2-tiny.sh", NUM_NODES="2")
    assert outcome.status == 0, outcome.stderr
    (joined,) = [call for call in outcome.ssh if "ray start" in call["stdin"]]
    assert joined["argv"][-3] == "10.0.0.2" and "--num-gpus 1 " in joined["stdin"]
    head = outcome.ray_call("start", "--head")["argv"]
    assert head[head.index("--num-gpus") + 1] == "1"
    config = parse(outcome.job)
    assert (config.cluster.actor_num_nodes, config.cluster.actor_num_gpus_per_node) == (2, 1)
    assert (config.parallel.pipeline_model_parallel_size, config.cluster.rollout_num_gpus) == (2, 2)
    assert [group.worker_type for group in config.engine.groups[0].server_groups] == ["prefill", "decode"]
    assert outcome.job_environment["GLOO_SOCKET_IFNAME"] == "eth0"


def test_on_one_node_a_hostfile_of_others_is_not_looked_at(desk: Desk):  # noqa: F811
    make_tiny_base(desk.root / "base", "cpu")
    outcome = desk.run("run-glm5.2-tiny.sh")
    assert outcome.status == 0 and outcome.ssh == [], outcome.stderr
    assert "GLOO_SOCKET_IFNAME" not in outcome.job_environment
    assert parse(outcome.job).cluster.actor_num_gpus_per_node == 2
    told = desk.run("run-glm5.2-tiny.sh", NUM_NODES="3")
    assert told.status == 1 and told.stderr == "[launch] error: NUM_NODES=3: choose 1, 2 or 4\n"


def test_four_nodes_are_two_copies_of_two_stages_and_the_engines_of_the_recipe(desk: Desk):  # noqa: F811
    make_tiny_base(desk.root / "base", "cpu")
    (desk.root / "hostfile").write_text("".join(f"10.0.0.{n}\n" for n in (1, 2, 3, 4)))
    outcome = desk.run("run-glm5.2-tiny.sh", NUM_NODES="4")
    assert outcome.status == 0, outcome.stderr
    config = parse(outcome.job)
    sizes = config.parallel
    assert (sizes.pipeline_model_parallel_size, sizes.data_parallel_size, config.cluster.rollout_num_gpus) == (2, 2, 4)
    groups = config.engine.groups[0].server_groups
    assert [(group.worker_type, group.num_gpus) for group in groups] == [("prefill", 1), ("decode", 3)]
