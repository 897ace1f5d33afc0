"""Each shim of slime/compat/sglang is still needed. A failure here means: upstream fixed it, delete the shim."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slime.compat.sglang import host_environment

NEEDS = {
    "triton": "import sglang",
    "torchvision": "import sglang.srt.multimodal.internvl_utils",
    "sgl_kernel": "import sglang.kernels.ops.kvcache.cache_move",
}


def run(code: str, *, off: str = "") -> subprocess.CompletedProcess[str]:
    env = host_environment(cores=[0]) | {"SLIME_SGLANG_SHIMS_OFF": off}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def source(module: str) -> str:
    """The text of a module of the installed sglang, without importing it."""
    package = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
    return (package / module).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NEEDS))
def test_without_the_stand_in_sglang_does_not_import(name):
    """That it does import with them is what every engine test shows."""
    answer = run(NEEDS[name], off=name)
    assert answer.returncode != 0 and f"No module named '{name}" in answer.stderr, f"the shim for {name} is obsolete"


def test_prefill_still_stages_indices_in_pinned_memory():
    assert "supports_host_tensor_indices = True" in source("srt/disaggregation/mooncake/conn.py")
    prefill = source("srt/disaggregation/prefill.py")
    taken = prefill[prefill.index('getattr(sender, "supports_host_tensor_indices"') :][:1500]
    assert "pin_memory=True" in taken and "torch.cuda.Event()" in taken


def test_host_buffers_are_still_registered_with_cuda():
    common = source("srt/mem_cache/pool_host/common.py")
    body = common[common.index("def _cuda_host_register(") :][:600]
    assert "torch.cuda.cudart()" in body


def test_tools_of_the_parsing_endpoint_still_lack_a_field():
    tools = source("srt/managers/io_struct.py")
    assert "strict" not in tools[tools.index("class Function(") : tools.index("class ParseFunctionCallReq(")]
    assert "tool.function.strict" in source("srt/function_call/function_call_parser.py")


def test_ranks_are_still_started_as_new_programs():
    engine = source("srt/entrypoints/engine.py")
    body = engine[engine.index("def _set_envs_and_config(") :]
    assert 'mp.set_start_method("spawn", force=True)' in body[: body.index("\ndef ", 1)]


@pytest.mark.slow
def test_torch_still_opens_its_store_to_every_interface():
    code = (
        "import socket, torch.distributed as d\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]; s.close()\n"
        "d.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=0, world_size=1)\n"
        "lines = [l.split()[1] for f in ('tcp', 'tcp6') for l in open(f'/proc/net/{f}') if l.split()[3] == '0A']\n"
        "print([a.rpartition(':')[0] for a in lines if a.endswith(f':{port:04X}')])"
    )
    assert run(code, off="loopback_store").stdout.strip() in (f"['{'0' * 32}']", f"['{'0' * 8}']")
    assert run(code).stdout.strip() == "['0100007F']"


@pytest.mark.slow
def test_mooncake_still_listens_on_every_interface():
    code = (
        "import os, socket, mooncake.engine as m\n"
        "engine = m.TransferEngine()\n"
        "assert engine.initialize('127.0.0.1', 'P2PHANDSHAKE', 'tcp', '') == 0\n"
        "links = [f'/proc/self/fd/{fd}' for fd in os.listdir('/proc/self/fd')]\n"
        "mine = {os.readlink(link) for link in links if os.path.islink(link)}\n"
        "lines = [l.split() for f in ('tcp', 'tcp6') for l in open(f'/proc/net/{f}')]\n"
        "print(sorted(l[1].rpartition(':')[0] for l in lines if l[3] == '0A' and f'socket:[{l[9]}]' in mine))"
    )
    assert run(code, off="mooncake_bind").stdout.splitlines()[-1] == str(["0" * 8, "0" * 32])
    assert run(code).stdout.splitlines()[-1] == str(["0000000000000000FFFF00000100007F", "0100007F"])


def test_the_bootstrap_server_still_answers_anybody():
    connection = source("srt/disaggregation/common/conn.py")
    server = connection[connection.index("class CommonKVBootstrapServer(") :]
    assert "Authorization" not in connection and "middlewares" not in server
    assert "def _setup_routes(self)" in server and "import requests" in connection and "from aiohttp import web" in connection


def test_a_python_that_never_imports_sglang_pays_nothing():
    code = "import sys; print(sorted({'torch', 'sglang', 'triton', 'torchvision'} & set(sys.modules)))"
    assert run(code).stdout.strip() == "[]"


def test_the_childs_environment_hides_accelerators_and_stays_on_loopback():
    env = host_environment(
        cores=[3, 5], base={"CUDA_VISIBLE_DEVICES": "0", "NCCL_DEBUG": "INFO", "PYTHONPATH": "/mine", "HOME": "/h"}
    )
    assert "CUDA_VISIBLE_DEVICES" not in env and "NCCL_DEBUG" not in env
    assert env["SGLANG_CPU_OMP_THREADS_BIND"] == "3|5" and env["OMP_NUM_THREADS"] == "1"
    assert env["SGLANG_HOST_IP"] == "127.0.0.1" and env["GLOO_SOCKET_IFNAME"] == "lo"
    assert env["PYTHONPATH"].split(os.pathsep)[-1] == "/mine" and env["HOME"] == "/h"
    there = host_environment(cores=[0], host="10.0.0.2", peers=["10.0.0.1", "10.0.0.2"], base={})
    assert there["SGLANG_HOST_IP"] == there["MC_TCP_BIND_ADDRESS"] == "10.0.0.2"
    assert there["SLIME_ENGINE_PEERS"] == "10.0.0.1,10.0.0.2" and env["SLIME_ENGINE_PEERS"] == ""
    with pytest.raises(ValueError, match="one core per tensor-parallel rank"):
        host_environment(cores=[])
