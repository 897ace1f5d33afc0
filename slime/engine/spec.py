"""What an engine is, before anything runs: the value that `plan_engines` makes and `EngineProcess` starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ROLES = ("regular", "prefill", "decode")


@dataclass(frozen=True)
class EngineSpec:
    """One serving instance. Its processes are one per node; `node_rank` 0 answers HTTP."""

    model: str
    """name of the served model in the YAML ("default" without one)"""
    role: str
    """regular, prefill or decode"""
    engine_id: int
    """counts over all groups and models"""
    gpu_offset: int
    """first slot of the rollout placement that this engine uses"""
    num_gpus: int
    """slots of the whole engine, over all its nodes"""
    num_nodes: int
    tp_size: int
    pp_size: int
    dp_size: int
    ep_size: int
    model_path: str
    update_weights: bool
    """receives the trainer's weights"""
    needs_offload: bool
    """shares devices with the trainer, so it releases its memory while the trainer works"""
    random_seed: int
    settings: Mapping[str, object] = field(default_factory=dict)
    """SGLang options as the user wrote them (flags, then the group's overrides), any supported version's names"""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"engine {self.engine_id} has worker_type {self.role!r}; it is one of {', '.join(ROLES)}")

    @property
    def gpus_per_node(self) -> int:
        return self.num_gpus // self.num_nodes

    @property
    def label(self) -> str:
        return f"{self.model}-{self.role}-{self.engine_id}"


@dataclass(frozen=True)
class NodePlacement:
    """Where one node's process of an engine runs."""

    node_rank: int
    host: str
    """address that this process binds and is reached at; loopback when the engine has one node"""
    base_gpu_id: int
    """first device, counted within CUDA_VISIBLE_DEVICES"""
    dist_init_addr: str | None = None
    """host:port of node 0's block, for engines over several nodes"""
    peers: tuple[str, ...] = ()
    """addresses of the nodes whose engines exchange KV cache with this one; empty where all are on this node"""
