"""Memory that outlives a trainer rank: one process on each node keeps the newest snapshots of the ranks there, and a peer's.

Files without a name (memfd), which a rank of the same user opens through /proc: nothing of them is left when the keeper ends,
and the size of /dev/shm does not matter. Each rank has two, so that one is whole while the other is written. The driver says
when all ranks have written (`commit`); the copy on another node is then made beside whatever the run does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slime.ray.calls import ProcessLost, gather
from slime.ray.machines import alive_nodes
from slime.ray.standstill import Patience
from slime.training.copies import copy_places

logger = logging.getLogger(__name__)

CHUNK = 64 * 2**20
"""Bytes that travel at once between two nodes."""
_UNDER_WAY = 2
_ANSWER_SECONDS = 30.0


@dataclass
class _Piece:
    """One snapshot of one rank. `version` counts rollouts; None while it is written."""

    file: int
    version: int | None = None
    nbytes: int = 0


@ray.remote(num_cpus=0, max_concurrency=4)
class SnapshotKeeper:
    """Of one node. Versions of a rank that are not whole do not exist for anybody who asks."""

    def __init__(self, versions: int) -> None:
        self._versions = versions
        self._pieces: dict[int, list[_Piece]] = {}
        self._written: dict[int, _Piece] = {}

    def pid(self) -> int:
        return os.getpid()

    def open(self, sizes: Mapping[int, int]) -> dict[int, str]:
        """rank -> path of memory of its size, in the place of its oldest snapshot."""
        return {rank: self._path(self._begin(rank, nbytes)) for rank, nbytes in sizes.items()}

    def _begin(self, rank: int, nbytes: int) -> _Piece:
        pieces = self._pieces.setdefault(rank, [])
        if len(pieces) < self._versions:
            pieces.append(_Piece(os.memfd_create(f"slime-snapshot-{rank}")))
            piece = pieces[-1]
        else:
            piece = min(pieces, key=lambda one: -1 if one.version is None else one.version)
        piece.version, piece.nbytes = None, nbytes
        os.ftruncate(piece.file, nbytes)
        self._written[rank] = piece
        return piece

    def commit(self, version: int) -> None:
        """All that was opened is whole, as of `version`."""
        for piece in self._written.values():
            piece.version = version
        self._written = {}

    def held(self) -> dict[int, dict[int, int]]:
        """rank -> version -> bytes."""
        return {
            rank: {piece.version: piece.nbytes for piece in pieces if piece.version is not None}
            for rank, pieces in self._pieces.items()
        }

    def path(self, rank: int, version: int) -> str:
        return self._path(self._piece(rank, version))

    def read(self, rank: int, version: int, begin: int) -> np.ndarray:
        """Up to CHUNK bytes from `begin` on."""
        piece = self._piece(rank, version)
        return np.frombuffer(os.pread(piece.file, min(CHUNK, piece.nbytes - begin), begin), np.uint8)

    def fetch(self, source, version: int, sizes: Mapping[int, int]) -> None:
        """Copies of `version` of these ranks from another node's keeper."""
        for rank, nbytes in sizes.items():
            piece = self._begin(rank, nbytes)
            del self._written[rank]
            asked: list[tuple[int, ray.ObjectRef]] = []
            for begin in range(0, nbytes, CHUNK):
                asked.append((begin, source.read.remote(rank, version, begin)))
                if len(asked) == _UNDER_WAY:
                    _write(piece.file, *asked.pop(0))
            for one in asked:
                _write(piece.file, *one)
            piece.version = version

    def _piece(self, rank: int, version: int) -> _Piece:
        return next(piece for piece in self._pieces[rank] if piece.version == version)

    @staticmethod
    def _path(piece: _Piece) -> str:
        return f"/proc/{os.getpid()}/fd/{piece.file}"


def _write(file: int, begin: int, chunk: ray.ObjectRef) -> None:
    data = memoryview(ray.get(chunk))
    while len(data):
        done = os.pwrite(file, data, begin)
        data, begin = data[done:], begin + done


