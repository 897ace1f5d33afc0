"""The trainer's side of --update-weight-transport disk: every rank writes its part of a version, rank 0 puts it in force."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from slime.config.cluster import EngineConfig
from slime.model.export import export_weights
from slime.model.hf_config import HfConfig
from slime.model.names import NameTable
from slime.parallel import Ranks
from slime.ray.destinations import EngineTarget
from slime.weights.protocol import StreamReport
from slime.weights.published import Header, PartWriter, Written, publish_version, version_folder
from slime.weights.quantize import WireFormat

logger = logging.getLogger(__name__)

PostWrite = Callable[[str, tuple[EngineTarget, ...]], object]
"""Of a version's folder and the engines that will load it."""


class WeightFiles:
    """Built once per run on every rank; `publish` is a collective of all of them."""

    def __init__(
        self, model: Sequence[torch.nn.Module], hf_config: HfConfig, ranks: Ranks, engine: EngineConfig, *, origin: str,
        with_mtp: bool, post_write: PostWrite | None = None,
    ):  # fmt: skip
        """origin: the serving checkpoint, which is also the base of the first difference. post_write: called on every rank
        when a version is in force."""
        self._model, self._ranks, self._engine, self._origin = list(model), ranks, engine, origin
        self._table, self._with_mtp = NameTable.for_model(hf_config, with_mtp=with_mtp), with_mtp
        self._wire = WireFormat.of_checkpoint(hf_config)
        self._root = Path(engine.update_weight_disk_dir)
        self._is_delta = engine.update_weight_mode == "delta"
        run = [secrets.token_hex(8)]
        dist.broadcast_object_list(run, src=0)
        self._run = run[0]
        self._writer = PartWriter(
            self._root,
            origin=origin,
            part=ranks.rank,
            encoding=engine.update_weight_delta_encoding if self._is_delta else None,
            checksum=engine.update_weight_delta_checksum,
        )
        self._report = StreamReport(0, 0, 0)
        self._version = self._told = 0
        """In force, and told to `post_write`."""
        self._post_write = post_write
        if ranks.rank == 0:
            # Another run's versions rest on each other, and none of them on this run's.
            for old in self._root.glob("weight_v*") if self._root.is_dir() else ():
                shutil.rmtree(old)

    def publish(self, version: int, engines: Sequence[EngineTarget] = ()) -> StreamReport:
        """All weights as version `version`, unless it is there: what is sent again has not changed. RuntimeError on all ranks
        where one of them cannot. engines: that will load it, for `post_write`."""
        if version != self._version:
            self._write(version)
        if self._post_write is not None and version != self._told:
            self._attempt(lambda: self._tell(engines), doing="--custom-update-weight-post-write-path failed")
        self._told = version
        return self._report

    def _write(self, version: int) -> None:
        partial = self._root / f".weight_v{version:06d}.part"
        if self._ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        mine = self._attempt(lambda: self._writer.write(partial, self._named(), max_bytes=2 * 2**30))
        parts: list[Written] = [Written()] * self._ranks.world_size
        dist.all_gather_object(parts, mine)
        if self._ranks.rank == 0:
            self._attempt(lambda: self._put_in_force(version, partial, parts))
        else:
            self._attempt(lambda: None)
        self._version = version
        written, tensors = sum(part.nbytes for part in parts), sum(part.tensors for part in parts)
        files = sum(len(part.files) for part in parts)
        self._report = StreamReport(files, written, tensors, published=str(version_folder(self._root, version)))

    def _tell(self, engines: Sequence[EngineTarget]) -> None:
        try:
            self._post_write(self._report.published, tuple(engines))
        except Exception as error:  # whatever a user's function does: the other ranks must hear of it
            logger.exception("--custom-update-weight-post-write-path on weights v%d", self._version)
            raise ValueError(f"{type(error).__name__}: {error}") from None

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for group in export_weights(self._model, self._table, self._ranks):
            yield from self._wire.encode_group(group)

    def _put_in_force(self, version: int, partial: Path, parts: list[Written]) -> None:
        base = version - 1 if self._is_delta else None
        engine = self._engine
        header = Header(
            self._run, version, base, engine.update_weight_delta_encoding, engine.update_weight_delta_checksum, {}, {}
        )
        publish_version(self._root, parts, partial, header, origin=self._origin, mtp_kept=self._with_mtp)
        if not (self._is_delta or engine.update_weight_disk_keep_files):
            for old in self._root.glob("weight_v*"):
                if old != version_folder(self._root, version):
                    shutil.rmtree(old)

    def _attempt(self, write, *, doing: str = ""):
        """What `write` gives. A rank that fails would leave the others in the next collective: all hear of it."""
        result, error = None, None
        try:
            result = write()
        except (OSError, ValueError) as failure:
            error = f"rank {self._ranks.rank}: {failure}"
        errors: list[str | None] = [None] * self._ranks.world_size
        dist.all_gather_object(errors, error)
        if failures := [one for one in errors if one]:
            raise RuntimeError(f"{doing or f'weights could not be written to {self._root}'}: {failures[0]}")
        return result
