"""Choices, "Answer:" lines and words, in the spellings that models use; every row judged by hand."""

from __future__ import annotations

import pytest

from slime.rollout.grading.choices import chosen_letter, grade_gpqa
from slime.rollout.grading.dapo import grade_dapo
from slime.rollout.grading.f1 import token_f1

# fmt: off
M = {"valid_letters": ["A", "B", "C", "D"], "choices": ["Oslo", "Paris", "Rome", "Bern"]}
N = {"valid_letters": ["A", "B", "C", "D"]}
RIGHT = [
    (r"\boxed{B. Paris}", "B", M), (r"\boxed{\textbf{(B)}}", "B", M), (r"\boxed{\mathrm{B}}", "B", M),
    ("B<|im_end|>", "B", M), ("(B) Paris", "B", M), ("Answer: b", "B", M), (r"\boxed{\text{B}}", "B", N),
    (r"\boxed{\text{(B)}}", "B", N), (r"\boxed{\textbf{B}}", "B", N), (r"\boxed{(B)}", "B", N), (r"$\boxed{B}$", "B", N),
    (r"\boxed{\mathbf{B}}", "B", N), (r"\boxed{b}", "B", N), (r"\boxed{B) Paris}", "B", M), (r"\boxed{(B) Paris}", "B", M),
    (r"\boxed{B: Paris}", "B", M), (r"\boxed{\text{B. Paris}}", "B", M), (r"\boxed{Paris}", "B", M),
    (r"\boxed{\text{Paris}}", "B", M), (r"\boxed{B \text{ Paris}}", "B", M), (r"\boxed{\text{Option B}}", "B", M),
    (r"\boxed{\textbf{(B) } Paris}", "B", M), (r"\boxed{\textbf{(B)}\ Paris}", "B", M),
    (r"\boxed{\mathrm{(B)}~\text{Paris}}", "B", M), (r"\boxed{ B }", "B", N), (r"\boxed{B.}", "B", N),
    (r"\boxed{\text{B.}}", "B", N), (r"\boxed{\textrm{B}}", "B", N), (r"\boxed{\mathsf{B}}", "B", N), (r"\fbox{B}", "B", N),
    ("B", "B", N), ("B.", "B", N), ("(B)", "B", N), ("**B**", "B", N), ("B)", "B", N), ("b", "B", N), ("(b)", "B", N),
    ("B. Paris", "B", M), ("B) Paris", "B", M), ("B: Paris", "B", M), ("**B. Paris**", "B", M), ("**(B) Paris**", "B", M),
    ("[B]", "B", N), ("$B$", "B", N), ("The answer is B", "B", N), ("The answer is (B).", "B", N),
    ("The answer is **B**.", "B", N), ("The answer is $B$.", "B", N), ("The answer is: B", "B", N),
    ("**Answer:** B", "B", N), ("**Answer: B**", "B", N), ("Answer: (B)", "B", N), ("ANSWER: B", "B", N),
    ("answer - B", "B", N), ("The correct answer is B.", "B", N), ("The correct option is B.", "B", N),
    ("The correct choice is (B).", "B", N), ("Final answer: B", "B", N), ("Final Answer: **B**", "B", N),
    ("So the answer is option B.", "B", N), ("The answer is option (B)", "B", N), ("Option B is correct.", "B", N),
    ("B is correct.", "B", N), ("B is the correct answer.", "B", N), ("(B) is the right choice", "B", N),
    ("I choose B.", "B", N), ("I would go with (B).", "B", N), ("My choice: B", "B", N), ("Therefore, B.", "B", N),
    ("Therefore the answer must be B.", "B", N), ("The answer should be B", "B", N), ("It's B.", "B", N),
    ("The answer would be B.", "B", N), ("Answer is B", "B", N), ("answer B", "B", N), ("The answer is B. Paris", "B", M),
    ("The answer is Paris.", "B", M), ("It must be Paris", "B", M), ("The answer is \\text{B}.", "B", N),
    ("The answer is \\textbf{(B)}", "B", N), ("The answer is `B`", "B", N), ("The answer is \"B\".", "B", N),
    ("The best answer is B", "B", N), ("Answer:\n\nB", "B", N), ("Answer:\nB", "B", N), ("### Answer\nB", "B", N),
    ("Reasoning...\n\nB", "B", N), ("Reasoning...\n\n(B) Paris", "B", M),
    ("<think>Maybe A. The answer is A.</think>\nThe answer is B.", "B", N), ("<think>A</think>B<|im_end|>", "B", N),
    ("The answer is A. No: the answer is B.", "B", N), ("Answer: A\nWait. Answer: B", "B", N),
    ("Let me select option B", "B", N), ("The statement that is correct is B", "B", N), ("B<｜end▁of▁sentence｜>", "B", N),
    ("The answer is B</s>", "B", N), ("Answer: b.", "B", N), ("The answer is (b)", "B", N), ("Choice B", "B", N),
    ("Correct: B", "B", N), ("The answer is B) Paris", "B", M), ("The answer is (G).", "G", {}), ("J", "J", {}),
    ("The answer is E", "E", {}), (r"\boxed{H}", "H", {}), ("The answer is B", 1, N), ("The answer is B", "1", N),
    ("The answer is B", "Paris", M), ("B", "(B)", N), ("B", "B. Paris", M), ("B", "b", N), ("B", "\\boxed{B}", N),
    ("B", None, {**M, "correct_letter":"B"}), ("B", None, {**M, "correct_answer":"Paris"}),
    ("B", "", {**M, "answer_text":"Paris"}), ("The answer is B", 1.0, N), ("B", "B", {"valid_letters":"ABCD"}),
    ("B", "B", {"choices":{"A":"Oslo", "B":"Paris"}}), ("Paris", "B", {"choices":{"A":"Oslo", "B":"Paris"}}),
    ("B", "B", {"choices":["A. Oslo", "B. Paris"]}), ("Paris", "B", {"choices":["(A) Oslo", "(B) Paris"]}),
    (r"\boxed{3.2 \times 10^5}", "C", {"choices":["1", "2", r"3.2 \times 10^5", "4"]}),
    ("The answer is 42", "B", {"choices":["4", "42"]}), ("Answer: **(B)**", "B", N), ("Answer: \\(B\\)", "B", N),
    ("Answer: $\\boxed{B}$<|im_end|>", "B", N), ("Answer: $\\text{B}$", "B", N), ("**Final Answer**\n\n**B**", "B", N),
    ("The answer is $\\mathbf{B}$.", "B", N), ("Thus, the correct answer is:\n\n**B) Paris**", "B", M),
    ("the answer to the question is B", "B", N), ("The correct answer is therefore B", "B", N),
    ("The answer is clearly B.", "B", N), ("The answer is thus (B)", "B", N), ("The right answer is letter B", "B", N),
    ("Answer：B", "B", N), ("答案是B", "B", N), ("The answer is B because A is wrong.", "B", N), ("I think it is B", "B", N),
    ("Answer = B", "B", N), ("The answer isn't A but B", "B", N), ("The answer is not A, but rather B.", "B", N),
    ("<answer>B</answer>", "B", N), ("<answer> (B) Paris </answer>", "B", M), ("Ｂ", "B", N), ("𝐁", "B", N),
    ("The answer is “B”.", "B", N), ("Answer: ‘B’", "B", N), ("“B”", "B", N), ("B!", "B", N), ("# B", "B", N),
    ("- B", "B", N), ("> B", "B", N), (r"\boxed{\rm B}", "B", N), ("B would be the correct answer", "B", N),
    ("It must be B.", "B", N), ("B is my answer", "B", N), ("The choice that fits is B", "B", N),
    ("The answer to question A is B", "B", N), ("The answer is Paris, not Rome.", "B", M), ("Antwort: B", "B", N),
    ("Die Antwort ist B.", "B", N), ("Respuesta: B", "B", N), ("La réponse est B.", "B", N), ("回答：B", "B", N),
    ("故选择B。", "B", N),
]
WRONG = [
    ("The answer is A.", "B", N), ("A", "B", N), ("", "B", N), ("no idea", "B", N), ("The answer is a number", "A", N),
    ("The answer is a matter of taste.", "A", N), (r"\boxed{A}", "B", N), (r"\boxed{", "B", N),
    (r"\boxed{B} no, \boxed{", "B", N), ("The answer is A. No: the answer is C.", "B", M), ("A or B", "B", N),
    ("Both A and B", "B", N), ("I am not sure", "I", {}), ("A good question", "A", N), ("I think so", "I", {}),
    ("The answer\n"+"\n"*2000+"x", "A", N), ("Paris or Rome", "B", M), ("<think>The answer is B.", "B", N),
    ("The answer is Bern", "B", M), ("answer: A, B", "B", N), ("Oslo", "B", M), (r"\boxed{D. Bern}", "B", M),
    ("The answer is C. B is wrong.", "B", N), ("The answer is not B", "B", N), ("A. Oslo", "B", M), ("Big question", "B", N),
    ("The answer is Because", "B", N), ("Answer: none", "B", N), ("The options are A, B, C, D", "D", N),
    ("option B is wrong. The answer is A", "B", N), ("It is C, not B", "B", N), ("a", "B", N),
    ("The answer is Rome, not Paris.", "B", M), ("It isn't B but C.", "B", N), ("The answer isn’t B.", "B", N),
    ("The option that uses B is wrong", "B", N), ("The answer is A’s", "A", N),
]
DAPO = [
    ("Answer: 34<|im_end|>", "34", 1), ("Answer: $34$<|endoftext|>", "34", 1), ("**Answer:** 34", "34", 1),
    ("**Answer: 34**", "34", 1), ("Answer: 34.", "34", 1), ("Answer: 34.0", "34", 1), ("Answer: $34$.", "34", 1),
    ("Answer: \\(34\\)", "34", 1), ("Answer: \\boxed{34}.", "34", 1), ("Answer: $\\boxed{34}$", "34", 1),
    ("Answer: 1,234", "1234", 1), ("Answer: 1{,}234", "1234", 1), ("Answer: x = 34", "34", 1),
    ("Answer: 34 degrees", "34", 1), ("Answer: $34^\\circ$", "34", 1), ("Answer: -34", "-34", 1), ("Answer: 34 cm", "34", 1),
    ("Final Answer: 34", "34", 1), ("answer : 34", "34", 1), ("Answer:34", "34", 1), ("Answer:\n34", "34", 1),
    ("Answer: 034", "34", 1), ("Answer: 34</s>", "34.0", 1), ("Answer: 34 <|user|>", 34, 1), ("Answer: \\$34", "34", 1),
    ("Answer: **34**", "34", 1), ("Answer: 34\n\n<|im_end|>\n", "34", 1), ("Answer: $\\text{34}$", "34", 1),
    ("Answer: 34 | done", "34", 0), ("Answer: 35<|im_end|>", "34", 0), ("Answer: 341", "34", 0), ("Answer: 3.4", "34", 0),
    ("Answer: -34", "34", 0), ("Answer:", "34", 0), ("34", "34", 0), ("Answer: 34 or 35", "34", 0),
    ("Answer: 34<｜end▁of▁sentence｜>", "34", 1), ("Answer: 34\\%", "34", 1), ("Answer: \\frac{1}{2}", "\\frac12", 1),
    ("Answer: 34<|eot_id|>", "\\boxed{34}", 1), ("Answer: 34<end_of_turn>", "34", 1), ("\\boxed{34}", "34", 0),
    ("Answer: 34" + "x"*400, "34", 0), ("Answer: \\boxed{34", "34", 0), ("Answer: 3.4e1", "34", 1),
    ("Answer: $$34$$", "34", 1), ("Answer: 34, as shown.", "34", 0), ("Answer: 12\\sqrt{3}", "12\\sqrt{3}", 1),
    ("Answer: \\frac{\\sqrt{3}}{2}", "\\sqrt{3}/2", 1), ("Answer: 2x+1", "1+2x", 1), ("Answer: x^2", "x^3", 0),
    ("Answer: 12\\pi", "12", 0), ("Answer: \\{1,2\\}", "\\{2,1\\}", 1), ("Answer: 1/3", "0.33", 0),
]
F1 = [
    ("1,000","1000",1), ("U.S.","US",1), ("The cat.","cat",1), ("<think>long</think>Paris","Paris",1),
    ("Paris<|im_end|>","paris",1), ("“Paris”","Paris",1), ("New-York","New York",0), ("New-York","NewYork",1),
    ("yes","Yes.",1), ("yes it is","yes",0), ("no","no",1), ("an apple a day","apple day",1), ("it's","its",1),
    ("10%","10",1), ("Beyoncé","Beyonce\u0301",1), ("Paris\u200b","Paris",1), ("$5","5",1), ("","",1), ("the","a",1),
    ("PARIS","paris",1),
]
# fmt: on


