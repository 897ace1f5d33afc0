"""What the plan of a weight update rests on: a server loads what each of its ranks is given, and nothing else is missed.

The server is SGLang's own Qwen3-MoE on two ranks with half of the experts each. It loads on a CPU, though it cannot compute
there with experts apart; so what it holds is compared, by the checksums that it makes of every parameter on every rank.
"""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
from engine.engines import TOKEN, payload, spec
from engine.holes import with_holes
from model.reference import make_reference

from slime.engine import kinds
from slime.engine.client import EngineClient, EngineError, sync
from slime.engine.process import EngineProcess
from slime.model.hf_config import HfConfig, read_hf_config
from slime.model.hf_io import SafetensorsReader
from slime.weights.protocol import StreamReport, sync_weights
from slime.weights.serving import Receiver

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed"),
]

EXPERTS, RANKS = 8, 2
EXPERT = re.compile(r"\.experts\.(\d+)\.")
Named = list[tuple[str, torch.Tensor]]
Checksums = list[dict[str, str]]


class Served:
    """The engine, what its checkpoint holds, and an update of it."""

    def __init__(self, url: str, named: Named, hf: HfConfig):
        self.client, self.named, self.hf = EngineClient(url, TOKEN), named, hf

    def update(self, *calls: list[bytes]) -> None:
        """One update; each call has a payload per rank."""
        sync(self.client.begin_weight_update(1))
        for payloads in calls:
            sync(self.client.update_weights_from_tensor(payloads))
        sync(self.client.end_weight_update(1))

    def forget(self) -> None:
        """Every parameter gets random values."""
        sync(self.client.call("POST", "/weights_checker", {"action": "reset_tensors"}, timeout=60))

    def checksums(self) -> Checksums:
        return sync(self.client.weights_checksums())

    def served_by(self, rank: int) -> Named:
        """The contiguous block of experts of a rank, and all that is no expert."""
        mine = range(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
        return [(name, tensor) for name, tensor in self.named if (at := EXPERT.search(name)) is None or int(at[1]) in mine]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intake")
    make_reference("qwen3_moe", folder / "hf")
    reader = SafetensorsReader(folder / "hf")
    named = [(name, reader.raw(name) * 1.5) for name in reader.names()]
    with pytest.MonkeyPatch.context() as patch:
        # A run is not given such an engine: it would die of the first request.
        patch.setattr(kinds, "CUDA_ONLY", tuple(name for name in kinds.CUDA_ONLY if name != "ep_size"))
        settings = dict(ep_size=RANKS, max_total_tokens=1024, skip_tokenizer_init=True)
        engine = EngineProcess(
            spec("regular", 0, folder / "hf", tp=RANKS, **settings), device_kind="host", token=TOKEN, log_path=folder / "log"
        )
        try:
            engine.start()
            engine.wait_ready()
            yield Served(engine.url, named, read_hf_config(folder / "hf"))
        finally:
            engine.stop()


@pytest.fixture(scope="module")
def all_to_all(served) -> Checksums:
    """What both ranks hold after both got everything."""
    before = served.checksums()
    served.update([payload(served.named)] * RANKS)
    after = served.checksums()
    assert [len(rank) for rank in after] == [len(rank) for rank in before] == [3 * 9 + 3] * RANKS
    assert not any(after[rank][name] == before[rank][name] for rank in range(RANKS) for name in after[rank])
    return after


@pytest.fixture()
def forgotten(served, all_to_all) -> Checksums:
    """Every parameter of every rank holds something else, which is returned."""
    served.forget()
    random = served.checksums()
    assert not any(random[rank][name] == all_to_all[rank][name] for rank in range(RANKS) for name in random[rank])
    return random


def test_a_rank_that_is_given_its_own_experts_alone_holds_the_same_weights_to_the_bit(served, all_to_all, forgotten):
    lists = [served.served_by(rank) for rank in range(RANKS)]
    assert [len(named) for named in lists] == [66, 66] and len(served.named) == 102
    served.update([payload(named) for named in lists])
    assert served.checksums() == all_to_all


def test_the_lists_of_a_call_may_differ_in_number_and_size_and_one_may_be_empty(served, all_to_all, forgotten):
    first, second = (served.served_by(rank) for rank in range(RANKS))
    nothing = payload([])
    served.update(
        [payload(first[:50]), payload(second[:3])],
        [nothing, payload(second[3:])],
        [payload(first[50:]), nothing],
    )
    assert served.checksums() == all_to_all


def test_a_rank_needs_its_shares_of_what_tensor_parallelism_cuts_and_nothing_of_the_rest(served, all_to_all, forgotten):
    """Attention, embedding and output layer; the experts are apart. What a rank does not load is garbage."""
    engine = Receiver(0, (0, 1), RANKS, ep=RANKS, cuts=True)
    lists = [with_holes(served.served_by(rank), served.hf, engine, rank) for rank in range(RANKS)]
    # Three layers' q, o [96, 64] and k, v [48, 64] in halves; embedding and output layer, 96 rows padded to 128.
    missing = [sum(tensor.numel() for _, tensor in served.served_by(rank)) - lists[rank][1].total() for rank in range(RANKS)]
    assert missing == [3 * (96 + 48) * 64 + 2 * (96 - 64) * 64, 3 * (96 + 48) * 64 + 2 * (96 - 32) * 64]
    served.update([payload(named) for named, _ in lists])
    assert served.checksums() == all_to_all


def test_experts_of_the_other_rank_are_skipped_without_a_word(served, all_to_all, forgotten):
    own = [dict(served.served_by(rank)) for rank in range(RANKS)]
    others = [[(name, tensor) for name, tensor in served.named if name not in own[rank]] for rank in range(RANKS)]
    assert all(len(named) == 36 for named in others)
    served.update([payload(named) for named in others])
    assert served.checksums() == forgotten


def test_an_update_outside_of_a_session_is_refused_and_changes_nothing(served, forgotten):
    with pytest.raises(EngineError, match="must run between begin_weight_update"):
        sync(served.client.update_weights_from_tensor([payload(served.named)] * RANKS))
    assert served.checksums() == forgotten


def test_one_bit_in_one_of_the_lists_changes_one_checksum_of_one_rank(served, all_to_all, forgotten):
    lists = [served.served_by(rank) for rank in range(RANKS)]
    name = "model.layers.1.mlp.experts.6.down_proj.weight"
    lists[1] = [(other, turned(tensor) if other == name else tensor) for other, tensor in lists[1]]
    served.update([payload(named) for named in lists])
    differ = [(rank, key) for rank, held in enumerate(served.checksums()) for key in held if held[key] != all_to_all[rank][key]]
    assert differ == [(1, "model.layers.1.mlp.experts.w2_weight")]


class AsARun:
    """Both sides of a sync with this engine: what the fleet asks of it, and a trainer whose first stream has a turned bit."""

    def __init__(self, served: Served, flip: str):
        self.client, self.served, self.flip = served.client, served, flip

    def stream(self, version: int) -> StreamReport:
        lists = [
            [(name, turned(tensor) if name == self.flip else tensor) for name, tensor in self.served.served_by(rank)]
            for rank in range(RANKS)
        ]
        self.flip = ""
        sync(self.client.update_weights_from_tensor([payload(named) for named in lists]))
        return StreamReport(1, 0, 0)

    def check(self, version: int) -> list[str]:
        with pytest.raises(EngineError, match="answered 400"):
            sync(self.client.weights_by_name("lm_head.weight"))
        return ["default-regular-0"]

    def checksums(self, labels: list[str]) -> dict[str, Checksums]:
        return {label: self.served.checksums() for label in labels}

    def versions(self) -> dict[str, str]:
        return {"default-regular-0": sync(self.client.weight_version())}

    def pause(self) -> None:
        sync(self.client.pause_generation())

    def flush(self) -> None:
        sync(self.client.flush_cache())

    def begin(self, version: int) -> None:
        sync(self.client.begin_weight_update(version))

    def end(self, version: int) -> None:
        sync(self.client.end_weight_update(version))

    def proceed(self) -> None:
        sync(self.client.continue_generation())


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with one bit turned."""
    copy = tensor.clone()
    copy.view(torch.uint8)[3, 5] ^= 1
    return copy


def test_a_turned_bit_on_the_way_to_an_engine_that_gives_nothing_back_is_found_and_named(served, all_to_all, forgotten):
    run = AsARun(served, "model.layers.2.mlp.experts.7.up_proj.weight")
    with pytest.raises(RuntimeError, match=r"v9 .*1 of 30 parameters changed .*\.2\.mlp\.experts\.w13_weight \(rank 1\)"):
        sync_weights(run, run, version=9, read_back=True)
    sync_weights(run, run, version=10, read_back=True)
    assert served.checksums() == all_to_all
