"""One spec, two kinds: what the command line and the environment of a CUDA and a CPU engine are. Nothing is started."""

from __future__ import annotations

import dataclasses
import json

import pytest
from engine.engines import spec

from slime.engine.kinds import CUDA_ONLY, Command, command
from slime.engine.ports import EnginePorts
from slime.engine.spec import NodePlacement
from slime.engine.versions import TABLE, capabilities, option_table, typed_argv

PORTS = EnginePorts(15000, 15001, 15003, 15002)
HERE = NodePlacement(0, "127.0.0.1", 4)
GPU_FLAGS = {
    "kv_cache_dtype": "fp8_e4m3",
    "nsa_decode_backend": "flashmla_kv",
    "attention_backend": "nsa",
    "disaggregation_transfer_backend": "mooncake",
    "disaggregation_ib_device": "mlx5_0",
    "mem_fraction_static": "0.7",
    "speculative_algorithm": "EAGLE",
    "max_running_requests": "7",
}


@pytest.fixture
def glm(tmp_path):
    config = {
        "model_type": "glm_moe_dsa",
        "qk_rope_head_dim": 16,
        "index_head_dim": 128,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("column", TABLE, ids=lambda column: column.version)
@pytest.mark.parametrize("role", ["regular", "prefill", "decode"])
def test_a_cuda_engines_settings_are_options_of_every_supported_version(glm, role, column):
    plan = command("cuda", spec(role, 0, glm, **GPU_FLAGS), HERE, PORTS, column, base_env={})
    argv = typed_argv(plan.settings, option_table(column.version))
    assert "--dsa-decode-backend=flashmla_kv" in argv and "--base-gpu-id=4" in argv and "--enable-memory-saver" in argv
    assert "--host=127.0.0.1" in argv and not any("0.0.0.0" in word for word in argv)
    assert ("--disaggregation-bootstrap-port=15002" in argv) == (role == "prefill")
    assert "SGLANG_USE_CPU_ENGINE" not in plan.env and "PYTHONPATH" not in plan.env
    assert plan.env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "false"


def test_an_engine_that_is_never_paused_runs_without_the_memory_saver(glm):
    kept = dataclasses.replace(spec("regular", 0, glm), needs_offload=False)
    plan = command(
        "cuda", kept, HERE, PORTS, capabilities("0.5.17"), base_env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    )
    assert plan.settings["enable_memory_saver"] is False and "cuda_graph_backend_prefill" not in plan.settings
    assert "PYTORCH_CUDA_ALLOC_CONF" not in plan.env


def test_an_engine_on_a_gpu_serves_in_the_trainers_precision_whatever_config_json_says(glm):
    engine = spec("regular", 0, glm)
    assert command("cuda", engine, HERE, PORTS, capabilities("0.5.23"), base_env={}).settings["dtype"] == "bfloat16"
    fixed = dataclasses.replace(engine, update_weights=False, needs_offload=True)
    settings = command("cuda", fixed, HERE, PORTS, capabilities("0.5.23"), base_env={}).settings
    assert "dtype" not in settings and settings["enable_weights_cpu_backup"] is True, "nobody sends them again"


def test_an_engine_that_gives_its_memory_back_captures_no_prefill_graphs(glm):
    """They would keep addresses that the memory saver takes away; whoever asks for graphs by name gets them."""
    paused = dataclasses.replace(spec("prefill", 0, glm), needs_offload=True)
    plan = command("cuda", paused, HERE, PORTS, capabilities("0.5.23"), base_env={})
    assert plan.settings["enable_memory_saver"] is True and plan.settings["cuda_graph_backend_prefill"] == "disabled"
    asked = dataclasses.replace(paused, settings={**paused.settings, "cuda_graph_backend_prefill": "full"})
    assert (
        command("cuda", asked, HERE, PORTS, capabilities("0.5.23"), base_env={}).settings["cuda_graph_backend_prefill"]
        == "full"
    )


def test_a_cpu_engine_drops_each_cuda_option_with_a_note(glm):
    base = {"CUDA_VISIBLE_DEVICES": "0", "PATH": "/bin", "PYTHONPATH": "/mine"}
    plan = command("host", spec("decode", 0, glm, **GPU_FLAGS), HERE, PORTS, capabilities("0.5.23"), base_env=base)
    assert not set(plan.settings) & set(CUDA_ONLY) - {"enable_memory_saver"}
    for name in (
        "kv_cache_dtype",
        "dsa_decode_backend",
        "mem_fraction_static",
        "speculative_algorithm",
        "disaggregation_ib_device",
    ):
        assert any(note.startswith(f"CPU engine: {name} ") for note in plan.notes), name
    assert plan.settings["disaggregation_transfer_backend"] == "mooncake_tcp"
    assert plan.settings["attention_backend"] == "torch_native"
    assert plan.settings["max_running_requests"] == "7"
    assert "CUDA_VISIBLE_DEVICES" not in plan.env and plan.env["PYTHONPATH"].endswith(":/mine")
    typed_argv(plan.settings, option_table("0.5.23"))


def test_glm_on_a_cpu_gets_a_row_for_the_index_key_and_no_fp8_path(glm):
    plan = command("host", spec("regular", 0, glm), HERE, PORTS, capabilities("0.5.23"), base_env={})
    override = json.loads(plan.settings["json_model_override_args"])
    assert override["qk_rope_head_dim"] == 16 + 128 and override["quantization_config"] is None
    assert override["slime_model"]["qk_rope_head_dim"] == 16
    assert override["slime_model"]["quantization_config"]["weight_block_size"] == [128, 128]


def test_tensor_parallel_ranks_get_a_core_each(glm, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {2, 3, 6})
    plan = command("host", spec("regular", 0, glm, tp=4), HERE, PORTS, capabilities("0.5.23"), base_env={})
    assert plan.env["SGLANG_CPU_OMP_THREADS_BIND"] == "2|3|6|2"


@pytest.mark.parametrize("name", ["SGLANG_ENABLE_EMBED_REPLICATION", "SGLANG_SHARED_EXPERT_TP1"])
def test_a_matrix_of_which_ranks_are_sent_shares_is_replicated_on_none(glm, name):
    def started(**changes) -> Command:
        return command(
            "cuda", dataclasses.replace(spec("regular", 0, glm, tp=2), **changes), HERE, PORTS, column, base_env={name: "True"}
        )

    column = capabilities("0.5.23")
    plan = started()
    assert plan.env[name] == "0" and f"{name} is turned off: the trainer sends each rank its share of that matrix" in plan.notes
    kept = started(update_weights=False)
    assert kept.env[name] == "True" and not any(name in note for note in kept.notes), "it reads its own checkpoint"


@pytest.mark.parametrize(
    ("kind", "version", "message"),
    [("host", "0.5.17", "sglang 0.5.17 cannot serve on a CPU"), ("tpu", "0.5.23", "'tpu' is neither cuda nor host")],
)
def test_what_a_kind_cannot_do_is_said(glm, kind, version, message):
    with pytest.raises(ValueError, match=message):
        command(kind, spec("regular", 0, glm), HERE, PORTS, capabilities(version), base_env={})


def test_a_second_node_needs_the_first_ones_address(glm):
    with pytest.raises(ValueError, match="node 1 of engine default-regular-0 needs node 0's dist_init_addr"):
        command("cuda", spec("regular", 0, glm), NodePlacement(1, "10.0.0.2", 0), PORTS, capabilities("0.5.23"), base_env={})


def test_a_quantised_model_without_cpu_loader_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(ValueError, match=r"\(qwen3\) is quantised; on a CPU only glm_moe_dsa may be"):
        command("host", spec("regular", 0, tmp_path), HERE, PORTS, capabilities("0.5.23"), base_env={})
