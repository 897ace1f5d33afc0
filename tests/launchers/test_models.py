"""scripts/models/*.sh against the released Hugging Face configs (numbers by hand) and the tiny checkpoints' own sizes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slime.config import Config, ConfigError, parse
from slime.config.facts import Facts
from tools.make_tiny_checkpoint import PRESETS

ROOT = Path(__file__).resolve().parents[2]

GLM = {
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "vocab_size": 154880, "hidden_size": 6144,
    "intermediate_size": 12288, "moe_intermediate_size": 2048, "num_hidden_layers": 78, "num_attention_heads": 64,
    "num_key_value_heads": 64, "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 2048, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64,
    "v_head_dim": 256, "head_dim": 192, "first_k_dense_replace": 3, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "attention_bias": False, "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"}, "index_topk": 2048,
    "index_head_dim": 128, "index_n_heads": 32,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "attention_bias": False,
}


def qwen3(layers: int, hidden: int, inner: int, heads: int, groups: int, *, tied: bool, **more: object) -> dict[str, object]:
    return {
        **QWEN3, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": groups, "tie_word_embeddings": tied, **more,
    }  # fmt: skip


def qwen2(layers: int, hidden: int, inner: int, heads: int, groups: int, vocab: int, *, tied: bool) -> dict[str, object]:
    return {
        "model_type": "qwen2", "vocab_size": vocab, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": groups, "tie_word_embeddings": tied, "use_sliding_window": False, "sliding_window": 131072,
        "max_window_layers": layers, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
    }  # fmt: skip


def llama(layers: int, hidden: int, inner: int, heads: int, *, tied: bool, factor: float) -> dict[str, object]:
    stretch = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return {
        "model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": tied, "rope_scaling": stretch,
        "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "max_position_embeddings": 131072,
    }  # fmt: skip


ROUTED = {
    "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "num_nextn_predict_layers": 1, "attention_dropout": 0.0,
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
    "mscale_all_dim": 1.0,
}  # fmt: skip
DEEPSEEK = {
    **ROUTED, "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "n_group": 8,
    "topk_group": 4, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 3,
    "moe_layer_freq": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000, "rope_scaling": YARN, "ep_size": 1, "aux_loss_alpha": 0.001,
    "seq_aux": True, "pretraining_tp": 1, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
}  # fmt: skip
GLM45 = {
    **ROUTED, "model_type": "glm4_moe", "vocab_size": 151552, "num_attention_heads": 96, "num_key_value_heads": 8,
    "head_dim": 128, "attention_bias": True, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
    "rope_scaling": None, "use_qk_norm": False,
}  # fmt: skip

RELEASED = {
    "glm5.2-744B-A40B": GLM,
    "glm5-744B-A40B": {**GLM, "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}},
    "deepseek-v3": DEEPSEEK,
    "deepseek-v3.2": {
        **DEEPSEEK, "model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"], "index_head_dim": 128,
        "index_n_heads": 64, "index_topk": 2048,
    },
    "kimi-k2": {
        **DEEPSEEK, "model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_routed_experts": 384, "routed_scaling_factor": 2.827, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "rope_theta": 50000.0, "rope_scaling": {**YARN, "factor": 32.0, "beta_fast": 1.0}, "num_nextn_predict_layers": 0,
    },
    "kimi-k2-thinking": {
        **DEEPSEEK, "model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_routed_experts": 384, "routed_scaling_factor": 2.827, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "rope_theta": 50000.0, "rope_scaling": {**YARN, "factor": 64.0, "beta_fast": 1.0}, "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-5,
    },
    "moonlight": {
        **DEEPSEEK, "vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "routed_scaling_factor": 2.446, "q_lora_rank": None, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "rope_scaling": None,
        "num_nextn_predict_layers": 0,
    },
    "glm4.7-30B-A3B": {
        **ROUTED, "model_type": "glm4_moe_lite", "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240,
        "moe_intermediate_size": 1536, "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20,
        "n_routed_experts": 64, "num_experts_per_tok": 4, "routed_scaling_factor": 1.8, "kv_lora_rank": 512, "q_lora_rank": 768,
        "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "first_k_dense_replace": 1, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000, "partial_rotary_factor": 1.0, "rope_interleave": True,
    },
    "glm4.5-106B-A12B": {
        **GLM45, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 46,
        "n_routed_experts": 128, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0,
    },
    "glm4.5-355B-A32B": {
        **GLM45, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 92,
        "n_routed_experts": 160, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "use_qk_norm": True,
    },
    "qwen3-0.6B": qwen3(28, 1024, 3072, 16, 8, tied=True),
    "qwen3-1.7B": qwen3(28, 2048, 6144, 16, 8, tied=True),
    "qwen3-4B": qwen3(36, 2560, 9728, 32, 8, tied=True),
    "qwen3-4B-2507": qwen3(36, 2560, 9728, 32, 8, tied=True, rope_theta=5000000),
    "qwen3-8B": qwen3(36, 4096, 12288, 32, 8, tied=False),
    "qwen3-30B-A3B": qwen3(
        48, 2048, 6144, 32, 4, tied=False, model_type="qwen3_moe", num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=0.001,
    ),
    "qwen3-14B": qwen3(40, 5120, 17408, 40, 8, tied=False),
    "qwen3-32B": qwen3(64, 5120, 25600, 64, 8, tied=False),
    "qwen3-235B-A22B": qwen3(
        94, 4096, 12288, 64, 4, tied=False, model_type="qwen3_moe", num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=1536, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=0.001,
    ),
    "llama3.2-3B": llama(28, 3072, 8192, 24, tied=True, factor=32.0),
    "llama3.1-8B": llama(32, 4096, 14336, 32, tied=False, factor=8.0),
    "qwen2.5-0.5B": qwen2(24, 896, 4864, 14, 2, 151936, tied=True),
    "qwen2.5-1.5B": qwen2(28, 1536, 8960, 12, 2, 151936, tied=True),
    "qwen2.5-3B": qwen2(36, 2048, 11008, 16, 2, 151936, tied=True),
    "qwen2.5-7B": qwen2(28, 3584, 18944, 28, 4, 152064, tied=False),
    "qwen2.5-32B": qwen2(64, 5120, 27648, 40, 8, 152064, tied=False),
    "mimo-7B-rl": {
        **qwen2(36, 4096, 11008, 32, 8, 151680, tied=False), "model_type": "mimo", "attention_bias": True, "rms_norm_eps": 1e-5,
        "rope_theta": 640000, "head_dim": 128, "num_nextn_predict_layers": 1, "rope_scaling": None,
    },
    "glm4-9B": {
        "model_type": "glm4", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "tie_word_embeddings": False,
    },
}  # fmt: skip


def model_args(name: str, **environment: str) -> list[str]:
    script = f'source "{ROOT}/scripts/models/{name}.sh"; printf "%s\\n" "${{MODEL_ARGS[@]}}"'
    done = subprocess.run(
        ["bash", "-euc", script], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def config_of(words: list[str], hf: dict[str, object]) -> Config:
    return parse([*words, "--hf-checkpoint", "/hf"], door="convert", facts=Facts(hf_config=hf))


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_model_arguments_agree_with_the_released_config(name: str):
    config = config_of(model_args(name), RELEASED[name])
    assert config.model.vocab_size == RELEASED[name]["vocab_size"]


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_model_arguments_disagree_with_every_other_model(name: str):
    words = model_args(name)
    for other, hf in RELEASED.items():
        if other != name:
            with pytest.raises(ConfigError, match="the model flags disagree|remove --spec|pass --spec"):
                config_of(words, hf)


def test_every_model_file_is_tested():
    files = {path.stem for path in (ROOT / "scripts/models").glob("*.sh")}
    assert files == set(RELEASED) | {"glm5.2-tiny", "qwen3-tiny", "glm5.2-mini"}


@pytest.mark.parametrize("preset", ["cpu", "h200"])
def test_the_tiny_glm_is_the_one_that_the_tool_writes(preset: str):
    hf = {**GLM, **dataclasses.asdict(PRESETS[preset].size), "vocab_size": 320}
    config = config_of(model_args("glm5.2-tiny", GLM52_TINY=preset), hf)
    assert config.model.megatron["moe_layer_freq"] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_the_mini_glm_is_the_one_that_the_tool_writes_and_differs_from_the_release_in_numbers_of_layers_and_experts():
    size = dataclasses.asdict(PRESETS["mini"].size)
    config = config_of(model_args("glm5.2-mini"), {**GLM, **size, "vocab_size": 320})
    assert config.model.megatron["num_moe_experts"] == 32
    differs = {name for name, value in size.items() if name in GLM and GLM[name] != value}
    assert differs == {"num_hidden_layers", "n_routed_experts"}


def test_the_tiny_qwen3_is_the_one_that_the_tool_writes():
    hf = {**QWEN3, **dataclasses.asdict(PRESETS["qwen3"].size), "vocab_size": 320, "tie_word_embeddings": False}
    assert config_of(model_args("qwen3-tiny"), hf).model.megatron["num_query_groups"] == 2


def test_deepseek_v3_is_stretched_by_yarn_and_glm_is_not():
    deepseek = config_of(model_args("deepseek-v3"), RELEASED["deepseek-v3"]).model.megatron
    assert (deepseek["rope_type"], deepseek["rotary_scaling_factor"], deepseek["original_max_position_embeddings"]) == (
        "yarn",
        40.0,
        4096,
    )
    glm = config_of(model_args("glm5.2-744B-A40B"), GLM).model.megatron
    assert (glm["rope_type"], glm["rotary_scaling_factor"]) == ("rope", 1.0)


def test_the_message_names_the_base_that_fits_a_longer_context():
    with pytest.raises(ConfigError, match=r"pass --rotary-base 5000000 .*takes MODEL_ARGS_ROTARY_BASE=5000000 before"):
        config_of(model_args("qwen3-4B"), RELEASED["qwen3-4B-2507"])


def test_queries_without_a_latent_need_no_flag_and_take_none():
    assert config_of(model_args("moonlight"), RELEASED["moonlight"]).model.megatron["q_lora_rank"] is None
    with pytest.raises(ConfigError, match="q_lora_rank is None there, --q-lora-rank is 512 here; leave --q-lora-rank out"):
        config_of([*model_args("moonlight"), "--q-lora-rank", "512"], RELEASED["moonlight"])


def test_qwen3s_rope_base_can_be_replaced():
    words = model_args("qwen3-4B", MODEL_ARGS_ROTARY_BASE="5000000")
    assert config_of(words, {**RELEASED["qwen3-4B"], "rope_theta": 5000000}).model.rotary_base == 5e6


@pytest.mark.slow
def test_a_real_ray_cluster_starts_runs_a_job_and_leaves_nothing_behind(tmp_path: Path):
    """Two logical slots on this machine, a token on every endpoint, an environment whose path has a space; no process of the
    session is left at the end."""
    python = _environment(tmp_path / "an environment")
    temp = Path("/tmp") / f"slime-ray-test-{os.getpid()}"
    job = "import ray, os; ray.init(logging_level='ERROR'); print('slots', ray.cluster_resources()['GPU'], os.environ['WORD'])"
    script = f"""
