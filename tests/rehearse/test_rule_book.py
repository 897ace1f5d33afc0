"""The rule book, row by row: a recipe with one mistake is refused with its values and the way out; legal recipes pass.

Each kind of mistake stands in wrong_recipes.py with more than one of its values. Flags, files' names and environment are read
as a rehearsal reads them; nothing is built.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from slime.rehearse.checks.engines import check_engines
from slime.rehearse.checks.layout import paste
from slime.rehearse.findings import EXIT_STATUS, Findings
from slime.rehearse.known_models import known_config
from slime.rehearse.reading import read
from slime.rehearse.report.text import as_text
from slime.rehearse.result import Options, rehearse
from tests.rehearse.edits import DISPATCH, SPECULATIVE, Edit, all_of, env, flags, in_group, unset, without
from tests.rehearse.recipes import ROOT, Recipe, one_node, recorded
from tests.rehearse.wording import well_said
from tests.rehearse.wrong_algorithms import WRONG_ALGORITHMS
from tests.rehearse.wrong_engines import WRONG_ENGINES, stages
from tests.rehearse.wrong_recipes import WRONG as WRONG_RECIPES
from tests.rehearse.wrong_values import WRONG_VALUES

WRONG = WRONG_RECIPES | WRONG_ALGORITHMS | WRONG_ENGINES | WRONG_VALUES


def judged(recipe: Recipe, folder: Path) -> Findings:
    findings = Findings()
    check_engines(read(recipe.written(folder), findings, env=recipe.env), findings, version="0.5.17")
    return well_said(findings)


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
    "signals and limits": flags(
        "--exit-signal-handler", "--save-on-signal-seconds", "90", "--exit-duration-in-mins", "230", "--exit-interval", "50"
    ),
    "snapshots that fit": flags("--snapshot-interval", "5", "--snapshot-versions", "1", "--max-trainer-restarts", "8"),
    "half an optimizer offloaded": flags("--optimizer-offload-fraction", "0.5"),
    "no offload": flags("--no-offload-rollout"),
    "variables of other dispatchers": env(
        SGLANG_DEEPEP_V2_NUM_MAX_DISPATCH_TOKENS_PER_RANK="64", CUDA_DEVICE_MAX_COPY_CONNECTIONS="1", NCCL_MAX_CTAS="8"
    ),
    "other variables": env(NCCL_DEBUG="INFO", MY_OWN="1", PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:512"),
    "an interface as NCCL writes it": env(NCCL_SOCKET_IFNAME="=eth0"),
    "an interface by its beginning": env(NCCL_SOCKET_IFNAME="ib,eth"),
    "all interfaces but some": env(NCCL_SOCKET_IFNAME="^lo,docker0"),
    "the first node by name": env(MASTER_ADDR="node-0.cluster_a"),
    "priorities in their order": flags("--sglang-enable-priority-scheduling", "--sglang-schedule-policy", "fcfs"),
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
    "MIS as its file has it": flags(
        "--use-tis",
        "--tis-mode",
        "truncate",
        "--tis-lower-bound",
        "0.5",
        "--tis-upper-bound",
        "2.0",
        "--use-rs",
        "--rs-veto-threshold",
        "1e-4",
        "--tis-batch-normalize",
    ),  # fmt: skip
    "a teacher in weights": flags("--use-opd", "--opd-type", "megatron", "--opd-teacher-load", "/teacher"),
    "a teacher behind HTTP": flags(
        "--use-opd", "--opd-type", "sglang", "--rm-url", "http://teacher:30000/generate", "--rollout-temperature", "1.0"
    ),
    "RLOO, Dr. GRPO's length and DAPO's punishment": flags(
        "--advantage-estimator", "rloo", "--pg-loss-length", "65536", "--overlong-buffer-len", "4096"
    ),
    "the draft layer trains": flags("--mtp-num-layers", "1", "--enable-mtp-training"),
    "two names of one draft": in_group("decode", ("dp_size: 64", "dp_size: 64\n          speculative_algorithm: NEXTN")),
    "a draft in small letters": in_group("decode", ("dp_size: 64", "dp_size: 64\n          speculative_algorithm: eagle")),
    "the page of sparse attention unsaid in one": all_of(
        without("--sglang-page-size"), in_group("decode", ("dp_size: 64", "dp_size: 64\n          page_size: 64"))
    ),
    "a growing weight decay": flags(
        "--weight-decay-incr-style", "linear", "--start-weight-decay", "0.01", "--end-weight-decay", "0.1"
    ),
    "SGD on the GPU": all_of(
        flags("--optimizer", "sgd"),
        without("--optimizer-cpu-offload", "--overlap-cpu-optimizer-d2h-h2d", "--use-precision-aware-optimizer"),
    ),
    "balancing that is named and off": flags("--moe-router-load-balancing-type", "none"),
    "variables of the trainer alone": flags("--train-env-vars", '{"NCCL_DEBUG": "INFO", "NCCL_MIN_CTAS": 8}'),
    "the checkpoint's own format named": flags("--sglang-quantization", "fp8", "--sglang-dtype", "bfloat16"),
    "a reward server": flags("--rm-type", "remote_rm", "--rm-url", "https://rewards.example:8443/score"),
    "interfaces by exclusion": env(NCCL_SOCKET_IFNAME="^docker0,lo", GLOO_SOCKET_IFNAME="", TP_SOCKET_IFNAME=""),
    "a prefix cache on the host where prefixes are kept": in_group(
        "prefill", ("dp_size: 64", "dp_size: 64\n          enable_hierarchical_cache: true")
    ),
    "spare experts for every rank": flags("--sglang-ep-num-redundant-experts", "64"),
    "supervised training alone": all_of(
        flags("--debug-train-only", "--rollout-function-path", "slime.rollout.sft_rollout.generate_rollout"),
        flags("--loss-type", "sft_loss", "--n-samples-per-prompt", "1", "--global-batch-size", "8"),
        without("--apply-chat-template", "--use-tis", "--tis-clip-low", "--tis-clip"),
    ),
    "a step ahead": all_of(
        without("--colocate"),
        flags("--rollout-num-gpus", "256", "--schedule", "one-step-ahead", "--update-weights-interval", "2"),
    ),
    "all the time": all_of(
        without("--colocate"),
        flags("--rollout-num-gpus", "256", "--schedule", "fully-async", "--max-weight-staleness", "2"),
        flags("--on-stale-group", "drop", "--pause-generation-mode", "in_place", "--mask-offpolicy-in-partial-rollout"),
    ),
    "two stages of an engine on GPUs of its own, by receivers": all_of(
        without("--colocate"),
        flags("--rollout-num-gpus", "256", "--update-weight-transport", "receivers"),
        stages("prefill"),
    ),
    "two stages of an engine on the trainer's GPUs": stages("prefill"),
    "two stages of an engine, from files": all_of(
        without("--colocate"),
        flags("--rollout-num-gpus", "256", "--update-weight-transport", "disk", "--update-weight-disk-dir", "/shared/weights"),
        stages("prefill"),
    ),
    "a replay": flags("--load-debug-rollout-data", "/d/{rollout_id}.pt"),
    "slices": flags("--prompt-data", "/p.jsonl@[-500:]"),
    "slices from both ends": flags("--prompt-data", "/p.jsonl@[10:-10]"),
    "flags that change nothing": flags(
        "--moe-router-fusion",
        "--moe-router-padding-for-fp8",
        "--moe-token-drop-policy",
        "position",
        "--log-max-attention-logit",
    ),
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


QWEN3_4B, QWEN3_30B = ("qwen3-4B", "Qwen3-4B", "2", "1"), ("qwen3-30B-A3B", "Qwen3-30B-A3B", "4", "8")
OTHER_MODELS: dict[str, tuple[tuple[str, str, str, str], str, str]] = {
    "responses longer than the positions": (QWEN3_4B, "--rollout-max-response-len 65536", "40960"),
    "responses as long as the positions": (QWEN3_4B, "--rollout-max-response-len 40960", "40960"),
    "a context beyond the positions": (
        QWEN3_30B,
        "--rollout-max-context-len 50000",
        "--rollout-max-context-len 50000 is more than an engine can hold",
    ),
    "EAGLE without a draft": (
        QWEN3_30B,
        "--sglang-speculative-algorithm EAGLE",
        "EAGLE without a draft model needs an MTP layer",
    ),
    "NEXTN without a draft": (
        QWEN3_4B,
        "--sglang-speculative-algorithm NEXTN",
        "NEXTN without a draft model needs an MTP layer",
    ),
    "experts in a dense model": (QWEN3_4B, "--num-experts 8", "has no experts, --num-experts is 8 here; leave it out"),
    "sparse attention's kernel": (QWEN3_4B, "--sglang-nsa-decode-backend fa3", "is for sparse-attention models"),
    "contiguous shards": (
        QWEN3_4B,
        "--allgather-cp --context-parallel-size 2",
        "--allgather-cp is the layout of sparse attention",
    ),
    "sparse attention's spec": (QWEN3_4B, "--spec slime_plugins.models.glm5.glm5 get_glm5_spec", "remove --spec"),
    "experts that are not there": (QWEN3_4B, "--sglang-ep-size 2", "has no experts"),
    "key heads over 16": (("qwen3-4B", "Qwen3-4B", "16", "1"), "", "--num-query-groups 8 is no multiple"),
    "engines of 3 GPUs": (QWEN3_4B, "--rollout-num-gpus-per-engine 3", "is no multiple of"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_have_limits_of_their_own(name: str) -> None:
    (script, folder, tp, ep), words, message = OTHER_MODELS[name]
    findings = Findings()
    read([*one_node(script, folder, tp=tp, ep=ep), *words.split()], findings)
    lines = [finding.line() for finding in findings.of("violation")]
    assert any(message in line for line in lines), lines


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next", "mamba"])
def test_a_family_without_a_name_table_cannot_be_launched(family: str, flagship: Recipe, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    config = {"model_type": family, "num_hidden_layers": 78, "hidden_size": 6144, "num_attention_heads": 64}
    (checkpoint / "config.json").write_text(json.dumps(config))
    found = judged(flagship.with_flag("--hf-checkpoint", str(checkpoint)), tmp_path)
    assert any(family in finding.what for finding in found.of("violation")), [finding.line() for finding in found.items]


READ_OTHERWISE: dict[str, tuple[dict, str]] = {
    "another class": (
        {"architectures": ["DeepseekV32ForCausalLM"]},
        "model_type glm_moe_dsa is trained as GlmMoeDsaForCausalLM",
    ),
    "no class": ({"architectures": []}, "architectures of config.json is [], by which SGLang chooses"),
    "more groups than there are": ({"topk_group": 2}, "topk_group is 2, more than the 1 groups of n_group"),
}


@pytest.mark.parametrize("name", READ_OTHERWISE)
def test_a_field_of_the_config_that_engines_read_otherwise(name: str, flagship: Recipe, tmp_path: Path) -> None:
    changes, message = READ_OTHERWISE[name]
    (checkpoint := tmp_path / "GLM-5.2-FP8").mkdir()
    (checkpoint / "config.json").write_text(json.dumps({**known_config("/x/GLM-5.2-FP8"), **changes}))
    recipe = flagship.with_flag("--hf-checkpoint", str(checkpoint))
    lines = [finding.line() for finding in judged(recipe, tmp_path).of("violation")]
    assert any(message in line for line in lines), lines


@pytest.mark.parametrize("stored", [{"dtype": "float16"}, {"torch_dtype": "float32"}])
def test_a_checkpoint_of_another_precision_is_served_in_bf16(stored: dict, flagship: Recipe, tmp_path: Path) -> None:
    (checkpoint := tmp_path / "GLM-5.2-FP8").mkdir()
    (checkpoint / "config.json").write_text(json.dumps({**known_config("/x/GLM-5.2-FP8"), **stored}))
    recipe = flagship.with_flag("--hf-checkpoint", str(checkpoint))
    assert judged(recipe, tmp_path).verdict == "launchable", "a CPU engine computes in float32, a GPU's in bf16"
    lines = [finding.line() for finding in judged(recipe.with_flag("--sglang-dtype", "auto"), tmp_path).of("violation")]
    assert any("dtype auto serves" in line and "in float16" in line for line in lines), lines


def test_a_model_selects_no_more_keys_than_a_kernel(flagship: Recipe, tmp_path: Path) -> None:
    (checkpoint := tmp_path / "GLM-5.2-FP8").mkdir()
    recipe = flagship.with_flag("--hf-checkpoint", str(checkpoint))
    for keys, verdict in ((2048, "launchable"), (2049, "not launchable")):
        (checkpoint / "config.json").write_text(json.dumps({**known_config("/x/GLM-5.2-FP8"), "index_topk": keys}))
        found = judged(recipe, tmp_path)
        assert found.verdict == verdict, [finding.line() for finding in found.of("violation")]
    assert any("index_topk 2049" in finding.what and "at most 2048 keys" in finding.what for finding in found.of("violation"))


def test_an_evaluation_names_a_grader_that_is_there(flagship: Recipe, tmp_path: Path) -> None:
    (file := tmp_path / "eval.yaml").write_text("datasets:\n- {name: a, path: /a.jsonl, rm_type: gpaq}\n")
    recipe = flagship.with_flag("--eval-config", str(file)).with_flag("--eval-interval", "1")
    lines = [finding.line() for finding in judged(recipe, tmp_path).of("violation")]
    assert any("evaluation a: rm-type 'gpaq' is no grader; did you mean gpqa?" in line for line in lines), lines
    file.write_text(file.read_text().replace("gpaq", "boxed_gpqa"))
    assert judged(recipe, tmp_path).verdict == "launchable"


def test_a_yaml_of_attributes_is_a_mapping(flagship: Recipe, tmp_path: Path) -> None:
    (file := tmp_path / "own.yaml").write_text("[]\n")
    recipe = flagship.with_flag("--custom-config-path", str(file))
    assert any("the top must be a mapping" in finding.what for finding in judged(recipe, tmp_path).of("violation"))
    file.write_text("")
    assert judged(recipe, tmp_path).verdict == "launchable"


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "scripts").glob("run-*.sh")))
def test_no_launcher_of_the_project_is_refused(name: str, tmp_path: Path) -> None:
    found = judged(recorded(name, tmp_path), tmp_path)
    assert found.verdict == "launchable", "\n".join(finding.line() for finding in found.items if finding.severity != "ok")


def test_a_checkpoint_under_another_name_is_judged_by_model_args(flagship: Recipe, tmp_path: Path) -> None:
    """What rests on config.json is open, first in the summary; the layout, which MODEL_ARGS say, is not."""
    elsewhere = flagship.with_flag("--hf-checkpoint", "/models/snapshots/0f3c1e")
    found = judged(elsewhere, tmp_path)
    assert found.verdict == "not proven" and EXIT_STATUS[found.verdict] == 3
    deciding = [finding.what for finding in found.of("unchecked") if finding.decides]
    assert deciding[0].startswith("/models/snapshots/0f3c1e/config.json")
    cut = elsewhere.with_flag("--decoder-first-pipeline-num-layers", "15").with_flag("--decoder-last-pipeline-num-layers", "15")
    found = judged(cut, tmp_path)
    assert found.verdict == "not launchable"
    assert any("stage 1 starts at layer 16" in finding.what for finding in found.of("violation"))
    # Where the serving format is not known, only what fits in no format is refused.
    whole = rehearse(elsewhere.written(tmp_path), Options(env=elsewhere.env, build_ranks=False))
    assert whole.findings.verdict == "not proven", [finding.line() for finding in whole.findings.of("violation")]
    # A dense model of nobody's: its shapes are in the flags, whether its engines are FP8 is not.
    argv = one_node("qwen3-8B", "nobody-knows", tp="2", ep="1")
    done = rehearse(argv, Options(build_ranks=False, engine_version="0.5.23"))
    assert done.findings.verdict == "not proven" and done.budget is not None and done.weights is not None
    text = as_text(done).splitlines()
    assert text[0].startswith("NOT PROVEN: ") and text[1].startswith("UNPROVEN  files: /models/nobody-knows/config.json")


def test_recommended_splits_pass_the_rehearsal_that_prints_them(flagship: Recipe, tmp_path: Path) -> None:
    """Pasted behind the launcher's flags, with and without virtual stages."""
    for edit in (
        lambda r: r,
        flags("--num-virtual-stages-per-pipeline-rank", "2"),
        flags("--num-virtual-stages-per-pipeline-rank", "2", "--dsa-send-indices"),
    ):
        recipe = edit(flagship)
        done = rehearse(recipe.written(tmp_path), Options(env=recipe.env, quick=True))
        pairs = [paste(done.reading.config, split, as_list=False) for split in done.balance.first_last[:2]]
        lists = [paste(done.reading.config, done.balance.best, as_list=True)]
        for words in pairs + lists:
            pasted = replace(recipe, argv=(*recipe.argv, *words.split()))
            again = rehearse(pasted.written(tmp_path), Options(env=recipe.env, quick=True))
            assert again.findings.verdict == "launchable", (words, again.findings.of("violation"))
        assert lists
    wrong = flags("--decoder-first-pipeline-num-layers", "15", "--decoder-last-pipeline-num-layers", "15")(flagship)
    found = rehearse(wrong.written(tmp_path), Options(env=wrong.env, quick=True)).findings
    first = "--decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 4 (82%)"
    assert any(f"append, best balanced first: {first}; or" in finding.line() for finding in found.items)


def test_there_are_enough_of_both() -> None:
    """With test_mutations.py: 150 mistakes of their own, 40 legal recipes."""
    from tests.rehearse.test_mutations import FULL, MISTAKES, VARIANTS

    assert len(WRONG) + len(MISTAKES) + len(FULL) >= 250 and len(LEGAL) + len(VARIANTS) >= 55
