from slime.observability.report import RolloutLine, bar, evaluation_line


def test_a_rollout_is_one_line_with_its_figures():
    line = RolloutLine(
        rollout_id=4, num_rollout=20, reward=0.52, response_length=6.25, log_prob_gap=0.0123, entropy=0.4, loss=-0.01,
        generate_seconds=3.0, train_seconds=4.5, sync_seconds=0.5, step_seconds=8.04,
    ).text()  # fmt: skip
    assert "\n" not in line
    for part in ("rollout  5/20", "reward  0.520", "6.2 tok", "gap 0.0123", "entropy 0.400", "step   8.0 s", "sync 0.5"):
        assert part in line, (part, line)


def test_supervised_training_shows_no_reward():
    line = RolloutLine(
        rollout_id=0, num_rollout=3, reward=None, response_length=4.5, log_prob_gap=None, entropy=None, loss=0.6562,
        generate_seconds=0.0, train_seconds=1.0, sync_seconds=0.0, step_seconds=1.0,
    ).text()  # fmt: skip
    assert "reward" not in line and "gap" not in line and "loss  0.6562" in line


def test_the_bar_has_one_cell_per_tenth_and_stays_within_its_ends():
    assert bar(0.52).count("█") == 5 and len(bar(0.52)) == 10
    assert bar(-3.0) == "·" * 10 and bar(7.0) == "█" * 10


def test_an_evaluation_names_every_dataset():
    assert evaluation_line(3, {"add": 0.5, "hard": 0.25}, when="before training") == (
        "evaluation before training (rollout 3): add 0.500, hard 0.250"
    )


def test_a_data_set_without_a_result_is_said_to_have_none():
    line = evaluation_line(0, {"add": 0.5, "quiz": float("nan")}, when="after training")
    assert line == "evaluation after training (rollout 0): add 0.500, quiz has no result"
