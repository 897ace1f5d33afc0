"""--megatron-config-path: what differs between actor and critic, and where the critic is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from config.flags import config_of

from slime.config import ConfigError
from slime.config.facts import Facts
from slime.config.roles import critic_sections

PPO = ("--advantage-estimator", "ppo")


def of(tmp_path: Path, text: str, *words: str):
    file = tmp_path / "roles.yaml"
    file.write_text(text)
    return config_of(*PPO, "--megatron-config-path", str(file), *words)


BOTH = """
megatron:
  - name: policy
    role: actor
    num_nodes: 2
    overrides: {lr: 2e-6, save: /runs/a, eps_clip: 0.3}
  - name: value
    role: critic
    args: {lr: 1e-5, weight-decay: 0, adam_beta2: 0.95, save: /runs/c, load: /runs/old, ckpt_step: 7}
"""


def test_the_actor_takes_flags_and_the_critic_an_optimizer_and_folders(tmp_path):
    config = of(tmp_path, BOTH, "--lr", "3e-6", "--save", "/runs/x", "--keep-checkpoints", "2")
    assert (config.optimizer.lr, config.algorithm.eps_clip, config.algorithm.eps_clip_high) == (2e-6, 0.3, 0.3)
    assert config.checkpoint.save == "/runs/a" and config.args.use_critic is True
    role = critic_sections(config)
    optimizer, paths = role["optimizer"], role["checkpoint"]
    assert (optimizer.lr, optimizer.weight_decay, optimizer.adam_beta2, optimizer.adam_beta1) == (1e-5, 0.0, 0.95, 0.9)
    assert (paths.save, paths.load, paths.ckpt_step, paths.keep_checkpoints) == ("/runs/c", "/runs/old", 7, 3)
    assert any("lr = 2e-06, because" in note and "for the actor" in note for note in config.notes)
    # What the file does not say of the optimizer's state is as for the actor, what it says is the critic's own.
    assert (paths.no_load_optim, paths.no_save_optim) == (config.checkpoint.no_load_optim, False)
    own = of(tmp_path, BOTH.replace("ckpt_step: 7", "no_load_optim: false, no_save_optim: true"))
    paths = critic_sections(own)["checkpoint"]
    assert (paths.no_load_optim, paths.no_save_optim) == (False, True) and own.checkpoint.no_load_optim is True
    shared = critic_sections(of(tmp_path, BOTH, "--no-save-optim"))["checkpoint"]
    assert shared.no_save_optim is True


def test_without_a_file_the_critic_has_the_actors_optimizer_and_lies_beside_it(tmp_path):
    config = config_of(*PPO, "--save", "/runs/a", "--lr", "3e-6", "--use-kl-loss", "--kl-loss-coef", "0.1", "--ref-load", "/r",
                       facts=Facts(ref_load="hf"))  # fmt: skip
    role = critic_sections(config)
    assert role["optimizer"] == config.optimizer
    assert (role["checkpoint"].save, role["checkpoint"].load, role["checkpoint"].ref_load) == ("/runs/a/critic", None, None)
    assert role["algorithm"].use_kl_loss is False
    going_on = config_of(*PPO, "--load", "/runs/a", "--save", "/runs/b", facts=Facts(load="megatron", load_step=1))
    assert (going_on.algorithm.critic_load, going_on.algorithm.critic_save) == ("/runs/a/critic", "/runs/b/critic")
    flags = critic_sections(config_of(*PPO, "--critic-lr", "5e-5", "--critic-lr-warmup-iters", "2"))
    assert (flags["optimizer"].lr, flags["optimizer"].lr_warmup_iters) == (5e-5, 2)
    assert config_of().args.use_critic is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("actor: {lr: 1}", "the top must be `megatron:` with a list of roles"),
        ("megatron: [{name: a, overrides: {lr: 1e-5}}]", "has no role; each entry is of role actor or critic"),
        ("megatron: [{role: teacher}]", "has no role"),
        ("megatron: [{role: critic}, {role: critic}]", "role critic has two entries"),
        ("megatron: [{role: critic, overides: {lr: 1}}]", "unknown key 'overides'"),
        ("megatron: [{role: critic, overrides: [lr]}]", "overrides must be a mapping"),
        ("megatron: [{role: critic, overrides: {lrr: 1e-5}}]", "critic: lrr is no attribute; did you mean"),
        ("megatron: [{role: critic, overrides: {lr: fast}}]", "critic: lr: --lr wants a number, got 'fast'"),
        ("megatron: [{role: critic, overrides: {lr: -1}}]", "critic: lr: --lr must be above 0"),
        ("megatron: [{role: critic, overrides: {tensor_model_parallel_size: 4}}]", "is the actor's too; a critic has its own"),
        ("megatron: [{role: actor, overrides: {release_train: true}}]", "this version does not have"),
    ],
)
def test_a_wrong_file_is_refused_with_the_way_out(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        of(tmp_path, text)
    assert message in str(error.value)


def test_two_places_that_disagree_about_the_critic_are_named(tmp_path):
    with pytest.raises(ConfigError, match="--critic-lr 0.001 and lr 1e-05 of the critic in --megatron-config-path say two"):
        of(tmp_path, BOTH, "--critic-lr", "1e-3")


def test_flags_of_a_critic_without_one_say_so(tmp_path):
    notes = config_of("--value-clip", "0.3", "--critic-lr", "1e-5").notes
    assert sum("only --advantage-estimator ppo has a critic" in note for note in notes) == 2
