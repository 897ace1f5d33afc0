"""Device slots of the cluster, in one placement group, ordered by node and device."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from slime.compat.peers import peers_of
from slime.ray.machines import alive_nodes, verdict

logger = logging.getLogger(__name__)

# Shares of one device slot. They leave room for a critic beside actor and engine, and let all three be on the same device.
TRAINER_SHARE = 0.4
ENGINE_SHARE = 0.2
RECEIVER_SHARE = 0.1

ALL_DEVICES = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Environment of an actor that picks its device by the slot's index: Ray must not hide the node's others."""


@dataclass(frozen=True)
class Slot:
    """One device of the cluster. On a machine without GPUs Ray is told a number of logical ones, so nothing above differs."""

    bundle: int
    node_ip: str
    device_index: int
    """Counted within what CUDA_VISIBLE_DEVICES shows on the node, as torch and SGLang count."""


@dataclass(frozen=True)
class Placement:
    group: PlacementGroup | None
    trainer_slots: tuple[Slot, ...]
    engine_slots: tuple[Slot, ...]

    def strategy(self, slot: Slot) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(
            placement_group=self.group, placement_group_bundle_index=slot.bundle, placement_group_capture_child_tasks=True
        )

    @property
    def addresses(self) -> set[str]:
        return {slot.node_ip for slot in (*self.trainer_slots, *self.engine_slots)}

    def remove(self) -> None:
        if self.group is not None:
            remove_placement_group(self.group)


def slot_counts(*, num_trainer: int, num_engine: int, colocate: bool) -> tuple[int, int]:
    """(slots in all, first engine slot). Colocated engines start at slot 0, others behind the trainer."""
    return (max(num_trainer, num_engine), 0) if colocate else (num_trainer + num_engine, num_trainer)


def place(*, num_trainer: int, num_engine: int, colocate: bool, wait_seconds: float = 600.0) -> Placement:
    """Reserve the slots, waiting for nodes that are still joining. RuntimeError says what is there and what is missing."""
    total, engine_start = slot_counts(num_trainer=num_trainer, num_engine=num_engine, colocate=colocate)
    if total == 0:
        return Placement(None, (), ())
    group = placement_group([{"GPU": 1, "CPU": 1}] * total, strategy="PACK")
    _wait_until_ready(group, total, wait_seconds)
    slots = _ordered_slots(group, total)
    return Placement(group, tuple(slots[:num_trainer]), tuple(slots[engine_start : engine_start + num_engine]))


def this_node() -> NodeAffinitySchedulingStrategy:
    """Of whoever calls it."""
    return NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)


def listens(placement: Placement, node_ip: str) -> tuple[str, tuple[str, ...]]:
    """(address at which a server on that node listens, addresses that may connect); asked by the rollout actor.

    Loopback, with nobody to list, where engines, trainer ranks and that actor, which is on the driver's node, are on one.
    """
    here = ray.util.get_node_ip_address()
    if placement.addresses == {here}:
        return "127.0.0.1", ()
    # A spare node, to which a trainer's ranks may move, can be in the cluster already.
    return node_ip, tuple(peers_of(sorted({*placement.addresses, here, *alive_nodes()})))


def with_spares(placement: Placement, lost: Sequence[str], wait_seconds: float = 600.0) -> Placement:
    """The same slots after nodes were lost: those of trainer ranks there are on nodes that had some free, or that join.

    Raises RuntimeError where engines were there too, or no spare comes.
    """
    if not lost:
        return placement
    nodes = ", ".join(lost)
    if any(slot.node_ip in lost for slot in placement.engine_slots):
        raise RuntimeError(
            f"node {nodes} is gone, with engines on it, which Ray cannot start elsewhere: bring the node back or replace it "
            "and run the same command again; it resumes from the last checkpoint"
        )
    deadline = time.monotonic() + wait_seconds
    while still := set(lost) & alive_nodes().keys():  # Ray moves nothing before it has given the node up
        if time.monotonic() > deadline:
            raise RuntimeError(f"node {', '.join(sorted(still))} is out of reach, but Ray still counts on it; end Ray there")
        time.sleep(1)
    logger.warning("node %s is gone; waiting for a spare one with as many free devices, %.0f s at most", nodes, wait_seconds)
    there = [slot.bundle for slot in placement.trainer_slots if slot.node_ip in lost]
    try:
        moved = {slot.bundle: slot for slot in _slots(placement.group, there, wait_seconds)}
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f"no spare node with {len(there)} free devices has come in the place of {nodes} ({type(error).__name__}): bring it "
            "back or replace it and run the same command again; it resumes from the last checkpoint"
        ) from None
    return replace(placement, trainer_slots=tuple(moved.get(slot.bundle, slot) for slot in placement.trainer_slots))


