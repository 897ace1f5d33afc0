"""A dense model with grouped-query attention trains and serves through the same loop, without launcher and Ray job."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import audits
import pytest
import torch
from by_hand import by_hand
from engine.engines import TOKEN, spec
from safetensors.torch import load_file

from slime.engine.client import EngineClient, sync
from slime.engine.process import EngineProcess
from tools.bench.model_args import model_args

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    from tools.make_tiny_checkpoint import main as make_checkpoint

    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(["--preset", "qwen3", "--seed", "3", "--output", str(folder)])
    return next(path.parent for path in folder.rglob("config.json"))


SHARED = ("--colocate", "--actor-num-gpus-per-node", 2, "--num-gpus-per-node", 2, "--tensor-model-parallel-size", 2,
          "--sequence-parallel")  # fmt: skip
WITH_A_JUDGE = ("--actor-num-gpus-per-node", 1, "--num-gpus-per-node", 3, "--rollout-num-gpus", 2)
APART = ("--actor-num-gpus-per-node", 1, "--num-gpus-per-node", 2, "--rollout-num-gpus", 1)


def flags_of(checkpoint: Path, tmp_path: Path, *more: object, devices: tuple = SHARED) -> list[str]:
    """Of one rollout of a whole run, where `more` does not say otherwise."""
    from tools.make_arithmetic_data import main as make_data

    make_data(["--output", str(tmp_path), "--train", "64", "--eval", "8", "--max-operand", "4"])
    # Rewards are random, because an untrained model earns none, and the step is large enough to show in bf16.
    flags = [
        *model_args("qwen3-tiny"),
        "--hf-checkpoint",
        checkpoint,
        "--save",
        tmp_path / "run",
        "--save-interval",
        1,
        "--save-hf",
        tmp_path / "hf-{rollout_id}",
        "--actor-num-nodes",
        1,
        *devices,
        "--rollout-num-gpus-per-engine",
        1,
        "--prompt-data",
        tmp_path / "train.jsonl",
        "--input-key",
        "prompt",
        "--label-key",
        "label",
        "--apply-chat-template",
        "--rm-type",
        "random",
        "--num-rollout",
        1,
        "--rollout-batch-size",
        4,
        "--n-samples-per-prompt",
        4,
        "--global-batch-size",
        16,
        "--rollout-max-response-len",
        8,
        "--use-kl-loss",
        "--kl-loss-coef",
        0.01,
        "--kl-loss-type",
        "low_var_kl",
        "--ref-load",
        checkpoint,
        "--optimizer",
        "adam",
        "--lr",
        2e-2,
        "--lr-decay-style",
        "constant",
        "--use-dynamic-batch-size",
        "--max-tokens-per-gpu",
        1024,
        "--data-pad-size-multiplier",
        16,
        "--sglang-server-concurrency",
        16,
        *more,
    ]
    return [str(word) for word in flags]


def run(
    checkpoint: Path, tmp_path: Path, *more: object, devices: tuple = SHARED, module: str = "slime.train",
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:  # fmt: skip
    """One rollout of a whole run, where `more` does not say otherwise; logs of its servers are in tmp_path / "logs"."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {
        "SLIME_RUN_DIR": str(tmp_path / "logs"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests/rollout"), os.environ.get("PYTHONPATH")])),
        **(env or {}),
    }
    return subprocess.run(
        [sys.executable, "-m", module, *flags_of(checkpoint, tmp_path, *more, devices=devices)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_a_wrong_function_of_the_trainers_ends_the_run_before_engines_come_up(checkpoint, tmp_path):
    ended = run(checkpoint, tmp_path, "--use-tis", "--custom-tis-function-path", "example_plugins.ranking.centred_ranks")
    text = ended.stdout + ended.stderr
    said = "--custom-tis-function-path example_plugins.ranking.centred_ranks: found centred_ranks(args, samples) (missing"
    assert ended.returncode == 1 and said in text and "expected fn(*, args, pg_loss, train_log_probs" in text, text[-3000:]
    assert not list((tmp_path / "logs").rglob("*engine*")), "no engine was started"


@pytest.mark.usefixtures("recorded_run")
def test_a_tiny_qwen3_trains_on_two_tensor_parallel_ranks_and_feeds_two_engines(checkpoint, tmp_path):
    """With plugins as they are written for slime: one generates through the router by `post`, one weighs the loss."""
    plugins = ROOT / "tests" / "rollout" / "example_plugins"
    ended = run(
        checkpoint, tmp_path,
        "--custom-generate-function-path", "example_plugins.calculator.generate",
        "--custom-tis-function-path", "example_plugins.mismatch.importance",
        "--custom-config-path", plugins / "mismatch.yaml",
    )  # fmt: skip
    text = ended.stdout + ended.stderr
    assert ended.returncode == 0, text[-6000:]
    metrics = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    [dropped] = [row["train/mis_dropped"] for row in metrics if "train/mis_dropped" in row]
    assert 0 <= dropped < 0.1, "trainer and engine nearly agree, so hardly a token leaves [1/2, 2]"
    [gap] = re.findall(r"rollout 1/1 \| reward .* \| gap ([\d.]+) ", text)
    # Float32 on both sides, weights cross as bf16: 8 mantissa bits move a log-prob by some thousandths.
    assert float(gap) < 0.05, gap
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text().strip() == "0"
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf-0")
    start = AutoModelForCausalLM.from_pretrained(checkpoint)
    moved = sum(
        (a.float() - b.float()).abs().max().item() > 0 for a, b in zip(exported.parameters(), start.parameters(), strict=True)
    )
    assert moved == len(list(start.parameters())), "every parameter was trained and exported"


def _judged(folder: Path, checkpoint: Path) -> tuple:
    """A second model behind a router of its own, which the reward asks by its name."""
    (folder / "engines.yaml").write_text(
        "sglang:\n  - {name: policy, server_groups: [{num_gpus: 1}]}\n"
        f"  - {{name: judge, model_path: {checkpoint}, update_weights: false, server_groups: [{{num_gpus: 1}}]}}\n"
    )
    return "--sglang-config", folder / "engines.yaml", "--custom-rm-path", "example_plugins.judge.reward"


@pytest.mark.parametrize("way", ["nccl", "disk"])
def test_an_engine_on_a_device_of_its_own_gets_the_trained_weights(checkpoint, tmp_path, way):
    """By a broadcast, one step ahead, or as differences in files, while it generates; SGLang gives no tensor back by name."""
    files = ("--update-weight-transport", "disk", "--update-weight-mode", "delta", "--update-weight-disk-dir", tmp_path / "w",
             "--update-weight-local-checkpoint-dir", tmp_path / "local")  # fmt: skip
    always = (*files, "--schedule", "fully-async", "--max-weight-staleness", 1)
    more = always if way == "disk" else ("--update-weight-transport", "nccl", *_judged(tmp_path, checkpoint))
    devices, module = (APART, "slime.train") if way == "disk" else (WITH_A_JUDGE, "slime.train_async")
    ended = run(checkpoint, tmp_path, "--check-weight-update-equal", *more, "--num-rollout", 2, devices=devices, module=module)
    text = ended.stdout + ended.stderr
    assert ended.returncode == 0, text[-6000:]
    # Of each of 4 layers two norms and two matrices of attention, two norms, two matrices of the MLP; and three more.
    same = r"weights v(\d): 35 parameters of (?:default|policy)-regular-0 stay as they are when all is sent again"
    assert re.findall(same, text) == ["1", "2", "3"], text[-6000:]
    gap, _ = re.findall(r"rollout \d/2 \| reward .* \| gap ([\d.]+) ", text)
    assert float(gap) < 0.05, gap
    rows = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "rollout/weight_staleness/max" in row]
    ages = [row["rollout/weight_staleness/max"] for row in rows]
    if way == "nccl":
        assert ages == [0.0, 1.0], "the second rollout was generated by the weights that the first was trained from"
        logs = "".join(file.read_text() for file in (tmp_path / "logs").rglob("trainer*.log"))
        assert logs.count("1 ranks of 1 engines joined") == 1, "once, for all syncs, without the judge"
        asked = (tmp_path / "logs" / "judge-regular-1-0.log").read_text().count('"POST /generate HTTP/1.1" 200')
        assert asked == 32, "by the reward of each of 2 x 4 x 4 samples"
        return
    assert ages[0] == 0 and ages[1] <= 1
    # Two rollouts of 4 prompts ahead with a bound of 1; 4 of 8 are trained, and 4 more are begun when the weights are new.
    assert [row["rollout/groups_in_flight"] + row["rollout/groups_ready"] for row in rows] == [4, 4]
    assert [row["rollout/groups_submitted"] for row in rows] == [8, 4]
    headers = [json.loads((tmp_path / "w" / f"weight_v00000{v}" / "version.json").read_text()) for v in (1, 2, 3)]
    assert [header["base"] for header in headers] == [0, 1, 2]
    assert headers[0]["digests"] == {}, "the trainer began with the serving checkpoint"
    exported, local = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (tmp_path / "hf-1", tmp_path / "local")
    )
    assert exported.keys() == local.keys() == headers[2]["digests"].keys()
    assert all(torch.equal(exported[name], local[name]) for name in exported)


