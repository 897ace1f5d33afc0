"""Launchers, run with a recorded ray and ssh in front of PATH: what they would start, with the recipe's numbers by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from slime.config import parse
from tools import make_tiny_checkpoint
from tools.tiny_tokenizer import TokenizerFacts

ROOT = Path(__file__).resolve().parents[2]

# `ray start` stays, as with --block; everything else answers at once. Each call is one line of JSON.
FAKE_RAY = f"""#!{sys.executable}
import json, os, signal, subprocess, sys, time
keep = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
with open(os.environ["CALLS"], "a") as out:
    call = {{"argv": sys.argv[1:], "pid": os.getpid(), "env": {{k: os.environ.get(k) for k in keep}}, "all": dict(os.environ)}}
    if secret := call["env"]["RAY_AUTH_TOKEN_PATH"]:
        call["token"], call["token_mode"] = open(secret).read(), os.stat(secret).st_mode & 0o777
    if "--temp-dir" in sys.argv:
        call["mode"] = os.stat(os.path.dirname(sys.argv[sys.argv.index("--temp-dir") + 1])).st_mode & 0o777
    out.write(json.dumps(call) + "\\n")
if sys.argv[1] == "start":
    if os.environ.get("HEAD_FAILS"):
        print("cannot bind")
        sys.exit(1)
    print("Ray runtime started. The head's last words.", flush=True)
    if "RAYLET" in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: print("received SIGTERM. Draining for up to 30 s", flush=True) or sys.exit(1))
        raylet = subprocess.Popen([os.environ["RAYLET"], "120"])
        open(os.environ["CALLS"] + ".raylet", "w").write(str(raylet.pid))
        raylet.wait()
    time.sleep(120)
if sys.argv[1:3] == ["job", "list"] and os.environ.get("HEAD_FAILS"):
    sys.exit(1)
if sys.argv[1:3] == ["job", "submit"]:
    if "RAYLET" in os.environ:
        time.sleep(3)
        if "RAYLET_STAYS" not in os.environ:
            os.kill(int(open(os.environ["CALLS"] + ".raylet").read()), 15)
        print(f"Status for job '{{sys.argv[sys.argv.index('--submission-id') + 1]}}': RUNNING")
        sys.exit(0)  # as Ray's client does
    time.sleep(float(os.environ.get("JOB_SECONDS", "0")))
    if os.environ.get("HEAD_DIES_WITH_THE_JOB"):
        calls = [json.loads(line) for line in open(os.environ["CALLS"])]
        os.kill(next(call["pid"] for call in calls if call["argv"][0] == "start"), 9)
        time.sleep(0.5)
        sys.exit(1)
    if "DRIVER" in os.environ:
        driver = [sys.executable, "-m", "slime.train"]
        sys.exit(subprocess.run(driver, env={{**os.environ, "PYTHONPATH": os.environ["DRIVER"]}}).returncode)
    sys.exit(int(os.environ.get("JOB_STATUS", "0")))
"""
FAKE_SSH = f"""#!{sys.executable}
import json, os, sys
text = sys.stdin.read()
with open(os.environ["CALLS"] + ".ssh", "a") as out:
    out.write(json.dumps({{"argv": sys.argv[1:], "stdin": text}}) + "\\n")
host = next(word for word in sys.argv[1:] if word[0].isdigit())
if host == os.environ.get("DEAD_HOST"):
    sys.stderr.write("no route to host\\n")
    sys.exit(255)
if "ray start" in text:
    print(40000 + int(host.rsplit(".", 1)[1]))
