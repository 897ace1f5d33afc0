"""The YAML files that flags name, the HF config, and the stored table of Megatron's fields."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from config.flags import MOE, config_of

from slime.config import ConfigError, EvalDataset
from slime.config.engine_groups import read_models
from slime.config.expressions import evaluate
from slime.config.facts import Facts
from slime.config.megatron_table import differences, installed_table, read_table


def written(folder: Path, text: str, name: str = "x.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# ----------------------------------------------------------------------------------------------------- --sglang-config

PD = """
sglang:
  - name: default
    server_groups:
      - {worker_type: prefill, num_gpus: 2, num_gpus_per_engine: 2, overrides: {chunked-prefill-size: 4096}}
      - {worker_type: decode, num_gpus: 6, num_gpus_per_engine: 2, overrides: {cuda_graph_max_bs: 12}}
"""
EIGHT = ["--actor-num-gpus-per-node", "8"]


def test_groups_of_the_yaml(tmp_path: Path):
    config = config_of(*EIGHT, "--sglang-config", written(tmp_path, PD))
    (model,) = config.engine.groups
    assert (model.name, model.model_path, model.update_weights) == ("default", "/models/x", True)
    assert [(group.worker_type, group.num_gpus, group.num_engines) for group in model.server_groups] == [
        ("prefill", 2, 1),
        ("decode", 6, 3),
    ]
    assert dict(model.server_groups[0].overrides) == {"chunked_prefill_size": 4096}
    assert any("chunked-prefill-size is read as chunked_prefill_size" in note for note in config.notes)


def test_a_second_model_is_not_updated_and_says_so(tmp_path: Path):
    text = (
        PD.replace("num_gpus: 6", "num_gpus: 4") + "  - {name: judge, model_path: /models/j, server_groups: [{num_gpus: 2}]}\n"
    )
    file = written(tmp_path, text)
    models, notes = read_models(file, hf_checkpoint="/models/x", default_gpus_per_engine=1)
    assert [model.update_weights for model in models] == [True, False]
    assert models[1].server_groups[0].worker_type == "regular"
    assert any("'judge': update_weights = False, because its model_path" in note for note in notes)
    assert config_of(*EIGHT, "--sglang-config", file).engine.groups == models


def test_engine_gpus_are_derived_from_the_yaml_when_nothing_else_says_them(tmp_path: Path):
    from config.flags import MINIMAL

    from slime.config import parse

    words = [word for word in MINIMAL if word != "--colocate"]
    assert parse([*words, "--sglang-config", written(tmp_path, PD)], facts=Facts()).cluster.rollout_num_gpus == 8


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("num_gpus: 6", "num_gpus: 4", "num_gpus of all groups is 2 + 4 = 6, but rollout has 8 GPUs (all training GPUs"),
        ("num_gpus: 6", "num_gpu: 6", "unknown key at sglang[0].server_groups[1]: 'num_gpu'; did you mean num_gpus?"),
        ("server_groups", "server_group", "unknown key at sglang[0]: 'server_group'; did you mean server_groups?"),
        ("sglang:", "sglnag:", "unknown key at the top: 'sglnag'; did you mean sglang?"),
        ("prefill", "prefil", "worker_type is 'prefil'; did you mean prefill? (legal: regular, prefill,"),
        ("num_gpus: 6", "num_gpus: 0", "num_gpus must be a whole number above 0, found 0"),
        ("num_gpus: 6", "num_gpus: true", "num_gpus must be a whole number above 0, found True"),
        ("num_gpus: 6", "num_gpus: 5", "num_gpus 5, which is no multiple of num_gpus_per_engine 2"),
        ("worker_type: decode", "worker_type: prefill", "has prefill groups alone"),
        ("name: default", "nickname: default", "'nickname'"),
        ("{cuda_graph_max_bs: 12}", "[12]", "overrides must be a mapping"),
        ("{cuda_graph_max_bs: 12}", "{model_path: /other}", "so no engine would get what is trained"),
        ("{cuda_graph_max_bs: 12}", "{a-b: 1, a_b: 2}", "a_b twice"),
        ("{cuda_graph_max_bs: 12}", "{cuda_graph_max_bs: 12", "is not YAML at line"),
        ("  - name: default\n", "  - name: default\n    update_weights: maybe\n", "update_weights must be true or false"),
        ("  - name: default\n", "  - name: default\n    engine_groups: []\n", "two names of one thing"),
    ],
)  # fmt: skip
def test_a_wrong_engine_file_is_one_clear_error(tmp_path: Path, old: str, new: str, said: str):
    file = written(tmp_path, PD.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        config_of(*EIGHT, "--sglang-config", file)
    assert said in str(error.value) and file in str(error.value)


def test_two_models_cannot_both_learn(tmp_path: Path):
    text = PD.replace("num_gpus: 6", "num_gpus: 4") + "  - {name: b, server_groups: [{num_gpus: 2}]}\n"
    with pytest.raises(ConfigError, match="would all receive the trainer's weights"):
        config_of(*EIGHT, "--sglang-config", written(tmp_path, text))


def test_a_missing_file_names_the_flag():
    with pytest.raises(ConfigError, match="--sglang-config: no file '/nowhere.yaml'"):
        config_of("--sglang-config", "/nowhere.yaml")


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_pairs_take_every_setting_from_the_flags():
    config = config_of(
        "--eval-interval", "5", "--eval-prompt-data", "aime", "/a.jsonl", "gsm", "/g.jsonl", "--input-key", "prompt",
        "--label-key", "label", "--rollout-temperature", "0.8", "--eval-top-p", "0.7", "--rollout-max-response-len", "64",
        "--n-samples-per-eval-prompt", "3",
    )  # fmt: skip
    assert config.evaluation.datasets[0] == EvalDataset(
        name="aime", path="/a.jsonl", input_key="prompt", label_key="label", tool_key="tools", temperature=0.8, top_p=0.7,
        max_response_len=64, n_samples_per_eval_prompt=3, skip_special_tokens=False,
    )  # fmt: skip
    assert config.evaluation.datasets[1].name == "gsm"
    assert config.args.eval_prompt_data == ("aime", "/a.jsonl", "gsm", "/g.jsonl")


EVAL = """
eval:
  defaults: {temperature: 1e-5, n_samples_per_eval_prompt: 2}
  datasets:
    - {name: a, path: /a.jsonl, temperature: 0.5, stop: END}
    - {name: b, path: /b.jsonl, rm_type: random, metadata_overrides: {level: 3}}