@pytest.fixture
def engine_of_somebody_else(checkpoint, tmp_path):
    """A server that serves the checkpoint, and beside it a process that follows the differences in tmp_path / "w"."""
    engine = EngineProcess(spec("regular", 0, checkpoint), device_kind="host", token=TOKEN, log_path=tmp_path / "engine.log")
    engine.start()
    engine.wait_ready()
    folders = {"--root": tmp_path / "w", "--local": tmp_path / "local", "--origin": checkpoint, "--engine": engine.url}
    words = [str(word) for pair in folders.items() for word in pair]
    follower = subprocess.Popen([sys.executable, "-m", "slime.weights.follow", *words], cwd=ROOT)
    try:
        yield engine
    finally:
        follower.kill()
        follower.wait()
        engine.stop()


def test_engines_of_somebody_else_follow_differences_and_serve_on_when_the_run_has_ended(
    checkpoint, tmp_path, engine_of_somebody_else
):
    engine = engine_of_somebody_else
    ended = run(
        checkpoint, tmp_path, "--rollout-external-engine-addrs", engine.url, "--update-weight-transport", "disk",
        "--update-weight-mode", "delta", "--update-weight-disk-dir", tmp_path / "w",
        "--check-weight-update-equal",
        devices=("--actor-num-gpus-per-node", 1, "--num-gpus-per-node", 1), env={"SLIME_ENGINE_TOKEN": TOKEN},
    )  # fmt: skip
    text = ended.stdout + ended.stderr
    assert ended.returncode == 0, text[-6000:]
    assert f"engine default-regular-0: external, at {engine.url}, sglang 0.5.23, TP 1 x PP 1, EP 1" in text
    [gap] = re.findall(r"rollout 1/1 \| reward .* \| gap ([\d.]+) ", text)
    assert float(gap) < 0.05, gap
    exported, local = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (tmp_path / "hf-0", tmp_path / "local")
    )
    assert exported.keys() == local.keys() and all(torch.equal(exported[name], local[name]) for name in exported)
    client = EngineClient(engine.url, TOKEN)
    assert sync(client.weight_version()) == "2"
    answer = sync(client.generate({"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}))
    assert answer["meta_info"]["completion_tokens"] == 2


def test_an_engine_of_two_ranks_elsewhere_gets_its_weights_from_a_receiver_beside_each(checkpoint, tmp_path):
    devices = ("--actor-num-gpus-per-node", 1, "--num-gpus-per-node", 3, "--rollout-num-gpus", 2)
    more = ("--rollout-num-gpus-per-engine", 2, "--update-weight-transport", "receivers", "--check-weight-update-equal")
    ended = run(checkpoint, tmp_path, *more, devices=devices)
    text = ended.stdout + ended.stderr
    assert ended.returncode == 0, text[-6000:]
    same = r"weights v(\d): 70 parameters of default-regular-0 stay as they are when all is sent again"  # 35 on each rank
    assert re.findall(same, text) == ["1", "2"], text[-6000:]
    [gap] = re.findall(r"rollout 1/1 \| reward .* \| gap ([\d.]+) ", text)
    assert float(gap) < 0.05, gap
    logs = "".join(file.read_text() for file in (tmp_path / "logs").rglob("trainer*.log"))
    assert logs.count("2 receivers of 1 engines joined") == 1, "once, for both syncs"


LAUNCHER = """
source "$1/scripts/lib/launch.sh"
shift
own BASE_DIR
start_ray_head
submit_job "$(runtime_env_json "PYTHONPATH=$PROJECT_ROOT" "SLIME_RUN_DIR=$BASE_DIR/run" OMP_NUM_THREADS=1)" "$@"
"""


@by_hand("two launches and two audits, three minutes")
@pytest.mark.parametrize("way", ["receivers", "nccl"])
def test_nothing_is_open_beside_engines_on_devices_of_their_own(checkpoint, tmp_path, way):
    """The group in which weights travel stays open between two syncs: its store, its connections, the receivers."""
    (tmp_path / "base").mkdir()
    (tmp_path / "launch.sh").write_text(LAUNCHER)
    lasting = ("--num-rollout", 1000, "--save-interval", 1000)
    more = ("--rollout-num-gpus-per-engine", 2, "--update-weight-transport", way, *lasting)
    environment = os.environ | {"BASE_DIR": str(tmp_path / "base"), "NUM_GPUS": "3", "NUM_CPUS": "8"}
    with (tmp_path / "said").open("w") as said:
        launch = subprocess.Popen(
            ["bash", str(tmp_path / "launch.sh"), str(ROOT), *flags_of(checkpoint, tmp_path, *more, devices=WITH_A_JUDGE)],
            env=environment, stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        while "| reward" not in (tmp_path / "said").read_text():
            assert launch.poll() is None, (tmp_path / "said").read_text()[-6000:]
            time.sleep(0.5)
        found = audits.audited(tmp_path / "base", passed={})
        assert launch.poll() is None, "the run goes on beside an audit"
    finally:
        launch.terminate()
        launch.wait(90)
    audits.check(found, passed={})
    stores = [row for row in found["rows"] if (row["who"], row["protocol"]) == ("ray::TrainActor", "torch store")]
    assert len(stores) >= 2 and all(row["place"].startswith("127.0.0.1:") for row in stores), "the ranks' and the group's"
    assert ("ray::WeightReceiver" in {row["who"] for row in found["rows"]}) is (way == "receivers")
