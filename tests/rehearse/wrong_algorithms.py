"""Single mistakes in what the recipe of 256 GPUs optimises: name -> (the edit, what the rule book must say of it)."""

from __future__ import annotations

from tests.rehearse.edits import Edit, all_of, flags, without

WRONG_ALGORITHMS: dict[str, tuple[Edit, str]] = {
    "rejection without a ratio between its bounds": (
        flags("--use-rs", "--rs-lower-bound", "3", "--rs-upper-bound", "2"),
        "--rs-lower-bound 3 is above --rs-upper-bound 2; no ratio lies between",
    ),
    "importance bounds that cross": (
        flags("--use-tis", "--tis-mode", "mask", "--tis-lower-bound", "2.5"),
        "--tis-lower-bound 2.5 is above --tis-upper-bound 2",
    ),
    "a step ahead on the same GPUs": (
        flags("--schedule", "one-step-ahead"),
        "--schedule one-step-ahead generates while the trainer trains, and --colocate gives both the same GPUs",
    ),
    "all the time on the same GPUs": (
        flags("--rollout-function-path", "slime.rollout.fully_async_rollout.generate_rollout_fully_async"),
        "--schedule fully-async generates while the trainer trains, and --colocate gives both the same GPUs",
    ),
    "all the time, in turn": (
        flags(
            "--rollout-function-path", "slime.rollout.fully_async_rollout.generate_rollout_fully_async", "--schedule", "sync"
        ),
        "generates all the time, and --schedule sync in turn; leave one out",
    ),
    "all the time by somebody else's loop": (
        all_of(
            without("--colocate"),
            flags("--rollout-num-gpus", "256", "--schedule", "fully-async", "--rollout-function-path", "my.own.rollout"),
        ),
        "--schedule fully-async generates by this project's own loop, and --rollout-function-path is my.own.rollout",
    ),
    "engines that are not there, all the time": (
        all_of(without("--colocate"), flags("--schedule", "fully-async", "--load-debug-rollout-data", "/d/{rollout_id}.pt")),
        "--schedule fully-async keeps engines generating, and --debug-train-only (which --load-debug-rollout-data implies)",
    ),
    "old log-probs by several weights": (
        all_of(without("--colocate"), flags("--rollout-num-gpus", "256", "--schedule", "fully-async", "--keep-old-actor")),
        "--keep-old-actor with --schedule fully-async asks for old log-probs by the weights that generated",
    ),
    "old log-probs by two weights": (
        all_of(
            without("--colocate", "--use-tis"),
            flags("--rollout-num-gpus", "256", "--schedule", "one-step-ahead", "--keep-old-actor", "--use-rollout-logprobs"),
        ),
        "--keep-old-actor with --use-rollout-logprobs: both say what old log-probs are",
    ),
    "a sample by two weights": (
        all_of(
            without("--colocate"),
            flags("--rollout-num-gpus", "256", "--schedule", "one-step-ahead", "--keep-old-actor", "--partial-rollout"),
        ),
        "--keep-old-actor with --partial-rollout: a sample is then of several weights",
    ),
    "rejection against itself": (
        flags("--use-rs", "--use-rollout-logprobs"),
        "--use-rollout-logprobs leaves --use-rs nothing to compare",
    ),
    "a mode of weights that are off": (
        all_of(without("--use-tis"), flags("--tis-mode", "mask")),
        "--tis-mode has no effect without --use-tis or --use-rs",
    ),
    "a mean of weights that are off": (
        all_of(without("--use-tis"), flags("--use-rs", "--tis-batch-normalize")),
        "--tis-batch-normalize divides the weights of --use-tis, which is off",
    ),
    "one sample left out of one": (
        flags("--advantage-estimator", "rloo", "--n-samples-per-prompt", "1"),
        "--n-samples-per-prompt is 1; give at least 2",
    ),
    "leave-one-out without a mean": (
        flags("--advantage-estimator", "rloo", "--disable-rewards-normalization"),
        "--disable-rewards-normalization takes it off",
    ),
    "two lengths to divide by": (
        flags("--pg-loss-length", "1024", "--calculate-per-token-loss"),
        "--pg-loss-length 1024 and --calculate-per-token-loss divide the policy loss by two things",
    ),
    "a punishment of every response": (
        flags("--overlong-buffer-len", "65536", "--rollout-max-response-len", "65536"),
        "--overlong-buffer-len 65536 leaves no length without a penalty",
    ),
    "a punishment of no response": (
        flags("--overlong-penalty-factor", "0.5"),
        "--overlong-penalty-factor 0.5 has no effect without --overlong-buffer-len",
    ),
    "a punishment that nobody adds": (
        flags("--overlong-buffer-len", "4096", "--custom-reward-post-process-path", "a.b"),
        "shapes rewards before they are normalised, which --custom-reward-post-process-path replaces",
    ),
    # Distillation.
    "a teacher that runs nowhere": (flags("--use-opd"), "nothing says where it runs; give --opd-type sglang or megatron"),
    "a teacher for nobody": (
        flags("--opd-type", "megatron", "--opd-teacher-load", "/teacher"),
        "--opd-type, --opd-teacher-load has no effect without --use-opd",
    ),
    "a teacher without weights": (
        flags("--use-opd", "--opd-type", "megatron"),
        "--opd-type megatron loads the teacher beside the model; give its weights with --opd-teacher-load",
    ),
    "a server with weights": (
        flags("--use-opd", "--opd-type", "sglang", "--opd-teacher-load", "/teacher", "--rm-url", "http://t:1/generate"),
        "--opd-type sglang asks a server, and --opd-teacher-load /teacher is weights",
    ),
    "a server without an address": (
        flags("--use-opd", "--opd-type", "sglang"),
        "--opd-type sglang asks the teacher at --rm-url, which is not given",
    ),
    "a server at another temperature": (
        flags("--use-opd", "--opd-type", "sglang", "--rm-url", "http://t:1/generate", "--rollout-temperature", "0.8"),
        "a server scores at temperature 1, and --rollout-temperature is 0.8",
    ),
    "a server that would grade, too": (
        flags("--use-opd", "--opd-type", "sglang", "--rm-url", "http://t:1/generate", "--rm-type", "remote_rm"),
        "--rm-url is the teacher's address, and --rm-type remote_rm would grade there",
    ),
    "distillation without advantages": (
        flags("--use-opd", "--opd-type", "megatron", "--opd-teacher-load", "/t", "--disable-compute-advantages-and-returns"),
        "--use-opd changes advantages",
    ),
    # PPO.
    "a critic without advantages": (
        flags("--advantage-estimator", "ppo", "--disable-compute-advantages-and-returns"),
        "--advantage-estimator ppo makes advantages",
    ),
    "a critic of a model of the user's": (
        flags("--advantage-estimator", "ppo", "--custom-model-provider-path", "a.b"),
        "--advantage-estimator ppo builds a critic of this project's model",
    ),
    "a critic that overwrites the actor": (
        flags("--advantage-estimator", "ppo", "--save", "/runs/a", "--critic-save", "/runs/a/"),
        "--critic-save /runs/a/ is --save, which a critic would overwrite",
    ),
    "a critic saved alone": (
        all_of(without("--save", "--save-interval"), flags("--advantage-estimator", "ppo", "--critic-save", "/runs/c")),
        "--critic-save /runs/c writes along with --save; give it",
    ),
    "keys of no engine": (
        flags("--use-rollout-indexer-replay", "--loss-type", "sft_loss"),
        "--use-rollout-indexer-replay takes what engines selected, and --loss-type sft_loss trains without",
    ),
    "experts of no pass": (
        flags("--use-routing-replay", "--loss-type", "sft_loss"),
        "--use-routing-replay takes experts from the pass of the old log-probs",
    ),
}
