"""Derived values and contradictions. Expected numbers were worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from config.flags import MINIMAL, MODEL, MOE, config_of

from slime.config import ConfigError, parse
from slime.config.facts import Facts, count_prompts, gather_facts, kind_of

GPUS16 = ["--actor-num-nodes", "2", "--actor-num-gpus-per-node", "8"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
TP2PP2CP2 = [
    "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--context-parallel-size", "2",
    "--sequence-parallel",
]  # fmt: skip

APART = ["--colocate", "none", "--rollout-num-gpus", "1"]
ALL_THE_TIME = "slime.rollout.fully_async_rollout.generate_rollout_fully_async"


@pytest.mark.parametrize(
    ("words", "section", "name", "value", "because"),
    [
        ([], "parallel", "world_size", 2, "times --actor-num-gpus-per-node 2"),
        ([*GPUS16, *TP2PP2CP2], "parallel", "data_parallel_size", 2, "16 training GPUs are shared by TP 2 x PP 2 x CP 2"),
        (TP2, "parallel", "expert_tensor_parallel_size", 2, "to --tensor-model"),
        (["--sequence-parallel"], "parallel", "sequence_parallel", False, "nothing to split"),
        ([], "model", "padded_vocab_size", 384, "multiple of 128"),  # 320 -> 3 x 128
        (TP2, "model", "padded_vocab_size", 512, "multiple of 256"),
        (["--make-vocab-size-divisible-by", "16"], "model", "padded_vocab_size", 320, "multiple of 16"),
        ([], "model", "max_position_embeddings", 4096, "--seq-length"),
        ([], "cluster", "rollout_num_gpus", 2, "--colocate"),
        ([], "cluster", "offload_train", True, "--colocate"),
        ([], "cluster", "offload_rollout", True, "--colocate"),
        (["--no-offload-rollout"], "cluster", "offload_rollout", False, None),
        (["--no-offload-train"], "cluster", "offload_train", False, None),
        ([], "batch", "global_batch_size", 8, "all 4 x 2 samples"),
        (["--num-steps-per-rollout", "4"], "batch", "global_batch_size", 2, "in 4 steps"),
        (["--max-tokens-per-gpu", "128"], "batch", "log_probs_max_tokens_per_gpu", 128, "--max-tokens-per-gpu"),
        (["--balance-by-flops", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "128"],
         "batch", "balance_data", True, "implies"),
        ([], "rollout", "over_sampling_batch_size", 4, "--rollout-batch-size"),
        (["--eps-clip", "0.3"], "algorithm", "eps_clip_high", 0.3, "--eps-clip"),
        (["--n-samples-per-prompt", "1"], "algorithm", "grpo_std_normalization", False, "one sample per prompt"),
        (["--loss-type", "sft_loss"], "algorithm", "compute_advantages_and_returns", False, "supervised"),
        (["--rollout-max-context-len", "100"], "rollout", "rollout_max_prompt_len", 99, "one token for the response"),
        (["--rollout-max-context-len", "100"], "evaluation", "eval_max_context_len", 100, "--rollout-max-context-len"),
        (["--reward-key", "acc"], "evaluation", "eval_reward_key", "acc", "--reward-key"),
        ([], "evaluation", "eval_function_path", "slime.rollout.sglang_rollout.generate_rollout", "--rollout-function-path"),
        (["--dump-details", "/d"], "debug", "save_debug_rollout_data", "/d/rollout_data/{rollout_id}.pt", "--dump-details"),
        (["--load-debug-rollout-data", "/d/{rollout_id}.pt"], "debug", "debug_train_only", True, "no engine is started"),
        (["--load-debug-rollout-data", "/d/{rollout_id}.pt"], "cluster", "rollout_num_gpus", 0, "starts no engine"),
        (["--debug-rollout-only"], "cluster", "colocate", False, "has no trainer"),
        (["--num-layers-per-virtual-pipeline-stage", "2", "--pipeline-model-parallel-size", "2"],
         "parallel", "virtual_pipeline_model_parallel_size", 2, "4 layers in 2 chunks"),
        (["--pipeline-model-parallel-layout", "3,5", "--pipeline-model-parallel-size", "2"],
         "parallel", "pipeline_model_parallel_layout", "Et*3|t*5L", "Megatron's spelling"),
        (["--pipeline-model-parallel-layout", "3, 1, 1, 3", "--pipeline-model-parallel-size", "2"],
         "parallel", "virtual_pipeline_model_parallel_size", 2, "4 stages for 2 ranks"),
        (["--pipeline-model-parallel-layout", "Et|(tt|)*3t|L", "--pipeline-model-parallel-size", "2"],
         "parallel", "virtual_pipeline_model_parallel_size", 3, "6 stages for 2 ranks"),
        (["--use-rotary-position-embeddings"], "model", "position_embedding_type", "rope", "older spelling"),
        (["--mtp-num-layers", "1"], "model", "mtp_num_layers", None, "without --enable-mtp-training"),
        (["--mtp-num-layers", "1", "--enable-mtp-training", "--untie-embeddings-and-output-weights"],
         "model", "mtp_num_layers", 1, None),
        ([*APART, "--schedule", "one-step-ahead"], "loop", "runs_ahead", True, "generates while the trainer trains"),
        ([*APART, "--schedule", "one-step-ahead", "--update-weights-interval", "3"],
         "engine", "update_weights_interval", 3, None),
        (["--update-weights-interval", "3"], "engine", "update_weights_interval", 1, "sends the weights after every rollout"),
        ([*APART, "--schedule", "fully-async"], "rollout", "rollout_function_path", ALL_THE_TIME, "generates all the time"),
        ([*APART, "--schedule", "one-step-ahead", "--rollout-function-path", ALL_THE_TIME],  # slime's train_async.py with it
         "loop", "schedule", "fully-async", "generates all the time"),
        (["--debug-rollout-only", "--schedule", "fully-async"], "loop", "schedule", "sync", "trains nothing"),
    ],
)  # fmt: skip
def test_derived_values_and_why(words: list[str], section: str, name: str, value: object, because: str | None):
    config = config_of(*words)
    assert getattr(getattr(config, section), name) == value
    notes = [note for note in config.notes if note.startswith(f"{name} = ")]
    if because is None:
        assert notes == []
    else:
        assert any(because in note for note in notes), notes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rollout-temperature", "0"], "--rollout-temperature must be above 0"),
        (["--kl-coef", "0.1", "--use-kl-loss", "--kl-loss-coef", "0.1", "--ref-load", "/r"], "use one"),
        (["--use-kl-loss"], "give --ref-load"),  # slime dies of a TypeError here
        (["--kl-coef", "0.1", "--ref-load", "/gone"], "nothing in --ref-load /gone"),
        (["--kl-loss-coef", "0.1"], "has no effect without --use-kl-loss"),
        (["--advantage-estimator", "reinforce_plus_plus"], "needs --normalize-advantages"),
        (["--use-rollout-logprobs", "--use-tis"], "use one"),
        (["--get-mismatch-metrics"], "needs --custom-tis-function-path"),
        (["--custom-tis-function-path", "a.b"], "--custom-tis-function-path a.b is called by nothing; add --use-tis"),
        (["--eps-clip-c", "0.9"], "--eps-clip-c must be above 1"),
        (["--tis-clip-low", "3"], "--tis-clip-low 3.0 is above --tis-clip 2.0"),
        (["--loss-type", "custom_loss"], "needs --custom-loss-function-path"),
        (["--use-dynamic-batch-size"], "needs --max-tokens-per-gpu"),
        (["--balance-by-flops"], "needs --use-dynamic-batch-size"),
        (["--global-batch-size", "3"], "8 samples (4 x 2) are no multiple of --global-batch-size 3"),
        (["--num-steps-per-rollout", "3"], "do not divide into --num-steps-per-rollout 3"),
        (["--num-steps-per-rollout", "2", "--global-batch-size", "8"], "global batch of 4, but --global-batch-size is 8"),
        (["--over-sampling-batch-size", "3"], "below --rollout-batch-size 4"),
        (["--mask-offpolicy-in-partial-rollout"], "needs --partial-rollout"),
        (["--rollout-max-context-len", "10", "--rollout-max-prompt-len", "10"], "must be below --rollout-max-context-len 10"),
        (["--save-interval", "5"], "needs --save"),
        (["--eval-interval", "5"], "needs --eval-prompt-data or --eval-config"),
        (["--num-rollout", "0"], "--num-rollout 0 only evaluates"),
        (["--use-tensorboard"], "needs --tb-project-name or the environment variable TENSORBOARD_DIR"),
        (["--only-train-params-name-list", "a", "--freeze-params-name-list", "b"], "give one"),
        (["--tensor-model-parallel-size", "3"], "2 training GPUs are no multiple of TP 3 x PP 1 x CP 1 = 3"),
        (["--tensor-model-parallel-size", "8", "--actor-num-gpus-per-node", "8"], "--num-attention-heads 4 is no multiple"),
        (["--expert-model-parallel-size", "2"], "needs --num-experts"),
        ([*MOE, "--expert-model-parallel-size", "3", "--actor-num-gpus-per-node", "3"], "--num-experts 8 is no multiple"),
        ([*MOE, "--expert-model-parallel-size", "4"], "no multiple of expert-TP 1 x EP 4 x PP 1 = 4"),
        ([*MOE, "--tensor-model-parallel-size", "2"], "pass --sequence-parallel"),
        ([*MOE, "--moe-layer-freq", "[0]*3+[1]*4"], "lists 7 layers, --num-layers is 8"),
        ([*MOE, "--moe-router-topk", "9"], "--moe-router-topk 9 is above --num-experts 8"),
        (["--moe-router-topk", "2"], "--num-experts is not given, but --moe-router-topk is"),
        (["--num-query-groups", "2"], "has no effect without --group-query-attention"),
        (["--group-query-attention"], "needs --num-query-groups"),
        (["--group-query-attention", "--num-query-groups", "3"], "4 is no multiple of --num-query-groups 3"),
        (["--pipeline-model-parallel-layout", "3,4", "--pipeline-model-parallel-size", "2"], "places 7 layers, the model"),
        (["--pipeline-model-parallel-layout", "3,0,5,0", "--pipeline-model-parallel-size", "2"], "a stage without layers"),
        (["--pipeline-model-parallel-layout", "3,3,2", "--pipeline-model-parallel-size", "2"], "3 stages, no multiple"),
        (["--pipeline-model-parallel-layout", "3,5"], "needs --pipeline-model-parallel-size above 1"),
        (["--pipeline-model-parallel-layout", "3,5", "--num-layers-per-virtual-pipeline-stage", "2",
          "--pipeline-model-parallel-size", "2"], "exclude each other"),
        (["--dsa-send-indices", "--dsa-core-axis", "heads", "--tensor-model-parallel-size", "2", "--sequence-parallel",
          "--pipeline-model-parallel-size", "2"], "--dsa-send-indices needs --dsa-core-axis queries"),
        (["--decoder-first-pipeline-num-layers", "3"], "need --pipeline-model-parallel-size above 1"),
        (["--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "9"], "8 layers do not divide"),
        (["--actor-num-gpus-per-node", "3", "--pipeline-model-parallel-size", "3"], "8 layers over the 3 other stages"),
        (["--debug-train-only", "--debug-rollout-only", "--rollout-num-gpus", "2"], "exclude each other"),
        (["--save-debug-rollout-data", "{rollout_id}", "--load-debug-rollout-data", "{rollout_id}"], "would overwrite"),
        (["--save-debug-rollout-data", "a"], "must hold {rollout_id}"),
        (["--save-debug-train-data", "{rollout_id}", "--save-debug-rollout-data", "{rollout_id}"], "would overwrite the other"),
        (["--load-debug-rollout-data-subsample", "1.5"], "-subsample must be above 0 and at most 1, got 1.5"),
        (["--ci-load-grad-norm", "norm-{rollout_id}"], "must hold {rollout_id} and {step_id}"),
        (["--ref-update-interval", "0"], "--ref-update-interval must be at least 1, got 0"),
        (["--ref-update-interval", "4", "--save", "s", "--save-interval", "6"], "6 is no multiple of --ref-update-interval 4"),
        (["--rollout-health-check-interval", "0"], "--rollout-health-check-interval must be above 0, got 0"),
        (["--offload", "--no-offload-train"], "contradicts"),
        (["--sglang-dp-size", "2"], "add --sglang-enable-dp-attention"),
        (["--rollout-num-gpus-per-engine", "4"], "no multiple of --rollout-num-gpus-per-engine 4"),
        (["--rollout-num-gpus-per-engine", "2", "--prefill-num-servers", "1"], "leaves 0 of 2 GPUs for decode"),
        (["--overlap-cpu-optimizer-d2h-h2d"], "needs --optimizer-cpu-offload"),
        (["--exp-avg-dtype", "bf16"], "--exp-avg-dtype needs --use-precision-aware-optimizer"),
        (["--bf16", "--params-dtype", "fp32"], "contradict"),
        (["--min-lr", "1"], "--min-lr 1.0 is above --lr 1e-06"),
        (["--num-layers-per-virtual-pipeline-stage", "3", "--pipeline-model-parallel-size", "2"], "not divide the 4 layers"),
        (["--enable-mtp-training"], "pass both"),
        (["--mtp-num-layers", "2", "--enable-mtp-training"], "one multi-token-prediction layer can be built"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(words: list[str], said: str):
    with pytest.raises(ConfigError) as error:
        config_of(*words)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("--num-layers", "the model flags lack --num-layers"),
        ("--hf-checkpoint", "--hf-checkpoint is needed"),
        ("--prompt-data", "--prompt-data is needed"),
        ("--rollout-batch-size", "--rollout-batch-size (prompts per rollout) is needed"),
        ("--num-rollout", "give --num-rollout or --num-epoch"),
        ("--vocab-size", "--vocab-size is needed"),
        ("--colocate", "--rollout-num-gpus is needed without --colocate"),
    ],
)
def test_what_a_run_cannot_do_without(without: str, said: str):
    at = MINIMAL.index(without)
    words = MINIMAL[:at] + MINIMAL[at + (1 if without == "--colocate" else 2) :]
    with pytest.raises(ConfigError) as error:
        parse(words, facts=Facts())
    assert said in str(error.value)


def test_num_epoch_leaves_the_number_of_rollouts_to_the_data():
    at = MINIMAL.index("--num-rollout")
    config = parse([*MINIMAL[:at], *MINIMAL[at + 2 :], "--num-epoch", "2"], facts=Facts())
    assert config.data.num_rollout is None and config.data.num_epoch == 2
    assert any("2 epochs x (prompts // 4)" in note for note in config.notes)


def test_prefill_and_decode_without_yaml():
    config = config_of("--actor-num-gpus-per-node", "8", "--rollout-num-gpus-per-engine", "2", "--prefill-num-servers", "1")
    groups = config.engine.groups[0].server_groups
    assert [(group.worker_type, group.num_gpus, group.num_engines) for group in groups] == [("prefill", 2, 1), ("decode", 6, 3)]


def test_switches_that_sglang_no_longer_has_are_told_by_their_names_of_today():
    config = config_of("--sglang-enable-ep-moe", "--sglang-enable-deepep-moe")
    said = "is read as ep_size of all ranks of an engine"
    assert f"--sglang-enable-ep-moe {said}" in config.notes
    assert f"--sglang-enable-deepep-moe {said} and moe_a2a_backend deepep" in config.notes


def test_separate_gpus_keep_their_memory():
    words = [word for word in MINIMAL if word != "--colocate"]
    config = parse([*words, "--rollout-num-gpus", "4"], facts=Facts())
    assert (config.cluster.offload_train, config.cluster.offload_rollout, config.cluster.rollout_num_gpus) == (False, False, 4)
    said = parse([*words, "--rollout-num-gpus", "4", "--offload-train"], facts=Facts())
    assert not said.cluster.offload_train and any(
        note.startswith("offload_train = False, because training and rollout have GPUs of their own") for note in said.notes
    )


def test_rollout_only_needs_no_model_flags():
    words = [*MINIMAL[len(MODEL) :], "--debug-rollout-only"]
    config = parse(words, facts=Facts())
    assert config.debug.debug_rollout_only and config.engine.groups[0].server_groups[0].num_gpus == 2


# ------------------------------------------------------------------------------------------- where the first weights are


@pytest.mark.parametrize(
    ("kind", "ref", "load", "start", "fresh"),
    [
        ("megatron", "release", "/l", None, False),  # continues after the loaded iteration
        ("nothing", "release", "/r", 0, True),
        ("release", "release", "/l", 0, True),  # slime would begin at rollout 1
        ("hf", "nothing", "/l", 0, True),
    ],
)
def test_first_weights(kind: str, ref: str, load: str, start: int | None, fresh: bool):
    config = config_of("--load", "/l", "--ref-load", "/r", facts=Facts(load=kind, ref_load=ref))  # type: ignore[arg-type]
    checkpoint = config.checkpoint
    assert (checkpoint.load, checkpoint.start_rollout_id) == (load, start)
    assert (checkpoint.no_load_optim, checkpoint.no_load_rng, checkpoint.finetune) == (fresh, fresh, fresh)


def test_without_any_checkpoint_the_run_starts_from_the_hf_folder():
    assert config_of().checkpoint.load == "/models/x"


def test_an_explicit_start_always_wins():
    assert config_of("--start-rollout-id", "7", "--num-rollout", "9").checkpoint.start_rollout_id == 7


DONE = Facts(load="megatron", load_step=11)


@pytest.mark.parametrize(
    ("flags", "facts", "said"),
    [
        (("--num-rollout", "8"), DONE, "--num-rollout 8 is below the 12 rollouts that are done"),
        (("--num-rollout", "8", "--ckpt-step", "8"), DONE, "below the 9 rollouts"),
        (("--num-rollout", "8", "--start-rollout-id", "9"), Facts(), "below the 9 rollouts that are done (--start-rollout-id)"),
        (("--num-epoch", "1"), Facts(num_prompts=3), "--num-epoch 1 is no rollout: --prompt-data /p.jsonl has 3 prompts"),
        (("--num-epoch", "2"), Facts(load="megatron", load_step=4, num_prompts=9), "at most 2 rollouts each, is below the 5"),
    ],
)
def test_a_run_with_nothing_to_do_is_refused_before_anything_starts(flags: tuple[str, ...], facts: Facts, said: str):
    given = ("--load", "/l", "--rollout-batch-size", "4", "--prompt-data", "/p.jsonl")
    minimal = MINIMAL[: MINIMAL.index("--num-rollout")]
    with pytest.raises(ConfigError) as refused:
        parse([*minimal, *given, *flags], facts=facts)
    assert said in str(refused.value)


def test_a_finished_run_says_so_and_one_without_rollouts_evaluates():
    def left(*flags: str) -> str:
        return config_of("--load", "/l", *flags, facts=DONE).nothing_to_train()

    assert "has all 12 rollouts of --num-rollout 12; for more give --num-rollout 24" in left("--num-rollout", "12")
    more = [("--num-rollout", "13"), ("--num-rollout", "12", "--finetune"), ("--num-rollout", "4", "--ckpt-step", "1")]
    assert [left(*flags) for flags in more] == ["", "", ""]
    assert left("--num-rollout", "0", "--eval-prompt-data", "e", "/e.jsonl") == ""


def test_facts_count_rows_of_a_slice(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n{"prompt": "c"}\n')
    counts = {part: count_prompts(f"{file}{part}") for part in ("", "@[1:]", "@[-2:]", "@[:2]", "@[a:b]")}
    assert counts == {"": 3, "@[1:]": 2, "@[-2:]": 2, "@[:2]": 2, "@[a:b]": None}
    assert count_prompts("/nowhere.jsonl") is None and count_prompts("x.parquet") is None and count_prompts(None) is None


def test_the_reference_brings_its_own_iteration():
    config = config_of(
        "--load", "/l", "--ref-load", "/r", "--ckpt-step", "9", "--ref-ckpt-step", "5", facts=Facts(ref_load="megatron")
    )
    assert config.checkpoint.ckpt_step == 5


def test_one_iterations_folder_is_refused_with_the_right_flags():
    with pytest.raises(ConfigError, match="give --load /s --ckpt-step 100"):
        config_of("--load", "/s/iter_0000100/", facts=Facts(load="iteration"))


def test_kinds_of_checkpoint_folders(tmp_path: Path):
    def made(name: str, **files: str) -> str:
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file.replace("__", ".")).write_text(text)
        return str(tmp_path / name)

    tracker = "latest_checkpointed_iteration__txt"
    assert kind_of(None) == kind_of(str(tmp_path / "gone")) == kind_of(made("empty")) == "nothing"
    assert kind_of(made("torn", log__txt="x")) == kind_of(made("another's", config__json='{"lr": 1}')) == "nothing"
    assert kind_of(made("saved", **{tracker: "12\n"})) == "megatron"
    assert kind_of(made("converted", **{tracker: "release"})) == "release"
    assert kind_of(made("iter_0000003", common__pt="")) == "iteration"
    assert kind_of(made("hf", config__json='{"model_type": "glm_moe_dsa"}')) == "hf"
    assert kind_of(made("other", config__json='{"model_type": "bert"}')) == "unknown"
    facts = gather_facts(load=str(tmp_path / "saved"), ref_load=str(tmp_path / "converted"), hf_checkpoint=str(tmp_path / "hf"))
    assert (facts.load, facts.ref_load, facts.hf_config) == ("megatron", "release", {"model_type": "glm_moe_dsa"})


@pytest.mark.parametrize(
    ("tracker", "flags", "said"),
    [
        ("2\n", [], ""),
        ("", [], "says '', which is neither a number nor 'release'; 1, 2 are there"),
        ("2.0", [], "says '2.0', which is neither a number nor 'release'; 1, 2 are there"),
        ("\x00", [], "which is neither a number nor 'release'"),
        ("7", [], "names {root}/iter_0000007, which does not exist; 1, 2 are there: take one that"),
        ("7", ["--ckpt-step", "1"], ""),
        ("2", ["--ckpt-step", "3"], "--ckpt-step 3 names {root}/iter_0000003, which does not exist; 1, 2 are there"),
        ("5", [], "does not exist; its former state does: mv {root}/.replaced_iter_0000005 {root}/iter_0000005"),
        ("release", [], "names {root}/release, which does not exist"),
    ],
)
def test_a_checkpoint_that_nobody_can_load_is_said_before_engines_start(tmp_path: Path, tracker: str, flags: list, said: str):
    for name in ("iter_0000001", "iter_0000002", ".replaced_iter_0000005"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    (tmp_path / "p.jsonl").write_text('{"input": "q"}\n' * 4)
    argv = [*MINIMAL, "--prompt-data", str(tmp_path / "p.jsonl"), "--num-rollout", "9", *flags]
    teacher = "--use-opd --opd-type megatron --opd-kl-coef 1 --opd-teacher-load".split()
    if not said:
        parse([*argv, "--ref-load", str(tmp_path / "iter_0000002"), "--ref-ckpt-step", "2"])  # one checkpoint itself
        parse([*argv, *teacher, str(tmp_path), *(word.replace("--", "--opd-teacher-") for word in flags)])
        parse([*argv, "--load", str(tmp_path)])
        parse([*argv, "--ref-load", str(tmp_path), *(word.replace("--", "--ref-") for word in flags)])
        return
    with pytest.raises(ConfigError) as error:
        parse([*argv, "--load", str(tmp_path)])
    assert f"--load {tmp_path}: " in str(error.value) and said.format(root=tmp_path) in str(error.value)
    with pytest.raises(ConfigError, match=f"--ref-load {tmp_path}: "):
        parse([*argv, "--ref-load", str(tmp_path), *(word.replace("--", "--ref-") for word in flags)])
    with pytest.raises(ConfigError, match=f"--opd-teacher-load {tmp_path}: "):
        parse([*argv, *teacher, str(tmp_path), *(word.replace("--", "--opd-teacher-") for word in flags)])


@pytest.mark.parametrize("text", ["{}", '{"model_type": null, "hidden_size": 64}', '{"text_config": {"hidden_size": 64}}'])
def test_a_config_json_of_no_family_is_refused(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json' has no model_type, by which a model's family is known; download it"):
        parse([*MINIMAL, "--hf-checkpoint", str(tmp_path)])


def test_a_tracker_of_other_bytes_or_that_is_a_folder_ends_in_no_traceback(tmp_path: Path):
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder" / "latest_checkpointed_iteration.txt").mkdir(parents=True)
    assert kind_of(str(tmp_path / "bytes")) == "megatron" and kind_of(str(tmp_path / "folder")) == "nothing"


def test_rehearsal_needs_no_file_of_the_cluster():
    config = config_of("--use-kl-loss", "--ref-load", "/cluster/ref", door="rehearse")
    assert config.checkpoint.ref_load == "/cluster/ref" and config.door == "rehearse"


SERVER = ("--use-opd", "--opd-type", "sglang", "--rm-url", "http://t:1/generate")
TEACHER = "slime.rollout.on_policy_distillation"


@pytest.mark.parametrize(
    ("words", "grader", "hooks"),
    [
        (("--rm-type", "math", "--label-key", "l"), None, (f"{TEACHER}.teacher_hook",)),
        (("--rm-type", "none"), f"{TEACHER}.reward_func", ()),
        (("--custom-rm-path", f"{TEACHER}.reward_func"), f"{TEACHER}.reward_func", ()),
        (("--custom-rm-path", "my.reward"), "my.reward", (f"{TEACHER}.teacher_hook",)),
        (("--rollout-sample-hook-path", "my.hook"), None, ("my.hook", f"{TEACHER}.teacher_hook")),
        (("--custom-rm-path", "my.teacher", "--custom-reward-post-process-path", "my.zeros"), "my.teacher", ()),
    ],
)
def test_a_teacher_behind_http_is_asked_by_the_grader_or_beside_it(words, grader, hooks) -> None:
    rules = config_of(*SERVER, *words).rollout
    assert (rules.custom_rm_path, rules.rollout_sample_hook_path) == (grader, hooks)


def test_replay_of_experts_is_for_models_that_have_some() -> None:
    assert config_of(*MOE, "--use-routing-replay").algorithm.use_routing_replay
    with pytest.raises(ConfigError, match="records which experts were chosen, and the model has none"):
        config_of("--use-routing-replay")
    config = config_of(*MOE, "--use-rollout-routing-replay")
    assert config.algorithm.use_routing_replay and config.engine.groups[0].server_groups[0].overrides == {
        "enable_return_routed_experts": True
    }
