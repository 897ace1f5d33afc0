"""--keep-old-actor: the weights that wrote what is trained, where the engines generate ahead of the trainer.

One step ahead a rollout was written by the weights that engines have, or by those that they had before. Both are kept on the
host.
"""

from __future__ import annotations

from collections.abc import Sequence

from slime.training.snapshots import Snapshots


class OldActor:
    """Copies of the weights that were sent last and before, by the versions that engines know them by."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self._tags: dict[int, str] = {}
        """Weight version -> snapshot. Weights that were sent twice, once for an engine that was started anew, have two."""
        self._newest, self._step = "sent last but one", -1

    def remember(self, version: int, step: int) -> None:
        """The weights as they are now are sent as `version`. step: how many the trainer has made."""
        if step != self._step:
            self._newest = "sent last" if self._newest == "sent last but one" else "sent last but one"
            self._tags = {known: tag for known, tag in self._tags.items() if tag != self._newest}
            self._snapshots.take(self._newest)
            self._step = step
        self._tags[version] = self._newest

    def writers(self, column: Sequence[Sequence[str]]) -> dict[str, list[int]]:
        """Snapshot tag -> rows of the rollout that those weights wrote, the same on every rank.

        column: RolloutBatch.weight_versions. Raises ValueError for a row of no or several versions, or of one that is not kept.
        """
        found: dict[str, list[int]] = {}
        if not column:
            raise ValueError("--keep-old-actor: this rollout does not say which weights wrote it")
        for row, said in enumerate(column):
            tags = {self._tags.get(int(version)) if version.isdigit() else None for version in said}
            if len(tags) != 1 or None in tags:
                raise ValueError(
                    f"--keep-old-actor: row {row} was written by weights {', '.join(said) or 'that nobody recorded'}, and the "
                    f"trainer has {', '.join(map(str, sorted(self._tags)))}; take the engines' own log-probs "
                    "(--use-rollout-logprobs)"
                )
            found.setdefault(tags.pop(), []).append(row)
        return dict(sorted(found.items()))