def _wait_until_ready(group: PlacementGroup, total: int, wait_seconds: float) -> None:
    started, said = time.monotonic(), 0.0
    ready, joined = group.ready(), set(alive_nodes())
    while not ray.wait([ready], timeout=2.0)[0]:
        waited = time.monotonic() - started
        if gone := joined - (alive := set(alive_nodes())):
            remove_placement_group(group)
            raise RuntimeError(verdict(sorted(gone), joined, "waiting for devices"))
        joined = alive
        have = ray.cluster_resources()
        slots, cpus = have.get("GPU", 0), have.get("CPU", 0)
        missing = f"{slots:.0f} device slots and {cpus:.0f} CPUs are in the Ray cluster, {total} of each are needed"
        if waited > wait_seconds:
            remove_placement_group(group)
            raise RuntimeError(
                f"after {waited:.0f} s {missing}. Join the missing nodes (`ray start --address=...` on each), stop what "
                "else uses the cluster, or lower --actor-num-nodes / --actor-num-gpus-per-node / --rollout-num-gpus."
            )
        if waited - said >= 30:
            said = waited
            logger.info("waiting for devices: %s (%.0f s)", missing, waited)


def visible_index(device: int | str, visible: str | None) -> int:
    """Position of a device among those that CUDA_VISIBLE_DEVICES lists; all are visible without that variable.

    device: as Ray names it, a number or the variable's own text ("GPU-5f0c...", "MIG-..."). ValueError where it is not listed.
    """
    names = [name.strip() for name in (visible or "").split(",") if name.strip()]
    if not names:
        return int(device)
    if str(device) not in names:
        raise ValueError(
            f"Ray hands out device {device}, which CUDA_VISIBLE_DEVICES={visible} does not list: start Ray with the variable "
            "that its processes have"
        )
    return names.index(str(device))


@ray.remote(num_cpus=0)
class _Probe:
    def where(self) -> tuple[str, int]:
        device = ray.get_gpu_ids()[0]
        return ray.util.get_node_ip_address(), visible_index(device, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _ordered_slots(group: PlacementGroup, total: int) -> list[Slot]:
    """Slots sorted by node address and device number, as numbers: Ray hands bundles out in any order, and as text "10" comes
    before "2"."""
    return sorted(_slots(group, range(total)), key=lambda slot: (_address_key(slot.node_ip), slot.device_index))


def _slots(group: PlacementGroup, bundles: Iterable[int], wait_seconds: float | None = None) -> list[Slot]:
    """Where Ray has put these bundles. GetTimeoutError where it has not within that time."""
    bundles = list(bundles)
    probes = [
        _Probe.options(
            num_gpus=0.01,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle),
            runtime_env={"env_vars": ALL_DEVICES},
        ).remote()
        for bundle in bundles
    ]
    try:
        found = ray.get([probe.where.remote() for probe in probes], timeout=wait_seconds)
    finally:
        for probe in probes:
            ray.kill(probe)
    return [Slot(bundle, ip, device) for bundle, (ip, device) in zip(bundles, found, strict=True)]


def _address_key(address: str) -> tuple[int, int]:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        parsed = ipaddress.ip_address(socket.gethostbyname(address))
    return parsed.version, int(parsed)


def rank_environment(*, one_node: bool) -> dict[str, str]:
    """Of an actor that is a rank of a torch group."""
    # Ranks of one node need nothing but loopback; gloo would listen at the address that the host's name stands for.
    loopback = {} if not one_node or os.environ.get("GLOO_SOCKET_IFNAME") else {"GLOO_SOCKET_IFNAME": "lo"}
    return {
        **ALL_DEVICES,
        **loopback,
        "NCCL_CUMEM_ENABLE": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # megatron-core warns on every import about each optional package that is not there.
        "PYTHONWARNINGS": "ignore",
    }
