"""One engine as the weight protocol sees it, without a fleet."""

from __future__ import annotations

from collections.abc import Sequence

from slime.engine.client import EngineClient, sync


class OneEngine:
    """Implements slime.weights.protocol.Engines."""

    def __init__(self, name: str, url: str, token: str):
        self._name, self._client = name, EngineClient(url, token)

    def pause(self) -> None:
        sync(self._client.pause_generation())

    def flush(self) -> None:
        sync(self._client.flush_cache())

    def begin(self, version: int) -> None:
        sync(self._client.begin_weight_update(version))

    def load(self, version: int, folder: str) -> None:
        sync(self._client.update_weights_from_disk(folder))

    def end(self, version: int) -> None:
        sync(self._client.end_weight_update(version))

    def versions(self) -> dict[str, str]:
        return {self._name: sync(self._client.weight_version())}

    def checksums(self, labels: Sequence[str]) -> dict[str, list[dict[str, str]]]:
        return {label: sync(self._client.weights_checksums()) for label in labels}

    def proceed(self) -> None:
        sync(self._client.continue_generation())