class SnapshotStore:
    """The driver's view of all keepers."""

    def __init__(self, nodes: Sequence[str], patience: Patience, *, peers: bool, versions: int = 2) -> None:
        """nodes: of each rank, by address. peers: another node keeps a copy, where there is one. versions: that each place has
        room for; with one, the copy is what is whole while its original is written."""
        self.nodes = list(nodes)
        """May change after a node was lost."""
        self._patience, self._peers, self._versions = patience, peers, versions
        self._keepers: dict[str, ray.actor.ActorHandle] = {}
        self._copies: dict[str, ray.ObjectRef] = {}

    def take(self, version: int, sizes: Sequence[int], write: Callable[[list[str]], list[str]]) -> bool:
        """One snapshot of every rank; whether it is in force. Else those before it stay, and the next may do better.

        sizes: bytes by rank. write(paths): have the ranks write, and say why some could not; what it raises passes through.
        """
        self._finish_copies()  # the piece that is written next may be one that is still read
        self._replace_lost()
        mine = self._by_node(sizes)
        try:
            opened = self._all("open", mine, doing="making room for snapshots")
        except ProcessLost as error:
            logger.warning("no snapshot was taken: %s", error)
            return False
        paths = {rank: path for found in opened.values() for rank, path in found.items()}
        if failed := write([paths[rank] for rank in range(len(sizes))]):
            logger.warning("no snapshot was taken: %s", failed[0])
            return False
        try:
            self._all("commit", dict.fromkeys(mine, version), doing="putting snapshots in force")
        except ProcessLost as error:
            logger.warning("a part of this snapshot is lost: %s", error)
            return False
        nodes = list(mine)
        if self._peers and len(nodes) > 1:
            places = copy_places([sum(of_node.values()) for of_node in mine.values()])
            for node, peer in zip(nodes, (nodes[place] for place in places), strict=True):
                name = f"the copy of {node}'s snapshots on {peer}"
                self._copies[name] = self._keeper(peer).fetch.remote(self._keeper(node), version, mine[node])
        return True

    def newest(self) -> int | None:
        """The newest version of which every rank's snapshot is on some node; None where there is none."""
        held = self._held()
        versions = [set().union(*(ranks.get(rank, ()) for ranks in held.values())) for rank in range(len(self.nodes))]
        return max(set.intersection(*versions), default=None)

    def bring_home(self, version: int) -> list[str]:
        """Paths by rank, each on the rank's own node; from the other one where its own has lost it."""
        self._finish_copies()
        self._replace_lost()
        held, fetched = self._held(), {}
        for rank, node in enumerate(self.nodes):
            if version in held[node].get(rank, ()):
                continue
            source = next(other for other, ranks in held.items() if version in ranks.get(rank, ()))
            sizes = {rank: held[source][rank][version]}
            fetched[f"rank {rank}'s snapshot, from {source}"] = self._keeper(node).fetch.remote(
                self._keeper(source), version, sizes
            )
        gather(fetched, doing="bringing snapshots home", patience=self._patience)
        asked = {f"rank {rank}": self._keeper(node).path.remote(rank, version) for rank, node in enumerate(self.nodes)}
        return list(gather(asked, doing="finding its snapshot", patience=self._patience).values())

    def stop(self) -> None:
        for keeper in self._keepers.values():
            ray.kill(keeper)
        self._keepers, self._copies = {}, {}

    def _by_node(self, sizes: Sequence[int]) -> dict[str, dict[int, int]]:
        found: dict[str, dict[int, int]] = {}
        for rank, (node, nbytes) in enumerate(zip(self.nodes, sizes, strict=True)):
            found.setdefault(node, {})[rank] = nbytes
        return found

    def _keeper(self, node_ip: str) -> ray.actor.ActorHandle:
        if node_ip not in self._keepers:
            alive = alive_nodes()
            if node_ip not in alive:
                raise ProcessLost(f"node {node_ip} is gone, and with it the snapshots there")
            here = NodeAffinitySchedulingStrategy(node_id=alive[node_ip]["NodeID"], soft=False)
            self._keepers[node_ip] = SnapshotKeeper.options(scheduling_strategy=here).remote(self._versions)
        return self._keepers[node_ip]

    def _all(self, method: str, given: Mapping[str, object], *, doing: str) -> dict[str, Any]:
        """node -> the answer of its keeper. given: its one argument."""
        asked = {node: getattr(self._keeper(node), method).remote(what) for node, what in given.items()}
        named = {f"snapshot keeper on {node}": ref for node, ref in asked.items()}
        answers = gather(named, doing=doing, patience=self._patience)
        return dict(zip(asked, answers.values(), strict=True))

    def _held(self) -> dict[str, dict[int, dict[int, int]]]:
        """node -> rank -> version -> bytes, of keepers that answer."""
        asked = {keeper.held.remote(): node for node, keeper in self._keepers.items()}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS) if asked else ([], [])
        found: dict[str, dict[int, dict[int, int]]] = {node: {} for node in self.nodes}
        for answer in done:
            try:
                found[asked[answer]] = ray.get(answer)
            except ray.exceptions.RayError as error:
                logger.warning("the snapshots on %s are lost (%s)", asked[answer], type(error).__name__)
        return found

    def _replace_lost(self) -> None:
        """Keepers that are gone are forgotten: new ones are made when they are asked."""
        asked = {keeper.pid.remote(): node for node, keeper in self._keepers.items()}
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS) if asked else ([], [])
        for answer in [*late, *done]:
            try:
                ray.get(answer, timeout=0)
            except ray.exceptions.RayError as error:
                node = asked[answer]
                logger.warning("the keeper of snapshots on %s is gone (%s)", node, type(error).__name__)
                ray.kill(self._keepers.pop(node))

    def _finish_copies(self) -> None:
        copies, self._copies = self._copies, {}
        for name, ref in copies.items():
            try:
                gather({name: ref}, doing="being made", patience=self._patience)
            except RuntimeError as error:
                logger.warning("%s; the next snapshot is copied again", error)
