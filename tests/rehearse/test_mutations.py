"""The flagship passes; each single mistake in it is caught, with the right message; legal variants pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from slime.rehearse.known_models import known_config
from slime.rehearse.result import Options, Rehearsal, rehearse
from tests.rehearse.recipes import Recipe, one_node

Edit = Callable[[Recipe], Recipe]


def run(recipe: Recipe, folder: Path, *, quick: bool = True, **options: object) -> Rehearsal:
    return rehearse(
        recipe.written(folder), Options(env=recipe.env, build_ranks=False, quick=quick, engine_version="0.5.23", **options)
    )


def violations(done: Rehearsal) -> list[str]:
    return [finding.line() for finding in done.findings.of("violation")]


def flag(name: str, *values: str) -> Edit:
    return lambda recipe: recipe.with_flag(name, *values)


def drop(name: str) -> Edit:
    return lambda recipe: recipe.without(name)


def yaml(old: str, new: str) -> Edit:
    return lambda recipe: recipe.with_yaml(old, new)


MISTAKES: dict[str, tuple[Edit, str]] = {
    "pp split on shared layers": (flag("--decoder-first-pipeline-num-layers", "12"), "do not divide"),
    "pp split that starts on a shared layer": (
        lambda r: r.with_flag("--decoder-first-pipeline-num-layers", "15").with_flag(
            "--decoder-last-pipeline-num-layers", "15"
        ),
        "stage 1 starts at layer 16, which reuses the indices of layer 15",
    ),
    "pp 16": (flag("--pipeline-model-parallel-size", "16"), "256 training GPUs are no multiple of TP 4 x PP 16 x CP 8"),
    "pp 7": (flag("--pipeline-model-parallel-size", "7"), "256 training GPUs are no multiple of TP 4 x PP 7 x CP 8"),
    "layout string with a layer too few": (
        lambda r: (
            r.without("--decoder-first-pipeline-num-layers")
            .without("--decoder-last-pipeline-num-layers")
            .with_flag("--pipeline-model-parallel-layout", "Et*9|t*12|t*8|t*12|t*8|t*12|t*8|t*8L")
        ),
        "places 77 layers (t), the model has 78",
    ),
    "layout string and first/last": (
        flag("--pipeline-model-parallel-layout", "Et*10|t*12|t*8|t*12|t*8|t*12|t*8|t*8L"),
        "exclude each other",
    ),
    "layout string on shared layers": (
        lambda r: (
            r.without("--decoder-first-pipeline-num-layers")
            .without("--decoder-last-pipeline-num-layers")
            .with_flag("--pipeline-model-parallel-layout", "Et*11|t*11|t*8|t*12|t*8|t*12|t*8|t*8L")
        ),
        "starts at layer 12",
    ),
    "ep 48": (flag("--expert-model-parallel-size", "48"), "no multiple of expert-TP 1 x EP 48 x PP 8"),
    "ep 64": (flag("--expert-model-parallel-size", "64"), "EP 64 x PP 8 = 512"),
    "expert tp 4": (flag("--expert-tensor-parallel-size", "4"), "no multiple of expert-TP 4 x EP 32 x PP 8"),
    "tp 3": (flag("--tensor-model-parallel-size", "3"), "no multiple of TP 3"),
    "tp without sequence parallel": (drop("--sequence-parallel"), "--sequence-parallel"),
    "cp without its layout": (drop("--allgather-cp"), "pass --allgather-cp"),
    "31 nodes": (flag("--actor-num-nodes", "31"), "248 training GPUs are no multiple"),
    "60 heads": (flag("--num-attention-heads", "60"), "num_attention_heads is 64 there"),
    "hidden 6000": (flag("--hidden-size", "6000"), "hidden_size is 6144 there"),
    "77 layers": (flag("--num-layers", "77"), "num_hidden_layers is 78 there"),
    "254 experts": (flag("--num-experts", "254"), "n_routed_experts is 256 there"),
    "topk 4": (flag("--moe-router-topk", "4"), "num_experts_per_tok is 8 there"),
    "rotary base of GLM-5": (flag("--rotary-base", "1000000"), "rope_theta is 8000000"),
    "kv lora 256": (flag("--kv-lora-rank", "256"), "kv_lora_rank is 512 there"),
    "epsilon 1e-6": (flag("--norm-epsilon", "1e-6"), "rms_norm_eps"),
    "tied embeddings": (drop("--untie-embeddings-and-output-weights"), "tie_word_embeddings"),
    "softmax router": (flag("--moe-router-score-function", "softmax"), "moe-router-score-function"),
    "no expert bias": (drop("--moe-router-enable-expert-bias"), "moe-router-enable-expert-bias"),
    "no layer spec": (drop("--spec"), "get_glm5_spec"),
    "mistyped flag": (flag("--tensor-model-paralel-size", "4"), "did you mean --tensor-model-parallel-size"),
    "text for a number": (flag("--rollout-batch-size", "eight"), "wants a whole number, got 'eight'"),
    "flag of a later version": (flag("--use-critic-lr", "1e-5"), "unknown flag --use-critic-lr"),
    "weights by differences": (flag("--update-weight-mode", "delta"), "--update-weight-mode delta travels in files alone"),
    "temperature 0": (flag("--rollout-temperature", "0"), "--rollout-temperature must be above 0"),
    "global batch 48": (flag("--global-batch-size", "48"), "64 samples (8 x 8) are no multiple of --global-batch-size 48"),
    "steps that do not divide": (flag("--num-steps-per-rollout", "3"), "do not divide into --num-steps-per-rollout 3"),
    "dynamic batch without a cap": (drop("--max-tokens-per-gpu"), "--use-dynamic-batch-size needs --max-tokens-per-gpu"),
    "padding above the micro-batch": (
        flag("--data-pad-size-multiplier", "8192"),
        "the stream is padded to a multiple of 262,144",
    ),
    "kl without reference": (lambda r: r.without("--ref-load").with_flag("--use-kl-loss"), "give --ref-load"),
    "save interval 0": (flag("--save-interval", "0"), "--save-interval must be at least 1, got 0"),
    "prompts in csv": (flag("--prompt-data", "/data/prompts.csv"), "neither .jsonl nor .parquet"),
    "reward path without a module": (flag("--custom-rm-path", "grade"), "no dotted path"),
    "reward module that is not there": (
        flag("--custom-rm-path", "slime.rollout.rm_hub.grade_fast.grade"),
        "there is no module slime.rollout.rm_hub.grade_fast",
    ),
    "filter that its module does not have": (
        flag("--dynamic-sampling-filter-path", "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward"),
        "defines no check_reward",
    ),
    "groups of 192": (yaml("num_gpus: 192", "num_gpus: 128"), "64 + 128 = 192, but rollout has 256"),
    "group no multiple of its engines": (yaml("num_gpus: 192", "num_gpus: 176"), "no multiple of num_gpus_per_engine 64"),
    "one engine of 256": (
        lambda r: (
            r.with_yaml(
                "worker_type: prefill\n        num_gpus: 64\n        num_gpus_per_engine: 64",
                "worker_type: regular\n        num_gpus: 256\n        num_gpus_per_engine: 256",
            )
            .with_yaml(r.yaml[r.yaml.index("      - worker_type: decode") :], "")
            .with_yaml("dp_size: 64", "dp_size: 256")
            .with_yaml("ep_size: 64", "ep_size: 256")
        ),
        "DeepEP has no dispatch configuration for EP 256 (at most 160 ranks)",
    ),
    "decode alone": (
        lambda r: r.with_yaml(
            r.yaml[r.yaml.index("      - worker_type: prefill") : r.yaml.index("      - worker_type: decode")], ""
        ),
        "decode groups alone",
    ),
    "unknown YAML key": (yaml("num_gpus: 192", "num_gpu: 192"), "unknown key"),
    "misspelled engine option": (yaml("cuda_graph_max_bs: 12", "cuda_graph_max_batch: 12"), "has no such option"),
    "deepep mode": (yaml("deepep_mode: low_latency", "deepep_mode: lowlatency"), "is one of auto, low_latency, normal"),
    "normal dispatch in decode": (yaml("deepep_mode: low_latency", "deepep_mode: normal"), "cannot be captured in CUDA graphs"),
    "decode batch 13": (yaml("cuda_graph_max_bs: 12", "cuda_graph_max_bs: 13"), "is 64, below the largest decode batch"),
    "dispatch tokens 32": (
        lambda r: r.with_env(SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK="32"),
        "set SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=64",
    ),
    "attention dp 48": (yaml("dp_size: 64", "dp_size: 48"), "must divide the tensor parallel size 64"),
    "expert ranks 24": (yaml("ep_size: 64", "ep_size: 24"), "ep_size 24 must divide"),
    "shared experts cut FP8 blocks": (yaml("ep_size: 64", "ep_size: 2"), "which cuts FP8 blocks of 128"),
    "page size 16": (flag("--sglang-page-size", "16"), "sparse attention works on pages of 64"),
    "KV cache e5m2": (flag("--sglang-kv-cache-dtype", "fp8_e5m2"), "has no sparse-attention kernel"),
    "flashmla_kv on bf16": (flag("--sglang-kv-cache-dtype", "bf16"), "flashmla_kv reads an FP8 cache"),
    "dense attention backend": (flag("--sglang-attention-backend", "fa3"), "is not sparse attention"),
    "cache types differ": (
        yaml("deepep_mode: auto", "deepep_mode: auto\n          kv_cache_dtype: bf16"),
        "prefill and decode differ on the KV cache",
    ),
    "KV awaited by another than the default": (
        lambda r: r.without("--sglang-disaggregation-transfer-backend").with_yaml(
            "deepep_mode: low_latency", "deepep_mode: low_latency\n          disaggregation_transfer_backend: nixl"
        ),
        "prefill sends by mooncake, decode receives by nixl",
    ),
    "KV sent by another than the flag's": (
        lambda r: r.with_flag("--sglang-disaggregation-transfer-backend", "nixl").with_yaml(
            "deepep_mode: auto", "deepep_mode: auto\n          disaggregation_transfer_backend: mooncake"
        ),
        "prefill sends by mooncake, decode receives by nixl",
    ),
    "draft tokens 4": (flag("--sglang-speculative-num-draft-tokens", "4"), "a chain of 4 steps has 5 tokens, not 4"),
    "two-batch overlap": (flag("--sglang-enable-two-batch-overlap"), "two-batch overlap is refused"),
    "flag that slime sets": (flag("--sglang-port", "30000"), "--sglang-port is set by slime itself"),
}

FULL: dict[str, tuple[Edit, str]] = {
    "no recomputation at the same length": (drop("--recompute-granularity"), "in phase train"),
    "micro-batches sixteen times as long": (flag("--max-tokens-per-gpu", "131072"), "in phase train"),
    # By queries these fit: a rank then keeps a quarter of the index selections.
    "micro-batches ten times as long, core by heads": (
        lambda r: r.with_flag("--max-tokens-per-gpu", "81920").with_flag("--dsa-core-axis", "heads"),
        "in phase train",
    ),
    "optimizer on the GPU": (
        lambda r: r.without("--optimizer-cpu-offload").without("--overlap-cpu-optimizer-d2h-h2d"),
        "--optimizer-cpu-offload",
    ),
    "half the experts on a GPU": (lambda r: r.with_flag("--expert-model-parallel-size", "8"), "in phase"),
    "KV cache too small for one sample": (flag("--sglang-mem-fraction-static", "0.42"), "the KV cache holds"),
    "engine memory above the GPU": (flag("--sglang-mem-fraction-static", "0.97"), "in phase rollout"),
}

VARIANTS: dict[str, Edit] = {
    "as the launcher has it": lambda r: r,
    "best first/last pair": lambda r: r.with_flag("--decoder-first-pipeline-num-layers", "2").with_flag(
        "--decoder-last-pipeline-num-layers", "4"
    ),
    "explicit list": lambda r: (
        r.without("--decoder-first-pipeline-num-layers")
        .without("--decoder-last-pipeline-num-layers")
        .with_flag("--pipeline-model-parallel-layout", "10,12,8,12,8,12,8,8")
    ),
    "stages on shared layers, indices sent": lambda r: (
        r.with_flag("--decoder-first-pipeline-num-layers", "15")
        .with_flag("--decoder-last-pipeline-num-layers", "15")
        .with_flag("--dsa-send-indices")
    ),
    "pp 4, dp 2": lambda r: r.with_flag("--pipeline-model-parallel-size", "4"),
    "tp 8, cp 4": lambda r: r.with_flag("--tensor-model-parallel-size", "8").with_flag("--context-parallel-size", "4"),
    "cp 4, dp 2": lambda r: r.with_flag("--context-parallel-size", "4"),
    "the draft layer trains": lambda r: r.with_flag("--mtp-num-layers", "1").with_flag("--enable-mtp-training"),
    "ep 16": lambda r: r.with_flag("--expert-model-parallel-size", "16"),
    "16 nodes": lambda r: (
        r.with_flag("--actor-num-nodes", "16")
        .with_flag("--context-parallel-size", "4")
        .with_flag("--expert-model-parallel-size", "16")
        .with_yaml("num_gpus: 192", "num_gpus: 64")
    ),
    "BF16 rollout": lambda r: r.with_flag("--hf-checkpoint", "/BASE_DIR/GLM-5.2"),
    "16 samples in 2 steps": lambda r: r.with_flag("--n-samples-per-prompt", "16"),
    "bf16 cache": lambda r: r.with_flag("--sglang-kv-cache-dtype", "bf16").with_flag(
        "--sglang-nsa-decode-backend", "flashmla_sparse"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_caught(name: str, flagship: Recipe, tmp_path: Path) -> None:
    edit, message = MISTAKES[name]
    done = run(edit(flagship), tmp_path)
    found = violations(done)
    assert any(message in line for line in found), f"wanted {message!r} in:\n" + "\n".join(found)
    assert all("fix:" in line for line in found), found


@pytest.mark.parametrize("name", FULL)
def test_memory_that_is_not_there_is_caught(name: str, flagship: Recipe, tmp_path: Path) -> None:
    edit, message = FULL[name]
    found = violations(run(edit(flagship), tmp_path, quick=False))
    assert any(message in line for line in found), f"wanted {message!r} in:\n" + "\n".join(found)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_legal_variant_passes(name: str, flagship: Recipe, tmp_path: Path) -> None:
    done = run(
        VARIANTS[name](flagship),
        tmp_path,
        quick=name not in ("as the launcher has it", "16 nodes"),
        gpu_memory_gb=141 if name == "16 nodes" else 80,
    )
    assert not violations(done), "\n".join(violations(done))


def test_node_counts_that_would_fit(flagship: Recipe, tmp_path: Path) -> None:
    """32 nodes fit 80 GB, 16 only 141: twice the experts per GPU, held twice while loading. On 8, 16 layers x 32 experts alone
    are 19.3 B x 6 bytes."""
    fits = {fit.nodes: fit for fit in run(flagship, tmp_path, quick=False).budget.fits}
    assert fits[32].fits and (fits[32].cp, fits[32].ep) == (8, 32) and fits[32].peak_gb == pytest.approx(57.3, abs=0.1)
    assert not fits[8].fits and (fits[8].cp, fits[8].ep) == (2, 8) and fits[8].peak_gb > 16 * 32 * 37_748_736 * 6 / 1e9
    larger = {fit.nodes: fit.fits for fit in run(flagship, tmp_path, quick=False, gpu_memory_gb=141).budget.fits}
    assert larger[16] and not larger[8] and not fits[16].fits


def test_many_mistakes_are_all_reported_at_once(flagship: Recipe, tmp_path: Path) -> None:
    recipe = (
        flagship.with_flag("--globl-batch-size", "3")
        .with_flag("--num-attention-heads", "60")
        .without("--allgather-cp")
        .with_flag("--sglang-page-size", "16")
    )
    found = "\n".join(violations(run(recipe.with_flag("--global-batch-size", "48"), tmp_path)))
    for message in (
        "did you mean --global-batch-size",
        "num_attention_heads",
        "pass --allgather-cp",
        "pages of 64",
        "no multiple of --global-batch-size 48",
    ):
        assert message in found


@pytest.mark.parametrize(
    ("name", "folder", "sizes"), [("qwen3-4B", "Qwen3-4B", ("2", "1")), ("qwen3-30B-A3B", "Qwen3-30B-A3B", ("4", "8"))]
)
def test_other_models_pass(name: str, folder: str, sizes: tuple[str, str]) -> None:
    argv = one_node(name, folder, tp=sizes[0], ep=sizes[1])
    done = rehearse(argv, Options(build_ranks=False, engine_version="0.5.23"))
    assert not violations(done), "\n".join(violations(done))


def test_files_that_are_there_are_read(flagship: Recipe, tmp_path: Path) -> None:
    checkpoint, prompts = tmp_path / "GLM-5.2-FP8", tmp_path / "p.jsonl"
    checkpoint.mkdir()
    raw = dict(known_config("/x/GLM-5.2-FP8"))
    (checkpoint / "config.json").write_text(json.dumps(raw))
    prompts.write_text('{"prompt": "1+1", "label": "2"}\n{"prompt": "2+2", "answer": "4"}\n')
    recipe = flagship.with_flag("--hf-checkpoint", str(checkpoint)).with_flag("--prompt-data", str(prompts))
    found = "\n".join(violations(run(recipe, tmp_path)))
    assert "the last line has no 'label'" in found and "columns: answer, prompt" in found

    assert "first and last row have the columns" not in "\n".join(f.what for f in run(recipe, tmp_path).findings.of("ok"))

    prompts.write_text('[1]\n{"prompt": [{"role": "user"}], "label": "2"}\n')
    assert "the first line is a list, not a JSON object" in "\n".join(violations(run(recipe, tmp_path)))
    prompts.write_text('{"prompt": "", "label": "2"}\n{"prompt": [{"role": "user"}], "label": "2"}\n')
    found = "\n".join(violations(run(recipe, tmp_path)))
    assert "the first line has an empty text under 'prompt'" in found
    assert "the last line has a message without role and content" in found

    turns = [{"role": "user", "content": "w?"}, {"role": "assistant", "tool_calls": [{"function": {"name": "get"}}]}]
    prompts.write_text(json.dumps({"prompt": turns, "label": "2"}) + "\n")
    assert "without role" not in "\n".join(violations(run(recipe, tmp_path)))

    prompts.write_text('{"prompt": "1+1", "label": "2"}\n{"prompt": "2+')
    assert "the last line is not JSON" in "\n".join(violations(run(recipe, tmp_path)))
    sliced = recipe.with_flag("--prompt-data", f"{prompts}@[:1]")
    assert not [line for line in violations(run(sliced, tmp_path)) if "p.jsonl" in line]
    sliced = recipe.with_flag("--prompt-data", f"{prompts}@[-1:]")
    assert "p.jsonl:2: not JSON" in "\n".join(violations(run(sliced, tmp_path)))

    prompts.write_text('{"prompt": "1+1", "label": "2"}\n')
    hosts = tmp_path / "hosts"

    def told(lines: list[str], head: str | None = None) -> str:
        hosts.write_text("\n".join(lines) + "\n")
        return "\n".join(violations(run(recipe, tmp_path, hostfile=str(hosts), head=head)))

    found = told(["10.0.0.1", "10.0.0.1", "10.0.0.999"])
    assert "no address [10.0.0.999]" in found and "are 3 nodes, the run wants 32 [twice: 10.0.0.1]" in found
    # As launchers read it: the first column, comments apart, repetitions and the first node itself as one.
    workers = [f"10.0.1.{number} slots=8  # rack 1" for number in range(31)]
    assert not told([*workers, workers[0]]) and not told(workers, "10.0.0.1") and not told(["10.0.0.1", *workers], "10.0.0.1")
    assert "the first node 10.0.1.3 are 31 nodes, the run wants 32" in told(workers, "10.0.1.3")


def test_a_checkpoint_index_is_checked_name_by_name(flagship: Recipe, tmp_path: Path) -> None:
    from slime.model.names import NameTable

    names = NameTable.for_model(known_config("/x/GLM-5.2-FP8")).hf_names(fp8=True)
    lost, stray = "model.layers.40.mlp.experts.17.up_proj.weight", "model.layers.3.self_attn.indexers_proj.weight"
    index = {"metadata": {"total_size": 755_617_140_416}, "weight_map": {name: "model-00001.safetensors" for name in names}}
    file = tmp_path / "index.json"
    file.write_text(json.dumps(index))
    assert not violations(run(flagship, tmp_path, checkpoint_index=str(file)))
    del index["weight_map"][lost]
    index["weight_map"][stray] = "model-00001.safetensors"
    file.write_text(json.dumps(index))
    found = "\n".join(violations(run(flagship, tmp_path, checkpoint_index=str(file))))
    assert f"1 tensors are missing from {file} [{lost}]" in found and stray in found


def test_a_parquet_file_is_read_at_both_ends(flagship: Recipe, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "p.parquet"
    recipe = flagship.with_flag("--prompt-data", str(file))
    rows = [{"prompt": "1+1", "label": "2"}, {"prompt": "2+2", "label": "4"}, {"prompt": "", "label": "6"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)
    assert "the last row has an empty text under 'prompt'" in "\n".join(violations(run(recipe, tmp_path)))
    assert not violations(run(flagship.with_flag("--prompt-data", f"{file}@[0:2]"), tmp_path))
    found = "\n".join(violations(run(flagship.with_flag("--prompt-data", f"{file}@[1:]"), tmp_path)))
    assert "@[1:]: the last row has an empty text" in found
    assert "@[3:] takes no row" in "\n".join(violations(run(flagship.with_flag("--prompt-data", f"{file}@[3:]"), tmp_path)))
    parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), file)
    assert not violations(run(recipe, tmp_path))
    file.write_bytes(b"PAR1 torn")
    assert "is no parquet file" in "\n".join(violations(run(recipe, tmp_path)))


def test_a_save_folder_without_room_or_permission_is_caught(
    flagship: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GLM-5.2: 743,377,000,704 parameters x (2 + 12) bytes = 10.4 TB."""
    from slime.rehearse.checks import files as file_checks

    recipe = flagship.with_flag("--save", str(tmp_path / "run"))
    monkeypatch.setattr(file_checks.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10_000_000_000_000}))
    [found] = violations(run(recipe, tmp_path))
    assert "has no room for one checkpoint" in found and "free 10000.0 GB, one checkpoint 10407.3 GB" in found
    assert not violations(run(recipe.with_flag("--no-save-optim"), tmp_path))
    monkeypatch.setattr(file_checks.os, "access", lambda folder, mode: False)
    assert "cannot be written by this user" in violations(run(recipe, tmp_path))[0]
