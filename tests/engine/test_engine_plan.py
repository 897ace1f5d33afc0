"""Engines on slots: pure arithmetic, no process."""

from __future__ import annotations

import pytest

from slime.config.engine_groups import EngineGroup, SglangModel
from slime.engine.plan import Slots, check_options, lay_out
from slime.engine.ports import FIRST_PORT, PortBook, take_engine_ports

RECIPE_FLAGS = {
    "enable_dp_attention": True,
    "ep_size": "64",
    "dp_size": "64",
    "kv_cache_dtype": "fp8_e4m3",
    "nsa_decode_backend": "flashmla_kv",
    "nsa_prefill_backend": "flashmla_sparse",
    "attention_backend": "nsa",
    "speculative_algorithm": "EAGLE",
    "speculative_num_steps": "4",
}


def model(*groups: EngineGroup, name: str = "default", update: bool = True) -> SglangModel:
    return SglangModel(name, None, update, groups)


def group(kind: str, gpus: int, per_engine: int, **overrides) -> EngineGroup:
    return EngineGroup(kind, gpus, per_engine, overrides)


def slots(gpus: int, **changes) -> Slots:
    values = {"gpus_per_node": 8, "trainer_gpus": gpus, "first_rollout_gpu": 0, "offload_rollout": True} | changes
    return Slots(rollout_num_gpus=gpus, **values)


def plan(models, where: Slots, **flags):
    return lay_out(models, slots=where, flags=flags, hf_checkpoint="/models/m", seed=1000)


def test_the_flagship_recipe_is_one_prefill_and_three_decode_engines_of_eight_nodes():
    recipe = model(
        group("prefill", 64, 64, deepep_mode="auto"),
        group("decode", 192, 64, deepep_mode="low_latency", moe_runner_backend="deep_gemm", cuda_graph_max_bs=12),
    )
    specs = plan([recipe], slots(256), **RECIPE_FLAGS)
    assert [spec.label for spec in specs] == ["default-prefill-0", "default-decode-1", "default-decode-2", "default-decode-3"]
    assert [spec.gpu_offset for spec in specs] == [0, 64, 128, 192]
    assert {(spec.tp_size, spec.pp_size, spec.dp_size, spec.ep_size, spec.num_nodes) for spec in specs} == {(64, 1, 64, 64, 8)}
    # One actor per node: the node-0 actors of the engines are numbers 0, 8, 16, 24, and seeds are spaced by the node size.
    assert [spec.random_seed for spec in specs] == [1000 + 8 * rank for rank in (0, 8, 16, 24)]
    assert all(spec.needs_offload for spec in specs)
    assert specs[0].settings["deepep_mode"] == "auto" and specs[1].settings["cuda_graph_max_bs"] == 12


def test_the_recipes_options_exist_under_the_names_of_every_supported_version():
    from slime.engine.versions import TABLE, option_table, translate, typed_argv

    recipe = model(group("decode", 64, 64, deepep_mode="low_latency", moe_runner_backend="deep_gemm", cuda_graph_max_bs=12))
    settings = plan([recipe], slots(64), **RECIPE_FLAGS)[0].settings
    for column in TABLE:
        argv = typed_argv(translate(settings, column).settings, option_table(column.version))
        assert "--dsa-decode-backend=flashmla_kv" in argv and "--cuda-graph-max-bs-decode=12" in argv
        assert ("--attn-dp-size=64" in argv) == (column.version == "0.5.23")
        assert ("--dp-size=64" in argv) == (column.version != "0.5.23")


@pytest.mark.slow
def test_the_flagship_launchers_own_command_line_fits_every_supported_version(tmp_path):
    from launchers.test_launchers import make_desk

    from slime.config import parse
    from slime.engine.kinds import command
    from slime.engine.plan import plan_engines
    from slime.engine.ports import EnginePorts
    from slime.engine.spec import NodePlacement
    from slime.engine.versions import TABLE, option_table, typed_argv

    with make_desk(tmp_path) as desk:
        started = desk.run("run-glm5.2-744B-A40B.sh", SOCKET_IFNAME="eth0")
    specs = plan_engines(parse(started.job))
    assert [(spec.role, spec.gpu_offset, spec.num_nodes, spec.dp_size, spec.ep_size) for spec in specs] == [
        ("prefill", 0, 8, 64, 64),
        ("decode", 64, 8, 64, 64),
        ("decode", 128, 8, 64, 64),
        ("decode", 192, 8, 64, 64),
    ]
    place, ports = NodePlacement(3, "10.0.0.4", 0, "10.0.0.1:15003"), EnginePorts(15000, 15001, 15003, 15002)
    for column in TABLE:
        argv = typed_argv(command("cuda", specs[1], place, ports, column, base_env={}).settings, option_table(column.version))
        for word in (
            "--node-rank=3",
            "--dist-init-addr=10.0.0.1:15003",
            "--deepep-mode=low_latency",
            "--cuda-graph-max-bs-decode=12",
        ):
            assert word in argv


def test_an_override_wins_over_the_flag_under_either_name_of_the_option():
    (spec,) = plan(
        [model(group("regular", 1, 1, cuda_graph_max_bs_decode=12))], slots(1), cuda_graph_max_bs="8", page_size="64"
    )
    assert spec.settings == {"cuda_graph_max_bs_decode": 12, "page_size": "64"}


