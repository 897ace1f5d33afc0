"""A flag that is taken and changes nothing, or less than one may think, says so at start."""

from __future__ import annotations

import pytest

from slime.config import ConfigError
from tests.config.flags import MOE, config_of


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("--update-weight-disk-dir /w", "--update-weight-disk-dir changes nothing without --update-weight-transport disk"),
        ("--rollout-data-transport object-store", "--rollout-data-transport changes nothing: rollouts go through Ray's object"),
        ("--keep-old-actor", "--keep-old-actor changes nothing: training starts from the weights that generated the rollout"),
        ("--train-backend megatron", "--train-backend changes nothing: there is one"),
        ("--update-weight-delta-encoding xor", "--update-weight-delta-encoding changes nothing without --update-weight-mode"),
        ("--attention-softmax-in-fp32", "--attention-softmax-in-fp32 changes nothing: attention here always sums in float32"),
        ("--init-method-std 0.01", "--init-method-std changes nothing: every parameter comes from a checkpoint"),
        ("--no-initialization", "--perform-initialization changes nothing"),
        ("--overlap-p2p-communication", "--overlap-p2p-comm changes nothing: the schedule decides it"),
        ("--log-max-attention-logit", "--log-max-attention-logit changes nothing"),
        ("--rollout-top-p 0.9", "--rollout-top-p 0.9 cut the vocabulary when sampling"),
        ("--rollout-top-k 50 --rollout-top-p 0.5", "--rollout-top-p 0.5 and --rollout-top-k 50 cut the vocabulary"),
    ],
)
def test_a_note_says_what_changes_nothing(words: str, note: str) -> None:
    assert any(line.startswith(note) for line in config_of(*words.split()).notes), config_of(*words.split()).notes
    assert not any(line.startswith(note) for line in config_of().notes)


@pytest.mark.parametrize(
    "words", ["--moe-enable-deepep", "--moe-token-dispatcher-type flex", "--moe-flex-dispatcher-backend deepep"]
)
def test_experts_are_reached_by_all_to_all_whatever_is_asked(words: str) -> None:
    """Six launchers of the public project ask for flex and DeepEP, with which megatron-core's build would end."""
    config = config_of(*MOE, *words.split())
    assert config.model.megatron["moe_token_dispatcher_type"] == "alltoall"
    assert not {"moe_enable_deepep", "moe_flex_dispatcher_backend"} & config.model.megatron.keys()
    assert any("all-to-all" in note or "alltoall" in note for note in config.notes)


def test_a_router_that_already_runs_has_a_port() -> None:
    with pytest.raises(
        ConfigError, match="10.0.0.1 is the address of a router that already runs, .*; add --sglang-router-port"
    ):
        config_of("--sglang-router-ip", "10.0.0.1")
    assert config_of("--sglang-router-ip", "10.0.0.1", "--sglang-router-port", "3000").engine.sglang_router_ip == "10.0.0.1"
