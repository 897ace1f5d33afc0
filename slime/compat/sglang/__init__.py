"""What the published SGLang wheel needs to run on a machine without CUDA. No file of SGLang is edited.

`shims/` goes on the PYTHONPATH of an engine process; its `sitecustomize` is imported by every Python that starts there,
so SGLang's spawned schedulers get it too (SGLang's own plugin entry point comes too late: `import sglang` fails first).
Each shim says why it exists, for which versions, and which upstream file it answers; `tests/engine/test_shims.py` fails
when one is no longer needed. On a CUDA machine nothing of this is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SHIMS = Path(__file__).resolve().parent / "shims"
REPOSITORY = Path(__file__).resolve().parents[3]
HOST_MODELS = "slime.engine.host_models"
ACCELERATOR_PREFIXES = ("CUDA_", "NCCL_", "NVSHMEM_", "SGLANG_DEEPEP_")


def with_system_libraries(env: Mapping[str, str]) -> dict[str, str]:
    """`env`, in which the loader also finds the system libraries that lie beside this Python environment.

    mooncake, which SGLang moves KV with, links against libibverbs even where it only speaks TCP; scripts/setup.sh unpacks one
    into `syslib` where the system has none. Whoever starts Python by hand need not know of it.
    """
    folder = str(Path(sys.prefix) / "syslib")
    known = [part for part in env.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part]
    if not Path(folder).is_dir() or folder in known:
        return dict(env)
    return {**env, "LD_LIBRARY_PATH": os.pathsep.join([folder, *known])}


def keep_token(token: str) -> None:
    """Leave the run's token with the shims of this process, where they are loaded; the ranks that it forks have it then."""
    shims = sys.modules.get("sitecustomize")
    if shims is not None and Path(shims.__file__ or "").parent == SHIMS:
        shims.TOKEN = token


def host_environment(
    *,
    cores: Sequence[int],
    host: str = "127.0.0.1",
    peers: Sequence[str] = (),
    interface: str = "lo",
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment of an engine process on the CPU; one entry of `cores` per tensor-parallel rank.

    host: where its KV transfer listens. peers: addresses of the nodes that may connect there; none where it is loopback.
    interface: over which its ranks meet.
    base: the environment to start from (None: this process's). Returns a new dict; os.environ is not touched.
    """
    if not cores:
        raise ValueError("host_environment needs one core per tensor-parallel rank, got none")
    env = dict(os.environ if base is None else base)
    for name in [name for name in env if name.startswith(ACCELERATOR_PREFIXES)]:
        del env[name]
    python_path = [str(SHIMS), str(REPOSITORY), env.get("PYTHONPATH", "")]
    env.update(
        PYTHONPATH=os.pathsep.join(dict.fromkeys(part for part in python_path if part)),
        # Without it SGLang takes the CPU for a device that it was not built for and imports CUDA kernels.
        SGLANG_USE_CPU_ENGINE="1",
        SGLANG_EXTERNAL_MODEL_PACKAGE=HOST_MODELS,
        # More threads than the bound cores make small matrix products several times slower.
        OMP_NUM_THREADS="1",
        SGLANG_CPU_OMP_THREADS_BIND="|".join(str(core) for core in cores),
        GLOO_SOCKET_IFNAME=interface,
        # By default SGLang and mooncake choose an address of the machine. They tell it to their partners, too.
        SGLANG_HOST_IP=host,
        MC_TCP_BIND_ADDRESS=host,
        SLIME_ENGINE_PEERS=",".join(peers),
        HF_HUB_OFFLINE=env.get("HF_HUB_OFFLINE", "1"),
        TOKENIZERS_PARALLELISM="false",
    )
    return env