@pytest.mark.parametrize("response, label, metadata", RIGHT)
def test_a_choice_is_read_in_every_usual_spelling(response, label, metadata):
    assert grade_gpqa(response, label, metadata) == 1.0


@pytest.mark.parametrize("response, label, metadata", WRONG)
def test_what_names_another_choice_or_none_is_wrong(response, label, metadata):
    assert grade_gpqa(response, label, metadata) == 0.0


@pytest.mark.parametrize("response, label, right", DAPO)
def test_an_answer_line_is_read_in_every_usual_spelling(response, label, right):
    assert grade_dapo(response, str(label))["score"] == (1.0 if right else -1.0)


@pytest.mark.parametrize("response, truth, same", F1)
def test_words_are_those_of_squad(response, truth, same):
    assert (token_f1(response, truth) == 1.0) is bool(same)


@pytest.mark.parametrize(
    "part",
    [
        "The answer",
        "answer is ",
        "(B) ",
        "option: ",
        "the correct ",
        "is is ",
        "**",
        "so the ",
        "answer to x",
        "\\boxed{A} ",
        "\n",
    ],
)
def test_a_choice_is_looked_for_in_linear_time(part):
    # A search in square time would take hours at this length.
    chosen_letter(part * 50_000 + "\n" * 50_000 + "x", M)