def test_switches_of_older_sglangs_spread_experts_over_all_ranks_of_an_engine():
    """As SGLang did: enable_ep_moe made ep_size the tensor-parallel size, enable_deepep_moe named the dispatcher too."""
    [spec] = plan(
        [model(group("regular", 16, 16))], slots(16), enable_ep_moe=True, enable_deepep_moe="true", deepep_mode="auto"
    )
    assert spec.ep_size == 16 and spec.settings == {"moe_a2a_backend": "deepep", "deepep_mode": "auto"}
    assert plan([model(group("regular", 16, 16))], slots(16), enable_ep_moe=True, ep_size=4)[0].ep_size == 4
    assert plan([model(group("regular", 16, 16, enable_ep_moe=False))], slots(16), enable_ep_moe=True)[0].ep_size == 1
    with pytest.raises(
        ValueError, match="enable_deepep_moe means moe_a2a_backend deepep, and moe_a2a_backend is none; keep one"
    ):
        plan([model(group("regular", 8, 8))], slots(8), enable_deepep_moe=True, moe_a2a_backend="none")


def test_placeholders_keep_their_slots_empty():
    specs = plan([model(group("regular", 2, 1), group("placeholder", 3, 1), group("regular", 4, 2))], slots(9))
    assert [(spec.gpu_offset, spec.num_gpus) for spec in specs] == [(0, 1), (1, 1), (5, 2), (7, 2)]
    assert [spec.engine_id for spec in specs] == [0, 1, 2, 3]


def test_only_engines_on_the_trainers_gpus_are_offloaded():
    colocated = plan([model(group("regular", 8, 2))], slots(8, trainer_gpus=4))
    assert [spec.needs_offload for spec in colocated] == [True, True, False, False]
    apart = plan([model(group("regular", 8, 2))], slots(8, trainer_gpus=4, first_rollout_gpu=4))
    assert not any(spec.needs_offload for spec in apart)
    kept = plan([model(group("regular", 8, 2))], slots(8, offload_rollout=False))
    assert not any(spec.needs_offload for spec in kept)


def test_pipeline_parallelism_takes_its_share_of_the_gpus():
    (spec,) = plan([model(group("regular", 8, 8))], slots(8), pp_size="2")
    assert (spec.tp_size, spec.pp_size) == (4, 2)
    assert "pp_size" not in spec.settings


def test_a_second_model_starts_behind_the_first_and_keeps_its_own_path():
    reward = SglangModel("reward", "/models/reward", False, (group("regular", 2, 2),))
    actor, judge = plan([model(group("regular", 2, 2)), reward], slots(4))
    assert (actor.model_path, judge.model_path) == ("/models/m", "/models/reward")
    assert (judge.gpu_offset, judge.update_weights) == (2, False)


@pytest.mark.parametrize(
    ("groups", "flags", "message"),
    [
        ([group("regular", 4, 4)], {}, "take 4 GPUs .* --rollout-num-gpus is 8"),
        ([group("regular", 8, 8)], {"pp_size": "3"}, "8 GPUs are not tensor parallel 2 x pipeline parallel 3"),
        ([group("regular", 8, 8)], {"dp_size": "2"}, "add --sglang-enable-dp-attention"),
        (
            [group("regular", 8, 8)],
            {"dp_size": "3", "enable_dp_attention": True},
            "dp_size 3 must divide the tensor parallel size 8",
        ),
        ([group("regular", 8, 8)], {"ep_size": "3"}, "ep_size 3 must divide"),
        ([group("regular", 8, 8)], {"dp_size": "2", "data_parallel_size": "4"}, "say different things"),
        ([group("regular", 8, 8)], {"ep_size": "many"}, "'many', not a whole number"),
        ([group("regular", 8, 8, port=80)], {}, "port are set per process by slime"),
        ([group("encoder", 8, 8)], {}, "encoder groups serve image models"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_with_the_numbers(groups, flags, message):
    with pytest.raises(ValueError, match=message):
        plan([model(*groups)], slots(8), **flags)


def test_a_typo_in_an_option_is_found_before_anything_starts():
    (spec,) = plan([model(group("regular", 1, 1))], slots(1), mem_fraction_statik="0.8")
    with pytest.raises(
        ValueError, match="--sglang-mem-fraction-statik: sglang .* has no such option; nearest: --sglang-mem-fraction-static"
    ):
        check_options(spec)


def test_ports_follow_each_other_and_a_busy_one_is_stepped_over():
    book = PortBook("127.0.0.1")
    other = PortBook("127.0.0.1")
    try:
        prefill = take_engine_ports(book, prefill=True, dp_size=4)
        decode = take_engine_ports(book, prefill=False)
        assert FIRST_PORT <= prefill.http < prefill.nccl < prefill.bootstrap < prefill.dist_init
        assert decode.http >= prefill.dist_init + 34 and decode.bootstrap is None
        # Another run's book finds all of these taken although nothing listens there yet.
        assert other.take() not in book.held
    finally:
        book.release()
        other.release()


def test_a_held_port_can_be_bound_by_the_server_but_not_by_another_lease():
    import socket

    from slime.engine.ports import bind, require_port

    book = PortBook("127.0.0.1")
    port = book.take()
    try:
        with pytest.raises(OSError):
            bind("127.0.0.1", port)
        with pytest.raises(ValueError, match=f"--sglang-router-port {port} on 127.0.0.1 is already in use"):
            require_port("127.0.0.1", port, "--sglang-router-port")
        with socket.socket() as server:  # as uvicorn, TCPStore and the router do it
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=2):
                pass
    finally:
        book.release()