set -euo pipefail
source "{ROOT}/scripts/lib/launch.sh"
NUM_GPUS=2 NUM_CPUS=2 RAY_TEMP_DIR={temp}
start_ray_head
echo "head $RAY_HEAD_PID"
export RAY_AUTH_TOKEN={"0" * 64}
ray job list --address "$RAY_JOBS_URL" >/dev/null 2>&1 && echo "open to strangers"
unset RAY_AUTH_TOKEN
ray job submit --address "$RAY_JOBS_URL" --runtime-env-json "$(runtime_env_json WORD='a "b" $c')" -- "$JOB_PYTHON" -c "{job}"
"""
    environment = {**os.environ, "PYTHON": str(python), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert 'slots 2.0 a "b" $c' in done.stdout and "open to strangers" not in done.stdout
    head = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("head "))
    deadline = time.monotonic() + 120  # what was killed last may wait a moment for its parent to notice
    while time.monotonic() < deadline and _alive(head):
        time.sleep(0.2)
    assert _alive(head) == []
    shutil.rmtree(temp)


def _environment(folder: Path) -> Path:
    """The interpreter of an environment with this one's packages, and `ray` as pip writes it where the path has a space."""
    (folder / "bin").mkdir(parents=True)
    python, home = folder / "bin" / "python", Path(sys.executable).resolve().parent
    python.symlink_to(Path(sys.executable).resolve())
    (folder / "lib").symlink_to(Path(sys.prefix) / "lib")
    (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    entry = folder / "bin" / "ray"
    entry.write_text(f"""#!/bin/sh\n'''exec' "{python}" "$0" "$@"\n' '''\nfrom ray.scripts.scripts import main\nmain()\n""")
    entry.chmod(0o755)
    return python


def _alive(session: str) -> list[str]:
    rows = subprocess.run(
        ["ps", "-e", "-o", "sid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [row for row in rows if row.split()[0] == session and not row.split()[1].startswith("Z")]
