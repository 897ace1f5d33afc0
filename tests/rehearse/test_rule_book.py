"""The rule book, row by row: a recipe with one mistake is refused with its values and the way out; legal recipes pass.

Each kind of mistake stands in wrong_recipes.py with more than one of its values. Flags, files' names and environment are read
as a rehearsal reads them; nothing is built.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slime.rehearse.engine_checks import check_engines
from slime.rehearse.findings import Findings
from slime.rehearse.reading import read
from tests.rehearse.edits import DISPATCH, SPECULATIVE, Edit, all_of, env, flags, in_group, unset, without
from tests.rehearse.recipes import Recipe
from tests.rehearse.wrong_recipes import WRONG


def judged(recipe: Recipe, folder: Path) -> Findings:
    findings = Findings()
    check_engines(read(recipe.written(folder), findings, env=recipe.env), findings, version="0.5.17")
    return findings


LEGAL: dict[str, Edit] = {
    "as it is": lambda r: r,
    "aliases of one cache type": all_of(
        in_group("prefill", ("mode: auto", "mode: auto\n          kv_cache_dtype: bf16")),
        in_group("decode", ("dp_size: 64", "dp_size: 64\n          kv_cache_dtype: bfloat16")),
        flags("--sglang-nsa-decode-backend", "flashmla_sparse"),
    ),
    "old and new name of one backend": in_group(
        "decode", ("dp_size: 64", "dp_size: 64\n          dsa_decode_backend: flashmla_kv\n          attention_backend: dsa")
    ),
    "prefill in normal mode": in_group("prefill", ("deepep_mode: auto", "deepep_mode: normal")),
    "prefill by low latency in chunks that fit": in_group(
        "prefill", ("deepep_mode: auto", "deepep_mode: low_latency"), ("size: 131072", "size: 4096")
    ),
    "no speculation, five times the requests": all_of(
        without(*SPECULATIVE), in_group("decode", ("requests: 768", "requests: 4096"), ("max_bs: 12", "max_bs: 64"))
    ),
    "a buffer of 1024": env(**{DISPATCH: "1024"}),
    "the default buffer": unset(DISPATCH),
    "decode in engines of 32": in_group(
        "decode",
        ("per_engine: 64", "per_engine: 32"),
        ("dp_size: 64", "dp_size: 32"),
        ("ep_size: 64", "ep_size: 32"),
        ("requests: 768", "requests: 384"),
    ),
    "a wide prefill": lambda r: r.with_yaml("num_gpus: 64\n", "num_gpus: 128\n").with_yaml("num_gpus: 192", "num_gpus: 128"),
    "one RDMA device": flags("--sglang-disaggregation-ib-device", "mlx5_0"),
    "four RDMA devices": flags("--sglang-disaggregation-ib-device", "a,b,c,d"),
    "a router policy that its parser hides": flags("--router-policy", "prefix_hash"),
    "a router number": flags("--router-queue-size", "12", "--router-log-level", "info", "--router-dp-aware"),
    "flex and DeepEP in the trainer": flags("--moe-token-dispatcher-type", "flex", "--moe-enable-deepep"),
    "recomputation in twos": flags("--recompute-num-layers", "2"),
    "recomputation by blocks of three": flags("--recompute-method", "block", "--recompute-num-layers", "3"),
    "a warm-up": flags("--lr-warmup-iters", "10", "--lr-decay-style", "cosine", "--lr-decay-iters", "100"),
    "WSD": flags("--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "300"),
    "64 nodes": lambda r: r.with_flag("--actor-num-nodes", "64").with_yaml("num_gpus: 192", "num_gpus: 448"),
    "indices sent": flags(
        "--decoder-first-pipeline-num-layers", "15", "--decoder-last-pipeline-num-layers", "15", "--dsa-send-indices"
    ),
    "a layout of virtual stages": all_of(
        without("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
        flags("--pipeline-model-parallel-layout", "6,4,4,4,4,4,8,8,8,4,4,4,4,4,4,4"),
    ),
    "the launcher's pair taken back": flags(
        "--decoder-first-pipeline-num-layers",
        "none",
        "--decoder-last-pipeline-num-layers",
        "none",
        "--pipeline-model-parallel-layout",
        "10,12,12,12,8,8,8,8",
    ),
    "half an optimizer offloaded": flags("--optimizer-offload-fraction", "0.5"),
    "no offload": flags("--no-offload-rollout"),
    "other variables": env(NCCL_DEBUG="INFO", MY_OWN="1", PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:512"),
    "regular engines": lambda r: replace(
        r.without("--sglang-disaggregation-transfer-backend").without("--sglang-disaggregation-ib-device"),
        yaml="sglang:\n  - name: default\n    server_groups:\n      - worker_type: regular\n        num_gpus: 256\n"
        "        num_gpus_per_engine: 64\n        overrides: {max_running_requests: 768, cuda_graph_max_bs: 12}\n",
    ),
    "a placeholder beside": lambda r: r.with_yaml("num_gpus: 192", "num_gpus: 128").with_yaml(
        "      - worker_type: decode", "      - worker_type: placeholder\n        num_gpus: 64\n      - worker_type: decode"
    ),
    "BF16 engines": flags("--hf-checkpoint", "/BASE_DIR/GLM-5.2"),
    "BF16 engines, dense layers in parts": all_of(
        flags("--hf-checkpoint", "/BASE_DIR/GLM-5.2"), in_group("decode", ("moe_dense_tp_size: 1", "moe_dense_tp_size: 64"))
    ),
    "evaluation": flags(
        "--eval-interval", "20", "--eval-prompt-data", "aime", "/data/aime.jsonl", "--eval-max-response-len", "65536"
    ),
    "kl": flags("--use-kl-loss", "--kl-loss-coef", "0.01"),
    "dynamic filter": flags(
        "--over-sampling-batch-size",
        "16",
        "--dynamic-sampling-filter-path",
        "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
    ),
    "the draft layer trains": flags("--mtp-num-layers", "1", "--enable-mtp-training"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_mistake_is_refused_with_its_values(name: str, flagship: Recipe, tmp_path: Path) -> None:
    edit, message = WRONG[name]
    found = judged(edit(flagship), tmp_path)
    lines = [finding.line() for finding in found.of("violation")]
    assert any(message in line for line in lines), f"wanted {message!r} in:\n" + "\n".join(lines)
    assert found.verdict == "not launchable"


@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_recipe_is_not_refused(name: str, flagship: Recipe, tmp_path: Path) -> None:
    found = judged(LEGAL[name](flagship), tmp_path)
    assert found.verdict == "launchable", "\n".join(finding.line() for finding in found.items if finding.severity != "ok")


def test_there_are_enough_of_both() -> None:
    """With test_mutations.py: 150 mistakes of their own, 40 legal recipes."""
    from tests.rehearse.test_mutations import FULL, MISTAKES, VARIANTS

    assert len(WRONG) + len(MISTAKES) + len(FULL) >= 190 and len(LEGAL) + len(VARIANTS) >= 45
