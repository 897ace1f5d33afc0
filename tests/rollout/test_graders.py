"""What the graders call right and wrong, in tables of our own."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rollout_helpers import make_config

from slime.rollout.grading.choices import grade_gpqa
from slime.rollout.grading.dapo import grade_dapo
from slime.rollout.grading.deepscaler import grade_deepscaler
from slime.rollout.grading.f1 import token_f1
from slime.rollout.grading.pool import GradingError
from slime.rollout.rm_hub import async_rm, batched_async_rm, remote
from slime.types.sample import Sample


@pytest.mark.parametrize(
    "response, label, right",
    [
        (r"<think>\boxed{1}</think> so \boxed{x(x+1)}", "x^2+x", True),
        (r"<think>\boxed{5}</think> no box", "5", False),
        (r"\boxed{5}", "5", False),
        (r"question ###Response \boxed{5} ###Response \boxed{6}", "5", True),
        (r"</think>\boxed{}", "", False),
    ],
)
def test_deepscaler_grades_what_follows_the_thought(response, label, right):
    assert grade_deepscaler(response, label) is right


@pytest.mark.parametrize(
    "response, label, score, pred",
    [
        ("steps\nAnswer: 34", "34", 1.0, "34"),
        (r"Answer: \boxed{34}", "34.0", 1.0, "34"),
        ("Answer: 1\nAnswer: 34.", "34", 1.0, "34"),
        ("Answer: $x = 34$", "34", 1.0, "34"),
        ("Answer: 35", "34", -1.0, "35"),
        ("the answer is 34", "34", -1.0, "[INVALID]"),
        ("Answer: 34" + "." * 400, "34", -1.0, "[INVALID]"),
    ],
)
def test_dapo_reads_the_last_answer_line_near_the_end(response, label, score, pred):
    assert grade_dapo(response, label) == {"score": score, "acc": score > 0, "pred": pred}


@pytest.mark.parametrize(
    "prediction, truth, score",
    [
        ("The cat sat", "a cat sat", 1.0),
        ("cat", "cat dog", 2 / 3),  # precision 1, recall 1/2
        ("cat cat", "cat", 2 / 3),
        ("bird", "cat", 0.0),
        ("yes it is", "yes", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(prediction, truth, score):
    assert token_f1(prediction, truth) == pytest.approx(score)


CHOICES = {"choices": ["red apple", "green pear", "blue plum"]}


@pytest.mark.parametrize(
    "response, label, metadata, score",
    [
        ("The answer is (B).", "B", {}, 1.0),
        ("Answer: A ... no, answer: C", "C", {}, 1.0),
        (r"\boxed{\text{B}}", 1, CHOICES, 1.0),
        (r"\boxed{green pear}", "green pear", CHOICES, 1.0),
        ("I think\n\nD", "D", {}, 1.0),
        ("It must be the blue plum.", None, CHOICES | {"correct_letter": "C"}, 1.0),
        ("Answer: A", "B", {}, 0.0),
        ("no idea", "B", {}, 0.0),
        ("", "B", {}, 0.0),
        ("Answer: E", "E", {"valid_letters": ["A", "B", "C", "D", "E"]}, 1.0),
    ],
)
def test_gpqa_reads_letters_indices_and_texts(response, label, metadata, score):
    assert grade_gpqa(response, label, metadata) == score


def test_gpqa_without_a_right_choice_is_an_error():
    with pytest.raises(ValueError, match="which choice is right"):
        grade_gpqa("Answer: A", "none of these", CHOICES)


def grade(sample, **values):
    return asyncio.run(async_rm(make_config(**values).args, sample))


async def by_length(args, sample, **kwargs):
    return [float(len(s.response)) for s in sample] if isinstance(sample, list) else float(len(sample.response))


async def always_nine(args, sample, **kwargs):
    return 9.0


def test_who_grades_a_sample_the_nearest_wins():
    sample = Sample(response=r"\boxed{7}", label="7")
    assert grade(sample, rm_type="math") == 1
    assert grade(sample, rm_type="boxed_f1") == 1.0 and grade(sample, rm_type="f1") < 1.0
    assert grade(sample, rm_type="boxed_math") == 1
    assert grade(Sample(response="7", label="7", metadata={"rm_type": "f1"}), rm_type="math") == 1.0
    assert grade(sample, rm_type="math", custom_rm_path=f"{__name__}.by_length") == 9.0 == len(sample.response)
    own = Sample(response="abc", custom_rm_path=f"{__name__}.always_nine")
    assert grade(own, custom_rm_path=f"{__name__}.by_length") == 9.0
    with pytest.raises(ValueError, match="no label to grade against"):
        grade(Sample(response=r"\boxed{7}"), rm_type="math")
    with pytest.raises(ValueError, match="'math2' is no grader; did you mean math"):
        grade(sample, rm_type="math2")


def test_random_rewards_are_the_same_for_the_same_sample():
    samples = [Sample(index=i) for i in range(40)]
    args = make_config(rm_type="random").args
    first, second = (asyncio.run(batched_async_rm(args, samples)) for _ in range(2))
    assert first == second and set(first) == {0, 1}


async def one_too_few(args, samples, **kwargs):
    return [1.0]


def test_a_batch_grader_answers_for_every_sample():
    samples = [Sample(response="a"), Sample(response="bc")]
    args = make_config(custom_rm_path=f"{__name__}.by_length").args
    assert asyncio.run(batched_async_rm(args, samples)) == [1.0, 2.0]
    with pytest.raises(ValueError, match="gave 1 rewards for a list of 2 samples"):
        asyncio.run(batched_async_rm(make_config(custom_rm_path=f"{__name__}.one_too_few").args, samples))


@pytest.fixture
def reward_server():
    statuses, seen = [], []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status = statuses.pop(0) if statuses else 200
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"score": 0.25}')

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", statuses, seen
    server.shutdown()
    server.server_close()


def test_a_reward_server_is_asked_again_when_busy_and_not_when_it_refuses(reward_server, monkeypatch):
    monkeypatch.setattr(remote, "LONGEST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(remote.random, "random", lambda: 0.0)
    url, statuses, seen = reward_server
    sample = Sample(prompt="p", response="r", label="l")
    statuses += [503, 429]
    assert grade(sample, rm_type="remote_rm", rm_url=url) == {"score": 0.25}
    assert seen == [{"prompt": "p", "response": "r", "label": "l"}] * 3
    statuses += [404]
    with pytest.raises(GradingError, match="gave no reward: 404") as refused:
        grade(sample, rm_type="remote_rm", rm_url=url)
    assert len(seen) == 4 and refused.value.reason == "server_refused"
    statuses += [429] * 10
    with pytest.raises(GradingError, match="gave no reward: 429") as busy:
        grade(sample, rm_type="remote_rm", rm_url=url)
    assert len(seen) == 14 and busy.value.reason == "server_busy"
    with pytest.raises(ValueError, match="--rm-url"):
        grade(sample, rm_type="remote_rm")
