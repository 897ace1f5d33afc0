"""The job's environment variables: those that the engines' and trainer's libraries must have, or must not."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

from slime.config.errors import one_edit_apart
from slime.config.rules.dispatch import uses_deepep
from slime.config.rules.engines import engines_of

if TYPE_CHECKING:
    from slime.config.rules.book import Values

NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"
INTERFACES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", NCCL_INTERFACE)
ALLOCATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
STAND_IN = "/MASTER_ADDR"
"""What a launcher writes in a rehearsal where MASTER_ADDR is not set."""
LOOPBACK = ("127.0.0.1", "localhost", "::1", "0.0.0.0")


def num_nodes(v: Values) -> int:
    trainer = v["actor_num_nodes"] * v["actor_num_gpus_per_node"]
    engines = v["rollout_num_gpus"] or 0
    gpus = max(trainer, engines) if v["colocate"] else trainer + engines
    return max(1, -(-gpus // max(v["num_gpus_per_node"], 1)))


def of_the_trainer(v: Values) -> dict[str, str] | None:
    """What the training actors see: the job's environment with --train-env-vars on top; None where nobody knows."""
    if v.env is None:
        return None
    return {**v.env, **{str(name): str(value) for name, value in v["train_env_vars"].items()}}


A_RANKS_OWN = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
"""Variables that say which of the training processes one is."""


def trainers_own(v: Values) -> None:
    """--train-env-vars holds words and numbers, of what the trainer's libraries read."""
    for name, value in v["train_env_vars"].items():
        v.require(
            isinstance(value, str | int | float) and not isinstance(value, bool),
            f"--train-env-vars {name} is {value!r}; an environment variable is a text or a number, so write it as one",
        )
        v.require(name and "=" not in name, f"--train-env-vars {name!r} is no name of a variable; it has a letter and no =")
        v.require(
            name not in A_RANKS_OWN,
            f"--train-env-vars {name}: the run sets it, for ranks differ in it or must agree on it; remove it",
        )
        v.require(
            not name.startswith("SGLANG_"),
            f"--train-env-vars {name}: engines read it, and these variables reach the trainer alone; set it in the launcher's "
            "environment",
        )


def addresses(v: Values) -> None:
    """Several nodes meet on one interface and at an address that they all reach."""
    env = of_the_trainer(v)
    if env is None or num_nodes(v) == 1:
        return
    alone = [name for name in INTERFACES if env.get(name, "").lstrip("=") == "lo"]
    v.require(
        not alone,
        f"{' and '.join(alone)} name the loopback, on which {num_nodes(v)} nodes do not meet; name the cluster network's "
        "interface",
    )
    given = {name: env[name] for name in INTERFACES if env.get(name)}
    v.require(
        _one_interface(given),
        f"control traffic would go over different interfaces ({', '.join(f'{n}={i}' for n, i in given.items())}), "
        "whose addresses "
        "do not meet; give all three the same",
    )
    head = env.get("MASTER_ADDR")
    v.require(
        not head or (head not in LOOPBACK and not head.startswith("127.")),
        f"MASTER_ADDR is {head}, which every one of the {num_nodes(v)} nodes takes for itself; give the first node's "
        "address in "
        "the cluster network",
    )
    v.require(
        not head or head == STAND_IN or is_host(head),
        f"MASTER_ADDR is {head}, neither an IP address nor the name of a host; write the first node's address alone, without "
        "scheme and port",
    )


