"""A flag that is taken and changes nothing, or less than one may think, says so at start."""

from __future__ import annotations

import pytest

from slime.config import ConfigError
from slime.config.command_line import flag_table
from slime.config.facts import Facts
from slime.config.front_end import WHY, FrontEndConfig
from slime.config.rules import effects
from tests.config.flags import MOE, config_of


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("--update-weight-disk-dir /w", "--update-weight-disk-dir changes nothing without --update-weight-transport disk"),
        (
            "--custom-update-weight-post-write-path a.b",
            "--custom-update-weight-post-write-path changes nothing without --update-we",
        ),
        ("--rollout-data-transport object-store", "--rollout-data-transport changes nothing: rollouts go through Ray's object"),
        ("--keep-old-actor", "--keep-old-actor changes nothing: training starts from the weights that generated the rollout"),
        ("--train-backend megatron", "--train-backend changes nothing: there is one"),
        ("--update-weight-delta-encoding xor", "--update-weight-delta-encoding changes nothing without --update-weight-mode"),
        ("--ckpt-format torch_dist", "--ckpt-format changes nothing: checkpoints are torch_dist"),
        ("--tokenizer-type HuggingFaceTokenizer", "--tokenizer-type changes nothing: the tokenizer is that of --hf-checkpoint"),
        ("--manual-gc --manual-gc-interval 10", "--manual-gc-interval changes nothing: Python collects when it wants to"),
        ("--use-flash-attn", "--use-flash-attn changes nothing"),
        ("--log-throughput", "--log-throughput changes nothing: perf/tokens_per_sec is always there"),
        ("--log-probs-max-tokens-per-gpu 4096", "--log-probs-max-tokens-per-gpu changes nothing: passes without gradient"),
        (
            "--use-distributed-post --http-proxy http://p",
            "--http-proxy changes nothing: requests between the run's own processes",
        ),
        ("--model-name qwen3", "--model-name changes nothing: model_type of config.json"),
        ("--attention-softmax-in-fp32", "--attention-softmax-in-fp32 changes nothing: attention here always sums in float32"),
        ("--init-method-std 0.01", "--init-method-std changes nothing: every parameter comes from a checkpoint"),
        ("--no-initialization", "--no-initialization changes nothing"),
        ("--overlap-p2p-communication", "--overlap-p2p-communication changes nothing: the schedule decides it"),
        ("--log-max-attention-logit", "--log-max-attention-logit changes nothing"),
        (
            "--rollout-top-k 1",
            "--rollout-top-k 1 cut the vocabulary when sampling, and the trainer's probabilities are over all",
        ),
        (
            "--rollout-top-k 50 --rollout-top-p 0.5 --sglang-speculative-algorithm NEXTN",
            "--rollout-top-p 0.5 and --rollout-top-k 50 cut the vocabulary when sampling, and the trainer's probabilities are "
            "over all of it (SGLang does not tell what it left under speculative decoding): training is off-policy by",
        ),
    ],
)
def test_a_note_says_what_changes_nothing(words: str, note: str) -> None:
    assert any(line.startswith(note) for line in config_of(*words.split()).notes), config_of(*words.split()).notes
    assert not any(line.startswith(note) for line in config_of().notes)


@pytest.mark.parametrize(
    ("words", "most", "said"),
    [
        ("--rollout-top-p 0.9", 4000, "--rollout-top-p 0.9 cut the vocabulary"),
        ("--rollout-top-k 50 --rollout-top-p 0.5", 50, "--rollout-top-p 0.5 and --rollout-top-k 50 cut the vocabulary"),
    ],
)
def test_sampling_that_cuts_the_vocabulary_is_told_by_engines_and_taken_again(words: str, most: int, said: str) -> None:
    config = config_of(*words.split())
    assert config.rollout.most_kept_words == most and config_of().rollout.most_kept_words == 0
    assert config.engine.groups[0].server_groups[0].overrides == {"sampling_mask_max_tokens": most + 96}
    assert any(said in note for note in config.notes)
    for other in ("--debug-rollout-only", "--loss-type sft_loss"):
        assert config_of(*words.split(), *other.split()).rollout.most_kept_words == 0


@pytest.mark.parametrize(
    "words", ["--moe-enable-deepep", "--moe-token-dispatcher-type flex", "--moe-flex-dispatcher-backend deepep"]
)
def test_experts_are_reached_by_all_to_all_whatever_is_asked(words: str) -> None:
    """Six launchers of the public project ask for flex and DeepEP, with which megatron-core's build would end."""
    config = config_of(*MOE, *words.split())
    assert config.model.megatron["moe_token_dispatcher_type"] == "alltoall"
    assert not {"moe_enable_deepep", "moe_flex_dispatcher_backend"} & config.model.megatron.keys()
    assert any("all-to-all" in note or "alltoall" in note for note in config.notes)


def test_what_changes_nothing_is_called_by_a_flag_that_there_is() -> None:
    """A field of megatron-core may have a flag of another name."""
    of_others = [name for names, _, _ in effects.BELONGS for name in names]
    named = [*effects.ONE_ANSWER, *effects.UNREAD, *effects.UNREAD_OPTIMIZER, *of_others]
    assert [name for name in named if effects.spelled(name) not in flag_table()] == ["batch_p2p_comm"], "which no flag sets"


def test_flags_of_the_front_end_and_their_reasons_are_the_same_list() -> None:
    assert set(WHY) == set(FrontEndConfig.__dataclass_fields__)


