"""Words -> values: types, switches, lists, typos, and flags that are not there yet."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
from config.flags import MINIMAL, MOE, config_of

from slime.config import Config, ConfigError, FrozenMap, load, parse
from slime.config.command_line import SECTIONS, flag_table
from slime.config.flags import field_default, field_docs
from slime.config.help import listing


@pytest.mark.parametrize(
    ("words", "section", "name", "value"),
    [
        (["--lr", "1e-5"], "optimizer", "lr", 1e-5),
        (["--lr=1e-5"], "optimizer", "lr", 1e-5),
        (["--rollout-top-k", "-1"], "rollout", "rollout_top_k", -1),
        (["--global-batch-size", "4", "--global-batch-size", "8"], "batch", "global_batch_size", 8),
        (["--rollout-stop", "</a>", "b c"], "rollout", "rollout_stop", ("</a>", "b c")),
        (["--rollout-stop=--"], "rollout", "rollout_stop", ("--",)),
        (["--rollout-stop-token-ids", "1", "2"], "rollout", "rollout_stop_token_ids", (1, 2)),
        (["--spec", "a.b", "c"], "model", "spec", ("a.b", "c")),
        (["--apply-chat-template-kwargs", '{"think": false}'], "data", "apply_chat_template_kwargs", {"think": False}),
        (["--no-offload-train"], "cluster", "offload_train", False),
        (["--disable-grpo-std-normalization"], "algorithm", "grpo_std_normalization", False),
        (["--no-check-for-nan-in-loss-and-grad"], "optimizer", "check_for_nan_in_loss_and_grad", False),
        (["--rollout-sample-hook-path", "a.b", "--rollout-sample-hook-path", "c.d"],
         "rollout", "rollout_sample_hook_path", ("a.b", "c.d")),
        (["--override-opt_param-scheduler"], "optimizer", "override_opt_param_scheduler", True),
        (["--save-hf", "x/{rollout_id}", "--save", "y"], "checkpoint", "save_hf", "x/{rollout_id}"),
        (["--on-broken-prompt-line", "skip"], "data", "on_broken_prompt_line", "skip"),
        (["--params-dtype", "fp32"], "model", "params_dtype", "fp32"),
        (["--bf16"], "model", "params_dtype", "bf16"),
    ],
)  # fmt: skip
def test_words_become_typed_values(words: list[str], section: str, name: str, value: object):
    assert getattr(getattr(config_of(*words), section), name) == value


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--norm-epsilon", "1e-6"], "layernorm_epsilon", 1e-6),
        (["--disable-bias-linear"], "add_bias_linear", False),
        (["--swiglu"], "gated_linear_unit", True),
        (["--no-rope-fusion"], "apply_rope_fusion", False),
        (["--attention-backend", "flash"], "attention_backend", "flash"),
        (
            ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
            "recompute_num_layers",
            1,
        ),
        (["--recompute-modules", "moe"], "recompute_modules", ["moe"]),
        (["--qk-layernorm"], "qk_layernorm", True),
        (["--group-query-attention", "--num-query-groups", "2"], "num_query_groups", 2),
        ([*MOE, "--moe-layer-freq", "[0]*3+[1]*5"], "moe_layer_freq", [0, 0, 0, 1, 1, 1, 1, 1]),
        ([*MOE, "--moe-layer-freq", "[0, 0,0,1,1,1,1,1]"], "moe_layer_freq", [0, 0, 0, 1, 1, 1, 1, 1]),
        ([*MOE, "--moe-layer-freq", "2"], "moe_layer_freq", 2),
        ([*MOE], "num_moe_experts", 8),
        ([*MOE], "moe_token_dispatcher_type", "alltoall"),
        ([*MOE, "--moe-aux-loss-coeff", "0"], "moe_aux_loss_coeff", 0.0),
        ([*MOE, "--moe-router-load-balancing-type", "seq_aux_loss"], "moe_router_load_balancing_type", "seq_aux_loss"),
        (["--multi-latent-attention", "--q-lora-rank", "64"], "q_lora_rank", 64),
        (["--multi-latent-attention", "--rotary-base", "8000000"], "rotary_base", 8e6),
        (["--multi-latent-attention"], "rope_type", "rope"),
        (["--multi-latent-attention"], "rotary_scaling_factor", 1.0),
        (["--multi-latent-attention", "--rotary-scaling-factor", "40"], "rope_type", "yarn"),
        (["--multi-latent-attention", "--rotary-scaling-factor", "40"], "original_max_position_embeddings", 4096),
    ],
)
def test_megatron_flags_become_fields_of_its_config(words: list[str], name: str, value: object):
    assert config_of(*words).model.megatron[name] == value


def test_what_was_not_said_is_not_passed_to_megatron():
    assert dict(config_of().model.megatron) == {"num_layers": 8, "hidden_size": 128, "num_attention_heads": 4}


def test_optimizer_and_gradient_buffer_fields_land_where_they_belong():
    config = config_of(
        "--log-num-zeros-in-grad", "--pad-buckets-for-high-nccl-busbw", "--align-param-gather", "--adam-beta2", "0.98"
    )
    assert dict(config.optimizer.megatron) == {"log_num_zeros_in_grad": True}
    assert dict(config.optimizer.ddp) == {"pad_buckets_for_high_nccl_busbw": True, "align_param_gather": True}
    assert config.optimizer.adam_beta2 == 0.98


def test_engine_flags_are_carried_as_text():
    config = config_of(
        "--sglang-mem-fraction-static",
        "0.7",
        "--sglang-enable-metrics",
        "--sglang-cuda-graph-bs",
        "1",
        "2",
        "--router-policy",
        "manual",
    )
    assert dict(config.engine.sglang) == {"mem_fraction_static": "0.7", "enable_metrics": True, "cuda_graph_bs": "1 2"}
    assert dict(config.engine.router) == {"policy": "manual"}
    assert config.args.sglang_mem_fraction_static == "0.7"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rolout-batch-size", "4"], "unknown flag --rolout-batch-size; did you mean --rollout-batch-size?"),
        (["--tensor-model-paralel-size", "2"], "did you mean --tensor-model-parallel-size?"),
        (["--sglang-confg", "x"], "did you mean --sglang-config?"),
        (["--sglang-router-prot", "1"], "did you mean --sglang-router-port?"),
        (["--dsa"], "unknown flag --dsa"),
        (["--loa", "x"], "unknown flag --loa"),  # no abbreviations
        (["--lr", "fast"], "--lr wants a number, got 'fast'"),
        (["--num-rollout", "1.5"], "--num-rollout wants a whole number, got '1.5'"),
        (["--num-rollout"], "--num-rollout wants exactly 1"),
        (["--num-rollout", "1", "2"], "--num-rollout wants exactly 1, got '1 2'"),
        (["--colocate", "true"], "--colocate is a switch and takes no value, got 'true'"),
        (["--kl-loss-type", "k4"], "--kl-loss-type wants one of k1, k2, k3, low_var_kl, got 'k4'"),
        (["--spec", "only.one"], "--spec wants exactly 2, got 'only.one'"),
        (["--train-env-vars", "{"], "--train-env-vars wants a JSON object"),
        (["--train-env-vars", "[1]"], "--train-env-vars wants a JSON object"),
        (["--moe-layer-freq", "__import__('os').getcwd()"], "--moe-layer-freq only numbers, lists, +, -, * and ** may be used"),
        (["--moe-layer-freq", "[1]*999999999"], "too long"),
        (["--moe-layer-freq", "[0]*3+[2]"], "list of 0 and 1"),
        (["--fp16"], "--fp16: this version does not have fp16 training"),
        (["--release-train"], "--release-train: this version does not have"),
        (["--update-weight-mode", "delta"], "--update-weight-mode delta travels in files alone"),
        (["--fp8-format", "e4m3"], "--fp8-format: this version does not have FP8"),
        (["--cuda-graph-impl", "local"], "this version does not have CUDA graphs"),
        (["--sglang-tp-size", "4"], "--sglang-tp-size is set by slime itself; use --rollout-num-gpus-per-engine"),
        (["--sglang-port", "4"], "--sglang-port is set by slime itself; remove it"),
        (["--router-port", "4"], "use --sglang-router-port"),
    ],
)
def test_a_wrong_word_is_refused_with_the_way_out(words: list[str], said: str):
    with pytest.raises(ConfigError) as error:
        config_of(*words)
    assert said in str(error.value)


def test_a_word_without_a_flag_is_refused():
    with pytest.raises(ConfigError, match="'stray' stands alone"):
        parse(["stray", *MINIMAL])


def test_all_mistakes_are_said_at_once():
    with pytest.raises(ConfigError) as error:
        config_of("--nope", "--lr", "x", "--fp16")
    assert len(str(error.value).split("\n")) == 3


def test_an_unknown_flag_ends_the_program_without_a_heavy_import():
    code = (
        "import sys\n"
        "from slime.config import load\n"
        "try:\n    load(['--rolout-batch-size', '4'])\n"
        "except SystemExit as end:\n"
        "    heavy = sorted({'torch', 'numpy', 'megatron', 'sglang', 'ray'} & set(sys.modules))\n"
        "    print(end.code, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"
    assert done.stderr == "slime: unknown flag --rolout-batch-size; did you mean --rollout-batch-size?\n"


def test_a_later_none_takes_a_launchers_switch_back():
    assert config_of().cluster.colocate
    assert not config_of("--colocate", "none", "--rollout-num-gpus", "1").cluster.colocate


@pytest.mark.parametrize("door", ["slime.train", "slime.config"])
def test_the_doors_answer_a_typo_with_status_2_before_any_heavy_import(door: str):
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'numpy', 'megatron', 'sglang', 'ray'): sys.modules[name] = None\n"
        "runpy.run_module(sys.argv.pop(1), run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, door, "--num-rolout", "4"], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "did you mean --num-rollout?" in done.stderr


def test_the_conversion_door_takes_the_model_alone():
    words = [
        *MINIMAL[: MINIMAL.index("--colocate")],
        "--save",
        "/out",
        "--allgather-cp",
        "--decoder-last-pipeline-num-layers",
        "2",
    ]
    words += ["--pipeline-model-parallel-size", "2", "--tensor-model-parallel-size", "2"]
    config = parse(words, door="convert")
    assert (config.checkpoint.save, config.parallel.world_size, config.parallel.data_parallel_size) == ("/out", None, None)
    assert parse([*words, "--mtp-num-layers", "1"], door="convert").model.mtp_num_layers == 1
    with pytest.raises(ConfigError, match="--colocate has no meaning for a conversion"):
        parse([*words, "--colocate"], door="convert")


def test_a_config_cannot_be_changed_and_travels():
    config = config_of("--train-env-vars", '{"A": "1"}')
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optimizer.lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not change after load"):
        config.model.megatron["num_layers"] = 1  # type: ignore[index]
    with pytest.raises(TypeError):
        config.cluster.train_env_vars |= {"B": "2"}  # type: ignore[operator]
    again = pickle.loads(pickle.dumps(config))
    assert again == config and isinstance(again.model.megatron, FrozenMap)
    assert pickle.loads(pickle.dumps(config.args)).lr == 1e-6


def test_args_is_a_flat_read_only_view():
    args = config_of("--norm-epsilon", "1e-6", *MOE).args
    assert (args.lr, args.rollout_batch_size, args.tensor_model_parallel_size, args.num_layers) == (1e-6, 4, 1, 8)
    assert (args.norm_epsilon, args.layernorm_epsilon, args.num_experts) == (1e-6, 1e-6, 8)
    assert args.init_method_std == 0.02  # megatron-core's default of a flag that was not given
    assert args.use_critic is False and args.eval_datasets == []
    with pytest.raises(AttributeError, match="did you mean rollout_batch_size"):
        _ = args.rollout_batchsize
    assert getattr(args, "nothing_like_this", 5) == 5
    with pytest.raises(AttributeError, match="read-only"):
        args.lr = 2
    more = args.with_runtime(sglang_router_ip="127.0.0.1", engine_token="t")
    assert (more.sglang_router_ip, more.engine_token, args.sglang_router_ip) == ("127.0.0.1", "t", None)
    assert "lr" in list(args) and "engine_token" in list(more)


def test_one_call_of_a_plugin_may_write_its_view_and_nobody_else_sees_it():
    args = config_of().args.with_runtime(engine_token="t")
    mine, other = args.for_call(), args.for_call()
    mine.sampling_params, mine.lr = {"top_p": 0.5}, 3.0
    assert (mine.lr, mine.engine_token, other.lr, args.lr) == (3.0, "t", 1e-6, 1e-6)
    assert not hasattr(other, "sampling_params") and not hasattr(args, "sampling_params")
    inner = mine.for_call()
    inner.lr = 4.0
    assert (inner.sampling_params, mine.lr) == ({"top_p": 0.5}, 3.0)
    del inner.lr
    assert inner.lr == 1e-6
    with pytest.raises(AttributeError, match="set no 'lr'"):
        del inner.lr


def test_a_view_can_be_copied_sent_and_listed_like_a_namespace():
    mine = config_of().args.for_call()
    mine.results, mine.lr = {"solver": []}, 3.0
    deep, shallow, sent = copy.deepcopy(mine), copy.copy(mine), pickle.loads(pickle.dumps(mine))
    deep.results["solver"].append(1)
    shallow.more = 1
    assert mine.results == {"solver": []} == sent.results and sent.lr == 3.0 and not hasattr(mine, "more")
    deep.itself = deep
    assert copy.deepcopy(deep).itself is not deep
    listed = vars(mine)
    listed["lr"] = 9
    assert listed["results"] is mine.results and mine.lr == 3.0 and set(listed) == set(mine)
    assert argparse.Namespace(**vars(mine)).rollout_batch_size == 4


def test_every_flag_has_a_meaning_in_the_listing():
    """The help of a flag is its field's docstring; a flag without one is a bug of ours."""
    for section, cls in SECTIONS.items():
        docs = field_docs(cls)
        silent = [row.name for row in flag_table().values() if row.section == section and not docs.get(row.dest)]
        assert silent == [], section
    text = listing()
    assert all(name in text for name in flag_table() if not name.startswith("--no-"))
    assert "--rollout-batch-size" not in listing(door="convert")


def test_help_ends_with_status_0(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        load(["--help"])
    assert end.value.code == 0 and "--rollout-batch-size" in capsys.readouterr().out


def test_every_default_is_a_legal_value():
    """A flag given with its own default as text gives the default again."""
    for section, cls in SECTIONS.items():
        for item in dataclasses.fields(cls):
            default = field_default(item)
            rows = [row for row in flag_table().values() if (row.section, row.dest) == (section, item.name)]
            if rows and rows[0].num_values == 1 and not rows[0].append and isinstance(default, int | float | str):
                assert rows[0].convert(str(default)) == default, rows[0].name


def test_sections_of_config_and_of_the_parser_are_the_same():
    assert set(SECTIONS) | {"notes", "door"} == {item.name for item in dataclasses.fields(Config)}