def is_host(text: str) -> bool:
    """An IP address, or a name that could be looked up."""
    try:
        found = ipaddress.ip_address(text)
        return not (found.is_unspecified or found.is_multicast)
    except ValueError:
        return bool(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", text)) and not re.fullmatch(r"[\d.]+", text)


def _one_interface(given: dict[str, str]) -> bool:
    """One name for all. NCCL takes more than a name: beginnings of names, `=` for a whole one, several, `^` for all others."""
    names = {name for variable, name in given.items() if variable != NCCL_INTERFACE}
    said = given.get(NCCL_INTERFACE)
    if said is None or not names:
        return len(names) <= 1
    listed = said.lstrip("^=").split(",")
    whole, others = "=" in said[:2], said.startswith("^")

    def is_meant(name: str) -> bool:
        return others != any(name == one or (not whole and one and name.startswith(one)) for one in listed)

    return len(names) == 1 and all(is_meant(name) for name in names)


def nvshmem(v: Values) -> None:
    """DeepEP brings NVSHMEM, which must not load an NCCL of its own beside torch's."""
    if v.env is None or not any(uses_deepep(engine) for engine in engines_of(v)):
        return
    found = v.env.get("NVSHMEM_DISABLE_NCCL")
    v.require(
        found == "1",
        f"NVSHMEM_DISABLE_NCCL is {found or 'not set'}: DeepEP's NVSHMEM would load a second NCCL; set NVSHMEM_DISABLE_NCCL=1",
    )


def offloading(v: Values) -> None:
    """Memory that is given back and taken again: NCCL must not keep it, the allocator must not stretch it."""
    env = of_the_trainer(v)
    if env is None or not (v["offload_train"] or v["offload_rollout"]):
        return
    # Inside one node NVLink multicast pays for what it holds.
    for name in ("NCCL_CUMEM_ENABLE", *(("NCCL_NVLS_ENABLE",) if num_nodes(v) > 1 else ())):
        found = env.get(name)
        v.require(
            found in (None, "0"),
            f"{name} is {found}: NCCL would hold memory that trainer and engines hand to each other; set {name}=0",
        )
    for name in ALLOCATORS:
        found = env.get(name, "")
        v.require(
            not re.search(r"expandable_segments\s*:\s*true", found, re.IGNORECASE),
            f"{name} is {found!r}: expandable segments and memory that is handed back exclude each other; remove it",
        )


def devices(v: Values) -> None:
    """RDMA devices of the KV transfer: one for each GPU of a node, or fewer that they share evenly."""
    for engine in engines_of(v):
        said = engine.text("disaggregation_ib_device")
        if said is None or said.lstrip().startswith("{"):
            continue
        names = [name.strip() for name in said.split(",")]
        twice = sorted({name for name in names if names.count(name) > 1})
        per_node = min(engine.num_gpus, v["num_gpus_per_node"])
        v.require(
            not twice and all(names),
            f"{engine.where}: disaggregation_ib_device names {', '.join(twice) or 'an empty device'} more than once "
            f"({said}); name "
            "each device once",
        )
        v.require(
            len(names) == 1 or per_node % len(names) == 0,
            f"{engine.where}: {len(names)} RDMA devices for the {per_node} GPUs of a node cannot be shared evenly; name "
            f"{per_node}, or a number that divides it",
        )


KNOWN = frozenset(
    """CUDA_DEVICE_MAX_CONNECTIONS GLOO_SOCKET_IFNAME INDEXER_ROPE_NEOX_STYLE MASTER_ADDR MC_IB_PCI_RELAXED_ORDERING
    MLP_SKIP_SORT_RDMA NCCL_CUMEM_ENABLE NCCL_DEBUG NCCL_IB_HCA NCCL_IB_GID_INDEX NCCL_IB_QPS_PER_CONNECTION NCCL_IB_TC
    NCCL_IB_TIMEOUT NCCL_MIN_CTAS NCCL_NET_GDR_LEVEL NCCL_NVLS_ENABLE NCCL_P2P_LEVEL NCCL_PXN_DISABLE NCCL_SOCKET_IFNAME
    NVSHMEM_DISABLE_NCCL NVSHMEM_QP_DEPTH NVTE_BWD_LAYERNORM_SM_MARGIN NVTE_FWD_LAYERNORM_SM_MARGIN
    PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK SGLANG_JIT_DEEPGEMM_PRECOMPILE
    SGLANG_JIT_DEEPGEMM_FAST_WARMUP TP_SOCKET_IFNAME SLIME_REHEARSAL_KEY TENSORBOARD_DIR""".split()
)
"""Variables that recipes set. Others are taken too: a job may need what nobody here has heard of."""


def spelling(v: Values) -> None:
    """A variable that is one letter off one of the recipe's is a slip: it would be ignored in silence."""
    for name in {**(v.env or {}), **v["train_env_vars"]}:
        meant = None if name in KNOWN else next((known for known in sorted(KNOWN) if one_edit_apart(name, known)), None)
        v.require(
            meant is None, f"the environment variable {name} is read by nobody; did you mean {meant}? Rename it, or remove it"
        )
