"""Who gets which GPUs, and how the rollout engines are laid out and reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from slime.config.engine_groups import SglangModel
from slime.config.flags import derived, flag


@dataclass(frozen=True)
class ClusterConfig:
    """GPUs (or, on a machine without any, ranks) for training and rollout."""

    actor_num_nodes: int = flag(1, low=0)
    """Training nodes."""
    actor_num_gpus_per_node: int = flag(8, low=0)
    """Training GPUs (ranks) per node."""
    rollout_num_gpus: int | None = flag(None, low=0)
    """GPUs of all rollout engines together. Colocated runs derive it from the training GPUs."""
    rollout_num_gpus_per_engine: int = flag(1, low=1)
    """GPUs of one engine (its tensor- times pipeline-parallel size)."""
    num_gpus_per_node: int = flag(8, low=1)
    """GPUs per node as seen by the rollout layout; lower it when a node has fewer than 8."""
    colocate: bool = False
    """Training and rollout take turns on the same GPUs; turns both offload switches on."""
    offload: bool = False
    """Short for --offload-train --offload-rollout."""
    offload_train: bool | None = None
    """With --colocate, the trainer gives its memory back while engines generate."""
    offload_rollout: bool | None = None
    """With --colocate, the engines give their memory back while the trainer trains."""
    distributed_backend: Literal["nccl", "gloo"] = "nccl"
    """Collectives of the training ranks; a machine without CUDA always uses gloo."""
    train_backend: Literal["megatron"] = "megatron"
    """There is one: megatron-core."""
    kernel_cache: str | None = None
    """Folder of compiled CUDA kernels, which nodes may share; without it each home folder has its own."""
    train_env_vars: Mapping[str, object] = flag({})
    """JSON object: extra environment of the training actors."""
    release_train: bool = flag(False, later="killing and re-creating the trainer around every rollout")
    """Kill the training actors during rollout and re-create them from a checkpoint."""


@dataclass(frozen=True)
class EngineConfig:
    """Rollout engines, their router, and how weights reach them."""

    sglang_config: str | None = None
    """YAML file with models and server groups (prefill, decode, regular, ...)."""
    prefill_num_servers: int | None = flag(None, low=1)
    """Short form without YAML: this many prefill engines, the rest decode."""
    sglang_router_ip: str | None = None
    """Address of a router that already runs: the engines become its workers, and it runs on when the run ends."""
    sglang_router_port: int | None = flag(None, low=1, high=65535)
    """Port of the router: of the one that already runs, or that the run's own is to have; None takes a free one."""
    sglang_router_request_timeout_secs: int = flag(14400, low=1)
    """The router gives a request up after this many seconds."""
    sglang_server_concurrency: int = flag(512, low=1)
    """Requests in flight per engine."""
    rollout_external_engine_addrs: tuple[str, ...] | None = None
    """host:port of engines that already run: the run starts a router for them alone, and never starts or stops one."""
    update_weight_buffer_size: int = flag(512 * 1024 * 1024, low=1)
    """Bytes of one weight bucket on its way to the engines."""
    update_weights_interval: int = flag(1, low=1)
    """Send the weights to the engines after every so many rollouts, where the schedule runs ahead."""
    update_weight_mode: Literal["full", "delta"] = "full"
    """Write all weights, or the bytes that changed since the last version; delta needs the transport disk."""
    update_weight_transport: Literal["nccl", "receivers", "disk"] = "nccl"
    """Carrier of the weights: a broadcast of all to engines on GPUs of their own, or each rank's share to a process beside it
    (engines on the trainer's GPUs share memory in both), or files."""
    update_weight_disk_dir: str | None = None
    """Folder of published weight versions, which trainer and engines see; older ones in it are removed."""
    update_weight_disk_keep_files: bool = False
    """Keep whole versions when the next one is there; differences are always kept."""
    update_weight_delta_encoding: Literal["xor", "overwrite"] = "xor"
    """How differences are written."""
    update_weight_delta_checksum: Literal["xxh3-128", "blake3", "adler32"] = "xxh3-128"
    """Digest of every tensor of a published version."""
    update_weight_local_checkpoint_dir: str | None = None
    """Folder on each engine's node: a copy of the serving checkpoint that differences are applied to."""
    custom_update_weight_post_write_path: str | None = None
    """Called with (args, version_dir, rollout_engines) on every trainer rank between writing and loading a version."""
    check_weight_update_equal: bool = False
    """Compare every engine's weights with those sent, after each sync; where they differ the run stops, engines paused."""
    rehearsed: str | None = None
    """Report of a rehearsal (--rehearse --json FILE); the run stops when its first weight stream is not the rehearsed one."""
    use_fault_tolerance: bool = False
    """Watch the engines while they generate, start those that die again, and repeat what they broke."""
    rollout_health_check_interval: float = flag(30.0, above=0)
    """Seconds between health checks of an engine."""
    rollout_health_check_timeout: float = flag(30.0, above=0)
    """Seconds that an engine has for an answer; after three misses in a row it is ended and started again."""
    rollout_health_check_first_wait: float = flag(0.0, low=0)
    """Seconds without health checks at the start of every rollout and evaluation."""
    groups: tuple[SglangModel, ...] = derived(())
    """Models and their engine groups, from --sglang-config, --prefill-num-servers or the plain flags."""
    sglang: Mapping[str, str | bool] = derived({})
    """Text of every other --sglang-* flag, without the prefix, dashes as underscores; slime.engine gives it types."""
    router: Mapping[str, str | bool] = derived({})
    """Text of every --router-* flag, likewise."""