@pytest.mark.parametrize("words", ["--ckpt-format torch", "--tokenizer-type SentencePieceTokenizer"])
def test_another_front_end_value_is_refused_with_the_one_that_holds(words: str) -> None:
    with pytest.raises(ConfigError, match="wants one of (torch_dist|HuggingFaceTokenizer, NullTokenizer), got"):
        config_of(*words.split())


def test_the_older_spelling_of_selective_recomputation_means_the_same() -> None:
    assert config_of("--recompute-activations").model.megatron["recompute_granularity"] == "selective"
    full = config_of(
        "--recompute-activations",
        *"--recompute-granularity full --recompute-method uniform".split(),
        "--recompute-num-layers",
        "1",
    )
    assert full.model.megatron["recompute_granularity"] == "full"


LLAMA = {
    "model_type": "llama", "num_hidden_layers": 8, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 32, "intermediate_size": 512, "vocab_size": 320, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
LLAMA_ARGS = (
    "--ffn-hidden-size 512 --swiglu --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-5 --rotary-base 500000"
)


@pytest.mark.parametrize(
    ("scaling", "words", "said"),
    [
        (LLAMA["rope_scaling"], "--use-rope-scaling --rope-scaling-factor 32.0", ""),
        (LLAMA["rope_scaling"], "", ""),
        (
            LLAMA["rope_scaling"],
            "--use-rope-scaling",
            "rope_parameters.factor is 32.0 there, --rope-scaling-factor is 8.0 here",
        ),
        (None, "--use-rope-scaling", "rope_type is default there, --use-rope-scaling asks for llama3 here"),
    ],
)
def test_stretched_positions_by_flag_must_be_those_of_config_json(scaling, words: str, said: str) -> None:
    facts = Facts(hf_config={**LLAMA, "rope_scaling": scaling}, hf_source="config.json")
    if not said:
        config_of(*LLAMA_ARGS.split(), *words.split(), facts=facts)
        return
    with pytest.raises(ConfigError, match=said):
        config_of(*LLAMA_ARGS.split(), *words.split(), facts=facts)


def test_a_router_that_already_runs_has_a_port() -> None:
    with pytest.raises(
        ConfigError, match="10.0.0.1 is the address of a router that already runs, .*; add --sglang-router-port"
    ):
        config_of("--sglang-router-ip", "10.0.0.1")
    assert config_of("--sglang-router-ip", "10.0.0.1", "--sglang-router-port", "3000").engine.sglang_router_ip == "10.0.0.1"


@pytest.mark.parametrize(
    ("words", "with_it"),
    [
        ("--use-unbiased-kl", "--use-kl-loss --kl-loss-coef 0.1 --ref-load /ref"),
        ("--kl-loss-type k2", "--kl-coef 0.1 --ref-load /ref"),
        ("--opsm-delta 0.1", "--use-opsm"),
        ("--eval-temperature 0.5", "--eval-prompt-data a /a.jsonl"),
        ("--skip-eval-before-train", "--eval-prompt-data a /a.jsonl"),
        ("--wandb-project p", "--use-wandb"),
        ("--disable-wandb-random-suffix", "--use-wandb"),
        ("--tb-experiment-name e", "--use-tensorboard --tb-project-name p"),
        ("--rollout-health-check-timeout 9", "--use-fault-tolerance"),
        ("--gamma 0.9", "--advantage-estimator reinforce_plus_plus --normalize-advantages"),
        ("--lr-wsd-decay-iters 1", "--lr-decay-style WSD"),
        ("--sgd-momentum 0.5", "--optimizer sgd"),
        ("--adam-beta1 0.8", "--optimizer adam"),
        ("--mtp-loss-scaling-factor 0.3", "--mtp-num-layers 1 --enable-mtp-training --untie-embeddings-and-output-weights"),
        ("--micro-batch-size 2", ""),
        ("--max-tokens-per-gpu 4096", "--use-dynamic-batch-size"),
        ("--apply-chat-template-kwargs {}", "--apply-chat-template"),
    ],
)
def test_a_flag_of_something_that_is_not_there_is_said_to_change_nothing(words: str, with_it: str) -> None:
    flag = words.split()[0]

    def said(*more: str) -> bool:
        config = config_of(*words.split(), *more, facts=Facts(ref_load="megatron"))
        return any(note.startswith(f"{flag} changes nothing: ") for note in config.notes)

    without = {"--micro-batch-size": "--use-dynamic-batch-size --max-tokens-per-gpu 4096", "--adam-beta1": "--optimizer sgd"}
    assert said(*without.get(flag, "").split()) and not said(*with_it.split())


def test_one_sample_of_a_prompt_learns_nothing_from_its_own_mean() -> None:
    one = "--n-samples-per-prompt 1"
    said = "--n-samples-per-prompt 1 learns nothing: --advantage-estimator grpo takes the mean"
    assert any(note.startswith(said) for note in config_of(*one.split()).notes)
    for other in ("--disable-rewards-normalization", "--advantage-estimator ppo", "--entropy-coef 0.1"):
        assert not any("learns nothing" in note for note in config_of(*one.split(), *other.split()).notes)
    assert not any("learns nothing" in note for note in config_of("--n-samples-per-prompt", "2").notes)


def test_flags_of_sparse_attention_change_nothing_without_it() -> None:
    words = [*LLAMA_ARGS.split(), *"--dsa-send-indices --dsa-index-scoring fp8".split()]
    config = config_of(*words, facts=Facts(hf_config=LLAMA, hf_source="config.json"))
    said = [note for note in config.notes if note.endswith("changes nothing: the model has no sparse attention")]
    assert [note.split()[0] for note in said] == ["--dsa-index-scoring", "--dsa-send-indices"]
    assert not any("no sparse attention" in note for note in config_of("--dsa-send-indices").notes)