"""


@dataclass(frozen=True)
class Outcome:
    status: int
    stderr: str
    ray: list[dict]
    ssh: list[dict]

    def ray_call(self, *words: str) -> dict:
        found = [call for call in self.ray if tuple(call["argv"][: len(words)]) == words]
        assert len(found) == 1, (words, self.ray, self.stderr)
        return found[0]

    @property
    def job(self) -> list[str]:
        """The training command's flags."""
        argv = self.ray_call("job", "submit")["argv"]
        command = argv[argv.index("--") + 1 :]
        assert command[1:3] == ["-m", "slime.train"]
        return command[3:]

    @property
    def job_environment(self) -> dict[str, str]:
        argv = self.ray_call("job", "submit")["argv"]
        return json.loads(argv[argv.index("--runtime-env-json") + 1])["env_vars"]


@dataclass(frozen=True)
class Desk:
    """A folder with shims, checkpoints and a hostfile."""

    root: Path
    ray: Path
    """RAY_TEMP_DIR: sockets lie in it, so its name is short."""

    def run(self, script: str, *flags: str, without: tuple[str, ...] = (), **environment: str) -> Outcome:
        calls = self.root / "calls"
        for file in (calls, Path(f"{calls}.ssh")):
            file.unlink(missing_ok=True)
        base = {
            "PATH": f"{self.root / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.root), "CALLS": str(calls), "BASE_DIR": str(self.root / "base"), "MASTER_ADDR": "10.0.0.1",
            "HOSTFILE": str(self.root / "hostfile"), "RAY_TEMP_DIR": str(self.ray),
            "RAY_PORT": "", "PYTHON": sys.executable, "RUN_DIR": str(self.root / "run"),
        }  # fmt: skip
        environment = {name: value for name, value in {**base, **environment}.items() if name not in without}
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / script), *flags], env=environment, capture_output=True, text=True, timeout=120
        )
        return Outcome(done.returncode, done.stderr, _lines(calls), _lines(Path(f"{calls}.ssh")))


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@contextmanager
def make_desk(tmp_path: Path) -> Iterator[Desk]:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in (("ray", FAKE_RAY), ("ssh", FAKE_SSH)):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    base = tmp_path / "base"
    for model in ("GLM-5.2", "Qwen3-4B"):
        (base / f"{model}_torch_dist" / "release").mkdir(parents=True)
        (base / f"{model}_torch_dist" / "latest_checkpointed_iteration.txt").write_text("release")
    (base / "GLM-5.2-FP8").mkdir()
    (base / "Qwen3-4B").mkdir()
    for data in ("dapo-math-17k/dapo-math-17k.jsonl", "aime-2024/aime-2024.jsonl"):
        (base / data).parent.mkdir()
        (base / data).write_text('{"prompt": "1+1=", "label": "2"}\n')
    (tmp_path / "hostfile").write_text("# all nodes\n" + "".join(f"10.0.0.{n} slots=8\n" for n in range(1, 33)) + "\n")
    with tempfile.TemporaryDirectory(prefix="slime-desk-", dir="/tmp") as ray:
        yield Desk(tmp_path, Path(ray))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with make_desk(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def shared_desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with make_desk(tmp_path_factory.mktemp("flagship")) as made:
        yield made


def pairs(argv: list[str]) -> dict[str, str]:
    """Flag -> its words, joined."""
    found: dict[str, list[str]] = {}
    for word in argv:
        if word.startswith("--"):
            last = found.setdefault(word, [])
            last.clear()
        else:
            last.append(word)
    return {name: " ".join(words) for name, words in found.items()}


GLM52 = {
    # model
    "--spec": "slime_plugins.models.glm5.glm5 get_glm5_spec", "--num-layers": "78", "--hidden-size": "6144",
    "--ffn-hidden-size": "12288", "--num-attention-heads": "64", "--vocab-size": "154880",
    "--make-vocab-size-divisible-by": "16",
    "--moe-layer-freq": "[0]*3+[1]*75", "--num-experts": "256", "--moe-router-topk": "8", "--moe-ffn-hidden-size": "2048",
    "--moe-shared-expert-intermediate-size": "2048", "--moe-router-score-function": "sigmoid", "--moe-router-dtype": "fp32",
    "--moe-router-topk-scaling-factor": "2.5", "--moe-router-bias-update-rate": "0", "--moe-aux-loss-coeff": "0",
    "--moe-router-load-balancing-type": "seq_aux_loss", "--q-lora-rank": "2048", "--kv-lora-rank": "512",
    "--qk-head-dim": "192",
    "--qk-pos-emb-head-dim": "64", "--v-head-dim": "256", "--kv-channels": "192", "--rotary-base": "8000000",
    "--normalization": "RMSNorm", "--position-embedding-type": "rope",
    "--allgather-cp": "", "--multi-latent-attention": "", "--qk-layernorm": "", "--swiglu": "", "--disable-bias-linear": "",
    "--untie-embeddings-and-output-weights": "", "--no-position-embedding": "", "--enable-experimental": "",
    "--moe-grouped-gemm": "", "--moe-permute-fusion": "", "--moe-router-pre-softmax": "", "--moe-router-enable-expert-bias": "",
    # checkpoints and rollout
    "--save-interval": "20", "--input-key": "prompt", "--label-key": "label", "--apply-chat-template": "",
    "--rollout-shuffle": "",
    "--rm-type": "deepscaler", "--num-rollout": "3000", "--rollout-batch-size": "8", "--n-samples-per-prompt": "8",
    "--rollout-max-response-len": "65536", "--rollout-temperature": "1.0", "--global-batch-size": "64",
    # layout
    "--actor-num-nodes": "32", "--actor-num-gpus-per-node": "8", "--colocate": "",
    "--tensor-model-parallel-size": "4", "--sequence-parallel": "", "--pipeline-model-parallel-size": "8",
    "--decoder-first-pipeline-num-layers": "14", "--decoder-last-pipeline-num-layers": "16", "--context-parallel-size": "8",
    "--expert-model-parallel-size": "32", "--expert-tensor-parallel-size": "1", "--recompute-granularity": "full",
    "--recompute-method": "uniform", "--recompute-num-layers": "1", "--use-dynamic-batch-size": "",
    "--max-tokens-per-gpu": "8192",
    "--data-pad-size-multiplier": "1024", "--log-probs-chunk-size": "16384", "--update-weight-buffer-size": "2147483648",
    # algorithm and optimizer
    "--advantage-estimator": "grpo", "--kl-loss-coef": "0.00", "--kl-loss-type": "low_var_kl", "--kl-coef": "0.00",
    "--entropy-coef": "0.00", "--eps-clip": "0.2", "--eps-clip-high": "0.28", "--use-tis": "", "--tis-clip-low": "0.5",
    "--tis-clip": "2.0", "--optimizer": "adam", "--lr": "1e-6", "--lr-decay-style": "constant", "--weight-decay": "0.1",
    "--adam-beta1": "0.9", "--adam-beta2": "0.98", "--optimizer-cpu-offload": "", "--overlap-cpu-optimizer-d2h-h2d": "",
    "--use-precision-aware-optimizer": "",
    # engines
    "--rollout-num-gpus-per-engine": "64", "--sglang-mem-fraction-static": "0.70", "--sglang-enable-dp-attention": "",
    "--sglang-ep-size": "64", "--sglang-dp-size": "64", "--sglang-moe-dense-tp-size": "1", "--sglang-enable-dp-lm-head": "",
    "--sglang-moe-a2a-backend": "deepep", "--sglang-deepep-mode": "auto", "--sglang-page-size": "64",
    "--sglang-kv-cache-dtype": "fp8_e4m3", "--sglang-nsa-decode-backend": "flashmla_kv",
    "--sglang-nsa-prefill-backend": "flashmla_sparse", "--sglang-attention-backend": "nsa", "--sglang-cuda-graph-max-bs": "8",
    "--sglang-disable-overlap-schedule": "", "--sglang-max-running-requests": "512", "--sglang-watchdog-timeout": "3600",
    "--sglang-disaggregation-transfer-backend": "mooncake",
    "--sglang-disaggregation-ib-device": "mlx5_100,mlx5_101,mlx5_102,mlx5_103,mlx5_104,mlx5_105,mlx5_106,mlx5_107",
    "--sglang-speculative-algorithm": "EAGLE", "--sglang-speculative-num-steps": "4", "--sglang-speculative-eagle-topk": "1",
    "--sglang-speculative-num-draft-tokens": "5", "--sglang-speculative-draft-attention-backend": "nsa",
    # the rest
    "--attention-dropout": "0.0", "--hidden-dropout": "0.0", "--accumulate-allreduce-grads-in-fp32": "",
    "--attention-softmax-in-fp32": "", "--attention-backend": "flash", "--moe-token-dispatcher-type": "alltoall",
    "--no-check-for-nan-in-loss-and-grad": "", "--use-tensorboard": "", "--tb-project-name": "glm5.2-744B-A40B",
}  # fmt: skip

GLM52_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONUNBUFFERED": "1", "MASTER_ADDR": "10.0.0.1", "GLOO_SOCKET_IFNAME": "eth0",
    "TP_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0", "NCCL_P2P_LEVEL": "NVL", "NCCL_NVLS_ENABLE": "0",
    "NCCL_CUMEM_ENABLE": "0", "NCCL_NET_GDR_LEVEL": "2", "NCCL_IB_QPS_PER_CONNECTION": "2", "NCCL_IB_TC": "160",
    "NCCL_IB_TIMEOUT": "22", "NCCL_PXN_DISABLE": "0", "NCCL_MIN_CTAS": "4", "NVTE_FWD_LAYERNORM_SM_MARGIN": "8",
    "NVTE_BWD_LAYERNORM_SM_MARGIN": "8", "INDEXER_ROPE_NEOX_STYLE": "0", "MC_IB_PCI_RELAXED_ORDERING": "1",
    "MLP_SKIP_SORT_RDMA": "true", "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "64",
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "true", "NVSHMEM_DISABLE_NCCL": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def free_ports() -> dict[str, str]:
    import socket

    with socket.socket() as one, socket.socket() as other:
        one.bind(("", 0))
        other.bind(("", 0))
        return {"RAY_DASHBOARD_PORT": str(one.getsockname()[1]), "RAY_PORT": str(other.getsockname()[1])}


@pytest.fixture(scope="module")
def glm52(shared_desk: Desk, free_ports: dict[str, str]) -> Outcome:
    """The flagship launcher, run once with nothing but what the documentation says to set (and free ports)."""
    outcome = shared_desk.run("run-glm5.2-744B-A40B.sh", **free_ports)
    assert outcome.status == 0, outcome.stderr
    return outcome


def test_the_flagship_submits_exactly_the_recipe(shared_desk: Desk, glm52: Outcome):
    base = shared_desk.root / "base"
    paths = {
        "--hf-checkpoint": str(base / "GLM-5.2-FP8"), "--ref-load": str(base / "GLM-5.2_torch_dist"),
        "--load": str(base / "GLM-5.2_slime"), "--save": str(base / "GLM-5.2_slime"),
        "--prompt-data": str(base / "dapo-math-17k/dapo-math-17k.jsonl"),
        "--sglang-config": str(shared_desk.root / "run/sglang.yaml"),
    }  # fmt: skip
    assert pairs(glm52.job) == {**GLM52, **paths}


def test_the_flagship_environment_is_the_recipes(glm52: Outcome):
    environment = glm52.job_environment
    assert {name: environment.get(name) for name in GLM52_ENVIRONMENT} == GLM52_ENVIRONMENT
    assert environment["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert "10.0.0.1" in environment["no_proxy"] and environment["no_proxy"] == environment["NO_PROXY"]


def test_the_flagship_engines_fill_256_gpus(shared_desk: Desk, glm52: Outcome):
    groups = yaml.safe_load((shared_desk.root / "run/sglang.yaml").read_text())["sglang"][0]["server_groups"]
    prefill, decode = groups
    assert (prefill["worker_type"], prefill["num_gpus"], prefill["num_gpus_per_engine"]) == ("prefill", 64, 64)
    assert (decode["worker_type"], decode["num_gpus"], decode["num_gpus_per_engine"]) == ("decode", 192, 64)
    assert sum(group["num_gpus"] for group in groups) == 256 == 32 * 8
    assert prefill["overrides"]["deepep_mode"] == "auto"
    assert decode["overrides"]["deepep_mode"] == "low_latency" and decode["overrides"]["moe_runner_backend"] == "deep_gemm"
    room = int(glm52.job_environment["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"])
    assert (
        room >= decode["overrides"]["cuda_graph_max_bs"] * int(pairs(glm52.job)["--sglang-speculative-num-draft-tokens"]) == 60
    )


def test_the_flagship_flags_mean_one_copy_on_256_gpus(glm52: Outcome):
    config = parse(glm52.job)
    assert (config.parallel.world_size, config.parallel.data_parallel_size) == (256, 1)
    assert config.cluster.rollout_num_gpus == 256
    assert [group.num_engines for group in config.engine.groups[0].server_groups] == [1, 3]
    assert config.model.padded_vocab_size == 154880  # 2420 x (16 x 4)
    assert config.checkpoint.load == config.checkpoint.ref_load and config.checkpoint.start_rollout_id == 0
    assert config.optimizer.check_for_nan_in_loss_and_grad is False
    assert config.model.megatron["rope_type"] == "rope"
    # Stages: 14, six of 8, 16. Layers that compute their own indices, counted from 1: 1, 2, 3 and then 7, 11, ...
    first, last = config.parallel.decoder_first_pipeline_num_layers, config.parallel.decoder_last_pipeline_num_layers
    middle = (78 - first - last) // 6
    starts = [1] + [1 + first + middle * stage for stage in range(7)]
    assert starts == [1, 15, 23, 31, 39, 47, 55, 63]
    assert set(starts) <= {1, 2, 3, *range(7, 76, 4)}


def test_every_other_node_joins_with_the_token_on_standard_input(glm52: Outcome, free_ports: dict[str, str]):
    joined = [call for call in glm52.ssh if "ray start" in call["stdin"]]
    assert sorted(call["argv"][-3] for call in joined) == sorted(f"10.0.0.{n}" for n in range(2, 33))
    head = glm52.ray_call("start", "--head")
    token = head["token"]
    assert len(token) == 64 and head["token_mode"] == 0o600 and head["env"]["RAY_AUTH_TOKEN"] is None
    for call in joined:
        assert f"umask 077 && printf %s {token} " in call["stdin"] and token not in " ".join(call["argv"])
        assert f"--address 10.0.0.1:{free_ports['RAY_PORT']} " in call["stdin"] and "--num-gpus 8" in call["stdin"]
        assert f"export RAY_AUTH_TOKEN_PATH={head['env']['RAY_AUTH_TOKEN_PATH']}\n" in call["stdin"]
    assert glm52.ray_call("job", "submit")["env"] == head["env"]
    # A token in the environment is printed and inherited; the file goes with the cluster.
    assert [call for call in glm52.ray if token in "".join(call["all"].values())] == []
    assert not Path(head["env"]["RAY_AUTH_TOKEN_PATH"]).exists()


def test_the_dashboard_is_not_open_to_the_world(glm52: Outcome):
    head = glm52.ray_call("start", "--head")["argv"]
    assert head[head.index("--dashboard-host") + 1] == "127.0.0.1"
    assert head[head.index("--node-ip-address") + 1] == "10.0.0.1"
    assert "0.0.0.0" not in head


def test_clean_up_stops_what_was_started_and_nothing_else(glm52: Outcome):
    head = glm52.ray_call("start", "--head")["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(head, 0)
    assert not any(call["argv"][0] == "stop" for call in glm52.ray)
    kills = {
        call["argv"][-3]: call["stdin"] for call in glm52.ssh if "kill" in call["stdin"] and "ray start" not in call["stdin"]
    }
    assert {address: text.splitlines()[0] for address, text in kills.items()} == {
        f"10.0.0.{n}": f"kill -TERM {40000 + n} 2>/dev/null" for n in range(2, 33)
    }
    # What else is killed there carries this launch's name.
    names = {re.search(r"grep -lsxzF SLIME_LAUNCH=([0-9a-f]{32}) ", text)[1] for text in kills.values()}
    assert len(names) == 1 and all(text.count("kill ") == 2 for text in kills.values())


def test_launchers_kill_nothing_by_name():
    for file in (ROOT / "scripts").rglob("*.sh"):
        code = "\n".join(line.split("#")[0] for line in file.read_text().splitlines())
        for word in ("pkill", "killall", "ray stop"):
            assert word not in code, f"{file.name} uses {word}"


def test_extra_flags_come_last_and_win(desk: Desk, free_ports: dict[str, str]):
    outcome = desk.run(
        "run-glm5.2-744B-A40B.sh",
        "--num-rollout",
        "7",
        **free_ports,
        SOCKET_IFNAME="bond0",
        without=("HOSTFILE",),
    )
    assert outcome.job[-2:] == ["--num-rollout", "7"]
    assert parse(outcome.job).data.num_rollout == 7
    assert outcome.job_environment["GLOO_SOCKET_IFNAME"] == outcome.job_environment["NCCL_SOCKET_IFNAME"] == "bond0"


def test_the_jobs_status_is_the_launchers(desk: Desk, free_ports: dict[str, str]):
    outcome = desk.run(
        "run-glm5.2-744B-A40B.sh",
        JOB_STATUS="3",
        **free_ports,
        without=("HOSTFILE",),
    )
    assert outcome.status == 3


REFUSALS = [
    ("BASE_DIR unset", {}, ("BASE_DIR",), None, "BASE_DIR is not set"),
    ("MASTER_ADDR unset", {}, ("MASTER_ADDR",), None, "MASTER_ADDR is not set"),
    ("hostfile missing", {"HOSTFILE": "/nowhere/hosts"}, (), None, "HOSTFILE=/nowhere/hosts cannot be read"),
    ("hostfile short", {"NUM_NODES": "33"}, (), None, "names 32 nodes (this one, 10.0.0.1, included), the recipe needs 33"),
    ("checkpoint missing", {}, (), "base/GLM-5.2-FP8", "hf download zai-org/GLM-5.2-FP8"),
    ("conversion missing", {}, (), "base/GLM-5.2_torch_dist", "tools/convert_hf_to_torch_dist.py"),
    ("prompts missing", {}, (), "base/dapo-math-17k", "dapo-math-17k.jsonl: the prompts"),
]


@pytest.mark.parametrize(
    ("environment", "without", "removed", "said"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS]
)
def test_what_is_missing_is_one_line_before_ray_starts(
    desk: Desk, environment: dict[str, str], without: tuple[str, ...], removed: str | None, said: str
):
    if removed:
        shutil.rmtree(desk.root / removed)
    outcome = desk.run("run-glm5.2-744B-A40B.sh", without=without, **environment)
    assert outcome.status == 1 and outcome.ray == []
    assert said in outcome.stderr and len(outcome.stderr.splitlines()) == 1


def test_a_typo_is_refused_before_ray_starts(desk: Desk):
    outcome = desk.run("run-glm5.2-744B-A40B.sh", "--num-rolout", "7")
    assert outcome.status == 1 and outcome.ray == []
    assert "unknown flag --num-rolout; did you mean --num-rollout?" in outcome.stderr


def test_the_tiny_launcher_answers_a_typo_before_it_makes_its_checkpoint(desk: Desk):
    outcome = desk.run("run-glm5.2-tiny.sh", "--rolout-batch-size", "8", BASE_DIR=str(desk.root / "new"))
    assert outcome.status == 1 and "did you mean --rollout-batch-size?" in outcome.stderr
    assert list((desk.root / "new").iterdir()) == [], "its RUN_DIR is elsewhere"


def test_a_port_in_use_is_named(desk: Desk):
    import socket

    with socket.socket() as one:
        one.bind(("", 0))
        one.listen()
        port = str(one.getsockname()[1])
        outcome = desk.run("run-glm5.2-744B-A40B.sh", RAY_PORT=port)
    assert outcome.status == 1 and outcome.ray == []
    assert f"port {port} is in use on this node" in outcome.stderr and "RAY_PORT" in outcome.stderr


def test_a_head_that_dies_ends_the_launch_with_its_last_lines(desk: Desk, free_ports: dict[str, str]):
    outcome = desk.run(
        "run-glm5.2-744B-A40B.sh",
        HEAD_FAILS="1",
        **free_ports,
        without=("HOSTFILE",),
    )
    assert outcome.status == 1
    assert "cannot bind" in outcome.stderr and "Ray ended while starting" in outcome.stderr


def test_a_head_that_dies_under_the_job_is_told_with_its_last_lines(desk: Desk, free_ports: dict[str, str]):
    outcome = desk.run("run-glm5.2-744B-A40B.sh", HEAD_DIES_WITH_THE_JOB="1", **free_ports, without=("HOSTFILE",))
    assert outcome.status == 1
    assert "The head's last words" in outcome.stderr and "Ray itself ended, and the job with it" in outcome.stderr


@pytest.mark.parametrize(
    ("stays", "told"),
    [
        (False, "Ray itself ended, and the job with it: raylet [exit code=0 or SIGTERM]; its log is"),
        (True, "the job has not come to its end: Status for job '"),
    ],
)
def test_a_job_that_rays_client_left_is_no_success(desk: Desk, free_ports: dict[str, str], stays: bool, told: str):
    """A raylet that is told to leave is a graceful end for Ray: its head lives on, and its client leaves with 0."""
    raylet = desk.root / "raylet"
    shutil.copy(shutil.which("sleep"), raylet)
    given = {"RAYLET": str(raylet)} | ({"RAYLET_STAYS": "1", "HEAD_END_SECONDS": "1"} if stays else {})
    outcome = desk.run("run-glm5.2-744B-A40B.sh", **given, **free_ports, without=("HOSTFILE",))
    assert outcome.status == 1
    assert f"[launch] error: {told}" in outcome.stderr and "with more rollouts" not in outcome.stderr


def test_a_node_that_does_not_join_is_named_and_the_others_are_stopped(desk: Desk, free_ports: dict[str, str]):
    outcome = desk.run("run-glm5.2-744B-A40B.sh", DEAD_HOST="10.0.0.9", **free_ports)
    assert outcome.status == 1
    assert "1 of 31 nodes did not join: 10.0.0.9 (no route to host)" in outcome.stderr
    assert not any(call["argv"][:2] == ["job", "submit"] for call in outcome.ray)
    assert sum("kill -TERM" in call["stdin"] and "ray start" not in call["stdin"] for call in outcome.ssh) == 30


def test_qwen3_4b_submits_its_recipe(desk: Desk):
    outcome = desk.run("run-qwen3-4B.sh", without=("HOSTFILE", "MASTER_ADDR"))
    assert outcome.status == 0, outcome.stderr
    said = pairs(outcome.job)
    wanted = {
        "--num-layers": "36", "--hidden-size": "2560", "--ffn-hidden-size": "9728", "--num-query-groups": "8",
        "--rollout-batch-size": "32", "--n-samples-per-prompt": "8", "--global-batch-size": "256",
        "--rollout-temperature": "0.8",
        "--rollout-max-response-len": "8192", "--tensor-model-parallel-size": "2", "--max-tokens-per-gpu": "9216",
        "--rollout-num-gpus-per-engine": "2", "--sglang-mem-fraction-static": "0.7", "--eval-interval": "20",
        "--n-samples-per-eval-prompt": "16", "--eval-top-p": "0.7", "--lr": "1e-6", "--kl-loss-type": "low_var_kl",
        "--use-kl-loss": "", "--balance-data": "", "--colocate": "",
    }  # fmt: skip
    assert {name: said.get(name) for name in wanted} == wanted
    config = parse(outcome.job)
    assert (config.parallel.world_size, config.parallel.data_parallel_size) == (8, 4)
    assert config.engine.groups[0].server_groups[0].num_engines == 4
    assert config.evaluation.datasets[0].max_response_len == 16384
    assert outcome.job_environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def make_tiny_base(base: Path, preset: str) -> None:
    """Every step before the tiny launcher's job counts as done, so only what would be submitted is looked at."""
    config = make_tiny_checkpoint.glm_config(make_tiny_checkpoint.PRESETS[preset].size, TokenizerFacts(320, (1,), 1))
    for folder, file, text in (
        ("GLM-5.2-tiny-FP8", "config.json", json.dumps(config)),
        ("GLM-5.2-tiny_torch_dist", "latest_checkpointed_iteration.txt", "release"),
        ("GLM-5.2-tiny_warm_start", "latest_checkpointed_iteration.txt", "199"),
    ):
        (base / folder).mkdir()
        (base / folder / file).write_text(text)
    (base / "GLM-5.2-tiny_torch_dist" / "release").mkdir()
    (base / "GLM-5.2-tiny_warm_start" / "iter_0000199").mkdir()
    (base / "arithmetic").mkdir()
    for data in ("train.jsonl", "eval.jsonl"):
        (base / "arithmetic" / data).write_text('{"prompt": "1+1=", "label": "2"}\n')


def test_on_a_gpu_the_tiny_launcher_takes_the_sizes_that_the_kernels_accept(desk: Desk):
    make_tiny_base(desk.root / "base", "h200")
    smi = desk.root / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\n")
    smi.chmod(0o755)
    outcome = desk.run("run-glm5.2-tiny.sh", "--num-rollout", "3", without=("NUM_GPUS",))
    assert outcome.status == 0, outcome.stderr
    parsed = parse(outcome.job)
    mla = parsed.model.megatron
    assert (mla["num_attention_heads"], mla["kv_lora_rank"], mla["qk_pos_emb_head_dim"]) == (64, 512, 64)
    assert parsed.cluster.actor_num_gpus_per_node == parsed.cluster.rollout_num_gpus == 1 and parsed.cluster.colocate
    (group,) = parsed.engine.groups[0].server_groups
    assert (group.worker_type, group.num_gpus) == ("regular", 1)
    assert parsed.data.num_rollout == 3 and parsed.batch.max_tokens_per_gpu == 16384


@pytest.mark.parametrize("file", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").rglob("*.sh")))
def test_scripts_are_valid_bash(file: str):
    subprocess.run(["bash", "-n", str(ROOT / file)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", "-e", "SC1090,SC1091", str(ROOT / file)], check=True)


@pytest.mark.slow
def test_a_ray_without_its_job_server_is_refused_in_seconds(tmp_path: Path):
    """The real Ray, with a package of ray[default] hidden: it starts, and nobody would ever answer at its job server."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['opentelemetry.exporter'] = None\n")
    temp = Path("/tmp") / f"slime-ray-none-{os.getpid()}"  # a socket's path may have 107 characters
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUM_GPUS": "1", "RAY_TEMP_DIR": str(temp)}
    outcome = subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source '{ROOT}/scripts/lib/launch.sh'; start_ray_head"],
        env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    shutil.rmtree(temp, ignore_errors=True)  # not made where the launch failed earlier
    assert outcome.returncode == 1
    assert "packages of ray[default] are missing (No module named 'opentelemetry.exporter" in outcome.stderr
    assert "the Ray cluster of this run is stopped" in outcome.stderr