"""


def test_an_entry_wins_over_defaults_which_win_over_flags(tmp_path: Path):
    config = config_of("--eval-config", written(tmp_path, EVAL), "--eval-temperature", "0.9", "--eval-top-k", "5")
    first, second = config.evaluation.datasets
    assert (first.temperature, first.stop, first.n_samples_per_eval_prompt, first.top_k) == (0.5, ("END",), 2, 5)
    assert (second.temperature, second.rm_type, dict(second.metadata_overrides)) == (1e-5, "random", {"level": 3})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("temperature: 0.5", "temprature: 0.5", "unknown key at eval.datasets[0]: 'temprature'; did you mean temperature?"),
        ("  datasets:", "  data_sets:", "unknown key at eval: 'data_sets'; did you mean datasets?"),
        ("temperature: 1e-5", "top_kk: 1", "unknown key at eval.defaults: 'top_kk'; did you mean top_k?"),
        ("temperature: 0.5", "temperature: warm", "eval.datasets[0].temperature: 'warm' is no number"),
        ("path: /b.jsonl, ", "", "eval.datasets[1] needs path as text"),
        ("name: b", "name: a", "found twice: a"),
        ("rm_type: random", "reward_model: x", "does not act on reward_model"),
        ("temperature: 0.5", "temperature: true", "eval.datasets[0].temperature: True is no number (wants a number)"),
        ("stop: END", "label_key: [x]", "eval.datasets[0].label_key: ['x'] is no text (wants a text; put it into quotes)"),
        ("{level: 3}", "[[level, 3]]", "metadata_overrides: [['level', 3]] is no mapping (wants a mapping)"),
        ("name: b", "name: ' '", "eval.datasets[1] needs name as text"),
        ("eval:", "defaults: {top_k: 5}\neval:", "unknown key at the top: 'defaults'"),
        (EVAL, "datasets: {a: a.jsonl}\n", "datasets.a must be a mapping under a name that is text, found 'a.jsonl'"),
        (EVAL, "datasets: {3: {path: a.jsonl}}\n", "datasets.3 must be a mapping under a name that is text"),
        (EVAL, "datasets: {a: }\n", "datasets.a must be a mapping under a name that is text, found None"),
    ],
)
def test_a_wrong_evaluation_file_is_one_clear_error(tmp_path: Path, old: str, new: str, said: str):
    file = written(tmp_path, EVAL.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        config_of("--eval-config", file)
    assert said in str(error.value) and file in str(error.value)


def test_an_odd_number_of_words_is_no_list_of_pairs():
    with pytest.raises(ConfigError, match="wants NAME FILE pairs, got 3 values"):
        config_of("--eval-prompt-data", "a", "/a", "b")


# ------------------------------------------------------------------------------------------------- --custom-config-path


def test_the_yaml_wins_and_is_there_before_anything_is_derived(tmp_path: Path):
    """slime applies it after its derivations, so that eps_clip_high would keep following the old eps_clip."""
    file = written(tmp_path, "eps_clip: 0.4\nlr: 1e-5\nnum_steps_per_rollout: 4\nnorm_epsilon: 1e-6\ncustom: {own_way: true}\n")
    config = config_of("--custom-config-path", file, "--eps-clip", "0.1")
    assert (config.algorithm.eps_clip, config.algorithm.eps_clip_high, config.optimizer.lr) == (0.4, 0.4, 1e-5)
    assert config.batch.global_batch_size == 2 and config.model.megatron["layernorm_epsilon"] == 1e-6
    assert config.args.own_way is True
    assert f"eps_clip = 0.4, because {file} says so" in config.notes
    config = config_of("--custom-config-path", written(tmp_path, "custom:\n  mis-level: token\n"))
    assert config.args.mis_level == "token"
    assert config_of("--custom-config-path", written(tmp_path, "custom:\n")).debug.custom == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("esp_clip: 0.4\n", "unknown key 'esp_clip'; did you mean eps_clip?"),
        (
            "use_tis: true\nmis_level: token\nmis_veto_threshold: 1.0e-4\n",
            "move what a plugin alone reads under 'custom:' (custom: {mis_level: ...}), it is args.mis_level",
        ),
        ("custom: {use_tis: true, mine: 1}\n", "custom: use_tis: a flag of this name exists; move it to the top"),
        ("custom: [1]\n", "'custom' must be a mapping"),
        ("eps_clip: far\n", "eps_clip: --eps-clip wants a number, got 'far'"),
        ("colocate: 3\n", "colocate: wants true or false, got 3"),
        ("fp16: true\n", "fp16: this version does not have"),
        ("kl_loss_type: k9\n", "wants one of k1, k2, k3, low_var_kl"),
        ("- a\n", "the top must be a mapping"),
        ("a: [\n", "is not YAML at line 2"),
    ],
)
def test_a_wrong_custom_file_is_one_clear_error(tmp_path: Path, text: str, said: str):
    with pytest.raises(ConfigError) as error:
        config_of("--custom-config-path", written(tmp_path, text))
    assert said in str(error.value)


# ----------------------------------------------------------------------------------------------------------- HF config

HF = {
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "num_hidden_layers": 8, "hidden_size": 128,
    "num_attention_heads": 4, "intermediate_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "head_dim": 192,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"}, "tie_word_embeddings": False,
    "first_k_dense_replace": 3, "vocab_size": 320, "num_key_value_heads": 4, "routed_scaling_factor": 2.5,
    "attention_bias": False, "index_topk": 16, "index_head_dim": 128, "index_n_heads": 16,
}  # fmt: skip
RIGHT = [
    *MOE, "--moe-layer-freq", "[0]*3+[1]*5", "--ffn-hidden-size", "256", "--multi-latent-attention", "--q-lora-rank", "64",
    "--kv-lora-rank", "32", "--qk-head-dim", "32", "--qk-pos-emb-head-dim", "16", "--v-head-dim", "32",
    "--rotary-base", "8000000",
    "--untie-embeddings-and-output-weights", "--moe-router-topk-scaling-factor", "2.5", "--swiglu", "--disable-bias-linear",
    "--qk-layernorm", "--moe-router-score-function", "sigmoid", "--moe-router-pre-softmax", "--moe-router-enable-expert-bias",
    "--spec", "slime_plugins.models.glm5.glm5", "get_glm5_spec",
]  # fmt: skip


LLAMA = {
    "num_hidden_layers": 8, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "rms_norm_eps": 1e-5,
    "vocab_size": 320, "tie_word_embeddings": True,
}  # fmt: skip
DENSE = ["--ffn-hidden-size", "512", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"]
"""Beside MINIMAL, what describes LLAMA."""


def test_flags_that_agree_with_the_checkpoint_pass():
    assert config_of(*RIGHT, facts=Facts(hf_config=HF)).model.vocab_size == 320


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-layers", "9", "--moe-layer-freq", "[0]*3+[1]*6"], "num_hidden_layers is 8 there, --num-layers is 9 here"),
        (["--hidden-size", "64"], "hidden_size is 128 there, --hidden-size is 64 here"),
        (["--ffn-hidden-size", "512"], "intermediate_size is 256 there, --ffn-hidden-size is 512 here"),
        (["--norm-epsilon", "1e-6"], "rms_norm_eps is 1e-05 there, --norm-epsilon is 1e-06 here"),
        (["--rotary-base", "1000000"], "rope_theta is 8000000.0 there, --rotary-base is 1000000.0 here"),
        (["--v-head-dim", "64"], "v_head_dim is 32 there, --v-head-dim is 64 here"),
        (["--num-experts", "16"], "n_routed_experts is 8 there, --num-experts is 16 here"),
        (
            ["--moe-layer-freq", "[0]*2+[1]*6"],
            "first_k_dense_replace is 3 there, --moe-layer-freq has 2 dense layers of 8 here",
        ),
        (["--vocab-size", "321"], "vocab_size is 320 there, --vocab-size is 321 here"),
        (["--post-mlp-layernorm"], "model_type is glm_moe_dsa there, --post-mlp-layernorm is given here"),
    ],
)
def test_a_disagreement_with_the_checkpoint_is_named(words: list[str], said: str):
    with pytest.raises(ConfigError) as error:
        config_of(*RIGHT, *words, facts=Facts(hf_config=HF))
    assert said in str(error.value) and "/models/x/config.json" in str(error.value)


def test_all_disagreements_are_listed_at_once():
    hf = {**copy.deepcopy(HF), "hidden_size": 64, "num_experts_per_tok": 4, "tie_word_embeddings": True}
    with pytest.raises(ConfigError) as error:
        config_of(*RIGHT, facts=Facts(hf_config=hf))
    assert len(re.findall(r"^  ", str(error.value), re.MULTILINE)) == 3


def test_a_flat_rope_theta_and_a_text_config_are_read_too():
    hf = {"model_type": "llama", "text_config": {**LLAMA, "rope_theta": 500000.0}}
    assert config_of(*DENSE, "--rotary-base", "500000", facts=Facts(hf_config=hf)).model.rotary_base == 5e5
    with pytest.raises(ConfigError, match="rope_theta is 500000.0 there, --rotary-base is 10000.0 here"):
        config_of(*DENSE, facts=Facts(hf_config=hf))


def test_gathered_context_parallelism_is_for_sparse_attention():
    words = ["--allgather-cp", "--actor-num-gpus-per-node", "4"]
    dense = Facts(hf_config={**LLAMA, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert config_of(*DENSE, *words, facts=dense).parallel.allgather_cp  # one context-parallel rank: nothing to gather
    with pytest.raises(
        ConfigError, match="--allgather-cp is the layout of sparse attention .DeepseekV32ForCausalLM and GlmMoeDsaForCausalLM"
    ):
        config_of(*DENSE, *words, "--context-parallel-size", "2", facts=dense)
    assert (
        config_of(*RIGHT, *words, "--context-parallel-size", "2", facts=Facts(hf_config=HF)).parallel.context_parallel_size == 2
    )


def test_selections_are_replayed_by_sparse_attention_alone():
    facts = Facts(hf_config={**LLAMA, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ConfigError, match="takes the keys that sparse attention selected, and llama has none; remove it"):
        config_of(*DENSE, "--use-rollout-indexer-replay", facts=facts)
    groups = config_of(*RIGHT, "--use-rollout-indexer-replay", facts=Facts(hf_config=HF)).engine.groups
    assert [group.overrides for group in groups[0].server_groups] == [{"enable_return_indexer_topk": True}]


# --------------------------------------------------------------------------------------------------- Megatron's fields


def test_the_stored_table_is_the_installed_packages():
    """When this fails after an upgrade: python -m slime.config.megatron_table --write, and read what changed."""
    pytest.importorskip("megatron")
    _, installed = installed_table()
    assert differences(read_table(), installed) == []


def test_the_table_reports_what_changed():
    old, new = (
        {"A": {"x": {"type": "int", "default": 1}, "y": {"type": "int", "default": 1}}},
        {"A": {"x": {"type": "int", "default": 2}}},
    )
    assert differences(old, new) == ["A.x: table int = 1, package int = 2", "A.y: in the table, not in the package"]


@pytest.mark.parametrize(
    ("text", "value"), [("[0]*3+[1]*2", [0, 0, 0, 1, 1]), ("2 ** 10", 1024), ("-(1)", -1), ("[[1]*2]*2", [[1, 1]] * 2)]
)
def test_expressions_are_worked_out(text: str, value: object):
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text", ["open('x')", "x", "1/2", "'a'*3", "[1 for _ in x]", "2**999", "True", "1 +", "[1]-1", "().__class__"]
)
def test_expressions_execute_nothing(text: str):
    with pytest.raises(ValueError, match="cannot|only numbers"):
        evaluate(text)


def test_a_grader_among_the_overrides_is_asked_for_too(tmp_path: Path):
    file = written(
        tmp_path, EVAL.replace("rm_type: random, metadata_overrides: {level: 3}", "metadata_overrides: {rm_type: maths}")
    )
    with pytest.raises(ConfigError, match="evaluation b: rm-type 'maths' is no grader; did you mean math"):
        config_of("--eval-config", file)
