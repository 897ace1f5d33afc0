"""The whole configuration of a run: frozen, picklable, one section per room; and the flat view that plugins get."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from slime.config import megatron_flags
from slime.config.cluster import ClusterConfig, EngineConfig
from slime.config.errors import nearest
from slime.config.flags import FrozenMap
from slime.config.front_end import FrontEndConfig
from slime.config.loop import LoopConfig
from slime.config.model import ModelConfig, ParallelConfig
from slime.config.rollout import DataConfig, EvalConfig, RolloutConfig
from slime.config.run import DebugConfig, TrackingConfig
from slime.config.training import AlgorithmConfig, BatchConfig, CheckpointConfig, OptimizerConfig
from slime.config.upkeep import UpkeepConfig


@dataclass(frozen=True)
class Config:
    """What `load()` returns. Field names are slime's and Megatron's attribute names, each in exactly one section."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    upkeep: UpkeepConfig = field(default_factory=UpkeepConfig)
    front_end: FrontEndConfig = field(default_factory=FrontEndConfig)
    notes: tuple[str, ...] = ()
    """One line per derived value, with the reason; start-up prints them."""
    door: str = "train"
    """Who asked: "train", "convert" or "rehearse"."""

    @property
    def trains(self) -> bool:
        return not self.debug.debug_rollout_only and self.data.num_rollout != 0

    def nothing_to_train(self) -> str:
        """Why a run of this ends at once, and what to give instead; "" where there is something to do."""
        done = self.checkpoint.rollouts_done
        if not done or self.data.num_rollout != done:
            return ""
        return (
            f"nothing to train: the checkpoint in --load {self.checkpoint.load} has all {done} rollouts of "
            f"--num-rollout {done}; for more give --num-rollout {2 * done}, to evaluate it --num-rollout 0"
        )

    @property
    def args(self) -> FlatArgs:
        """Every attribute under slime's name, read-only, for plugins."""
        return FlatArgs(self)


SECTION_NAMES = tuple(
    item.name for item in dataclasses.fields(Config) if item.name not in ("notes", "door")
)  # fmt: skip
SECTION_MAPPINGS = {"megatron", "ddp"}
"""Fields whose name two sections share; the flat view shows what is inside them instead."""


@functools.lru_cache(maxsize=1)
def section_of() -> Mapping[str, str]:
    """Attribute -> the section that owns it."""
    owners: dict[str, str] = {}
    for section in SECTION_NAMES:
        cls = Config.__dataclass_fields__[section].default_factory  # type: ignore[misc]
        for item in dataclasses.fields(cls):  # type: ignore[arg-type]
            if item.name not in SECTION_MAPPINGS:
                assert item.name not in owners, f"{item.name} is in {owners[item.name]} and {section}"
                owners[item.name] = section
    return FrozenMap(owners)


class FlatArgs:
    """`args` as slime's plugins know it: one namespace, slime's and Megatron's names. No assignment: see `for_call`.

    A missing name raises AttributeError with the nearest one, so `getattr(args, name, default)` works.
    """

    __slots__ = ("_config", "_runtime")

    def __init__(self, config: Config, runtime: Mapping[str, object] | None = None) -> None:
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_runtime", FrozenMap(runtime or {}))

    def with_runtime(self, **values: object) -> FlatArgs:
        """The same view plus values that exist only while running (the router's address, a token); they win."""
        return FlatArgs(self._config, {**self._runtime, **values})

    def for_call(self) -> CallArgs:
        """A view that may be written, for one call of a plugin."""
        return CallArgs(self._config, self._runtime)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        config, runtime = self._config, self._runtime
        if name in runtime:
            return runtime[name]
        if name in section_of():
            return getattr(getattr(config, section_of()[name]), name)
        if name == "eval_datasets":
            return list(config.evaluation.datasets)
        if name == "use_critic":
            return config.algorithm.advantage_estimator == "ppo"
        if name == "rollout_external":
            return config.engine.rollout_external_engine_addrs is not None
        field_name = megatron_flags.ALIASES.get(name, name)
        for mapping in (config.model.megatron, config.optimizer.megatron, config.optimizer.ddp, config.debug.custom):
            if field_name in mapping:
                return mapping[field_name]
        for prefix, mapping in (("sglang_", config.engine.sglang), ("router_", config.engine.router)):
            if name.startswith(prefix) and name[len(prefix) :] in mapping:
                return mapping[name[len(prefix) :]]
        try:
            return megatron_flags.default_of(field_name)
        except KeyError:
            raise AttributeError(f"args has no {name!r}{nearest(name, self)}") from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"args is read-only here (tried to set {name!r}): the run was built from it. Keep your own values in your module, "
            f"or give them under `custom:` in the file of --custom-config-path"
        )

    def __iter__(self) -> Iterator[str]:
        """Every name that was declared or given."""
        config = self._config
        names = {*section_of(), *self._runtime, *config.model.megatron, *config.optimizer.megatron, *config.optimizer.ddp}
        return iter(sorted(names | set(config.debug.custom) | {"eval_datasets", "use_critic", "rollout_external"}))

    @property
    def __dict__(self) -> dict[str, object]:  # type: ignore[override]
        """`vars(args)`, as of an argparse namespace: a new mapping, so a change of it changes nothing here."""
        return {name: getattr(self, name) for name in self}

    def __dir__(self) -> list[str]:
        return [*self, "with_runtime", "for_call"]

    def __reduce__(self) -> tuple:
        return type(self), (self._config, self._runtime)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(list(self))} names)"


class CallArgs(FlatArgs):
    """The view that one call of a plugin gets. What it sets is seen by that call and by what it passes its args to, alone.

    A deep copy holds copies of what was set and can be written as well.
    """

    __slots__ = ("_own",)

    def __init__(
        self, config: Config, runtime: Mapping[str, object] | None = None, own: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(config, runtime)
        object.__setattr__(self, "_own", dict(own or {}))

    def with_runtime(self, **values: object) -> CallArgs:
        return CallArgs(self._config, {**self._runtime, **values}, self._own)

    def for_call(self) -> CallArgs:
        """With what was set so far; what the call sets is not seen here."""
        return CallArgs(self._config, self._runtime, self._own)

    def __getattr__(self, name: str) -> object:
        # Copying and unpickling ask before there is an _own.
        return self._own[name] if name != "_own" and name in self._own else super().__getattr__(name)

    def __setattr__(self, name: str, value: object) -> None:
        self._own[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self._own:
            raise AttributeError(f"this call set no {name!r}, so there is nothing to delete")
        del self._own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*super().__iter__(), *self._own}))

    def __deepcopy__(self, memo: dict) -> CallArgs:
        twin = memo[id(self)] = CallArgs(self._config, self._runtime)
        object.__setattr__(twin, "_own", copy.deepcopy(self._own, memo))
        return twin

    def __reduce__(self) -> tuple:
        return type(self), (self._config, self._runtime, self._own)


def view_for_call(args: Any) -> Any:
    """`args` as one call of a plugin gets it: a view of its own that it may write. A plugin's own namespace stays that."""
    return args.for_call() if isinstance(args, FlatArgs) else args
