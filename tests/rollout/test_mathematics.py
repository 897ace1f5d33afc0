"""Which answers are the same mathematics: every pair judged by hand, in both directions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slime.rollout.grading.algebra import same_expression
from slime.rollout.grading.mathematics import grade_math, same_answer
from slime.rollout.grading.response import answer_part, last_boxed, without_end_tokens

ROOT = Path(__file__).resolve().parents[2]

BOXED = [
    (r"so \boxed{7}.", "7"),
    (r"first \boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\fbox{x}", "x"),
    (r"\boxed 5$", "5"),
    (r"\boxed5", "5"),
    (r"\boxed $5$", None),
    (r"\boxed{ {a} and {b} }", "{a} and {b}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
    (r"\boxed{x = \boxed{5}}", "5"),
    (r"\boxed{12} and then \boxed{3", None),
    (r"\boxed{5} wait, no: \boxed{", None),
    (r"\boxed{5} or \boxed", None),
    (r"\boxedsomething{5}", None),
    (r"\boxed{}", ""),
    ("no box, 7", None),
    ("", None),
]


@pytest.mark.parametrize("text, content", BOXED)
def test_the_last_box_counts_and_an_open_one_is_no_answer(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    "token",
    [
        "<|im_end|>", "<|endoftext|>", "<|user|>", "<|observation|>", "<|eot_id|>", "<|end_of_text|>", "</s>", "<eos>",
        "<end_of_turn>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<|return|>", "[EOS]", "<|im_end|>\n",
        " <|im_end|><|endoftext|> ",
    ],
)  # fmt: skip
def test_the_end_tokens_of_a_model_are_no_part_of_its_answer(token):
    assert without_end_tokens("Answer: 34" + token) == "Answer: 34"
    assert without_end_tokens(token + "a" + token) == token + "a"


@pytest.mark.parametrize("text", ["a <b>", "x < y|> z", "[5]", "<|", "<| not a token |>", "f(x)=1"])
def test_what_only_looks_like_an_end_token_stays(text):
    assert without_end_tokens(text) == text


def test_the_answer_follows_the_last_thought_and_an_unfinished_thought_has_none():
    assert answer_part("<think>a</think>b</think> c") == " c" and answer_part("plain") == "plain"
    assert answer_part("<think> the answer is B") == ""


SAME = [
    (r"10,\!080", r"10080"),
    (r"10{,}080", r"10080"),
    (r"1{,}234{,}567", r"1234567"),
    (r"1\,234\,567", r"1234567"),
    (r"10 080", r"10080"),
    (r"\$32,\!348", r"32348"),
    (r"\$32{,}348.50", r"32348.5"),
    (r"\$ 32", r"32"),
    (r"32\text{ dollars}", r"32"),
    (r"32\$", r"32"),
    (r"\text{\$}32", r"32"),
    (r"USD 32", r"32"),
    (r"52_{8}", r"52_8"),
    (r"52_{\text{eight}}", r"52_8"),
    (r"52_8", r"52"),
    (r"110_{2}", r"110_2"),
    (r"1011_{\text{two}}", r"1011_2"),
    (r"2A_{16}", r"2a_{16}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", r"\begin{pmatrix} 1&2\\3&4 \end{pmatrix}"),
    (r"\begin{pmatrix} \frac12 \\ 0.5 \end{pmatrix}", r"\begin{pmatrix}1/2\\1/2\end{pmatrix}"),
    (r"\left(\begin{array}{c}1\\2\end{array}\right)", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"12\text{ square units}", r"12"),
    (r"12 \text{ sq. units}", r"12"),
    (r"12 square units", r"12"),
    (r"9\text{ cm}^{2}", r"9"),
    (r"9\text{ cm}^2", r"9"),
    (r"9 \mathrm{~cm}^2", r"9"),
    (r"9\,\text{cm}^2", r"9"),
    (r"9 cm^2", r"9"),
    (r"9\ \mathrm{cm}", r"9"),
    (r"9~\text{cm}", r"9"),
    (r"9\text{ cm}", r"9\text{ cm}"),
    (r"5\text{ miles per hour}", r"5"),
    (r"5 \frac{\text{m}}{\text{s}}", r"5"),
    (r"5\text{ m/s}", r"5"),
    (r"30\text{ minutes}", r"30"),
    (r"1 13/17", r"1\frac{13}{17}"),
    (r"1\ 13/17", r"\frac{30}{17}"),
    (r"-1 13/17", r"-\frac{30}{17}"),
    (r"1\tfrac{13}{17}", r"30/17"),
    (r"1\frac{13}{17}", r"30/17"),
    (r"2\frac12", r"2.5"),
    (r"2 1/2", r"2\frac{1}{2}"),
    (r"2½", r"2.5"),
    (r"x \in (-\infty,-1)", r"(-\infty,-1)"),
    (r"x\in(-\infty,-1)", r"(-\infty,-1)"),
    (r"(-\infty,-1)", r"x \in (-\infty,-1)"),
    (r"x \in [0, 1]", r"[0,1]"),
    (r"(-\infty, 0) \cup (1, \infty)", r"x \in (-\infty,0)\cup(1,\infty)"),
    (r"\dbinom{5}{2}", r"10"),
    (r"\binom{5}{2}", r"10"),
    (r"\tbinom52", r"10"),
    (r"{5 \choose 2}", r"10"),
    (r"C(5,2)", r"C(5,2)"),
    (r"\frac{1}{2}", r"0.5"),
    (r"\dfrac{1}{2}", r"\frac12"),
    (r"\frac 1 2", r"1/2"),
    (r"\frac{ 1 }{ 2 }", r"1/2"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{1}{-2}", r"-1/2"),
    (r"-1/2", r"-0.5"),
    (r"50\%", r"50"),
    (r"50\%", r"0.5"),
    (r"50%", r"\frac{1}{2}"),
    (r"50 percent", r"50\%"),
    (r"50\text{ percent}", r"50"),
    (r"0.5", r"50\%"),
    (r"90^\circ", r"90"),
    (r"90^{\circ}", r"90"),
    (r"90°", r"90"),
    (r"90\text{ degrees}", r"90"),
    (r"90 degrees", r"90"),
    (r"\frac{\pi}{2}\text{ radians}", r"\frac{\pi}{2}"),
    (r"3\times10^5", r"300000"),
    (r"3 \times 10^{5}", r"300000"),
    (r"3\cdot 10^5", r"300000"),
    (r"3e5", r"300000"),
    (r"3.0E+5", r"300000"),
    (r"1.5\times 10^{-3}", r"0.0015"),
    (r"10^{6}", r"1000000"),
    (r"x=5", r"5"),
    (r"x = 5", r"5"),
    (r"5", r"x=5"),
    (r"y = 2x + 3", r"y=2x+3"),
    (r"y=2x+3", r"2x+3"),
    (r"2x+3", r"y=2x+3"),
    (r"f(x) = x^2", r"x^2"),
    (r"x_1 = 3", r"3"),
    (r"2x+4y=8", r"x+2y=4"),
    (r"x=1 \text{ or } x=2", r"1,2"),
    (r"x=1, 2", r"1,2"),
    (r"x = 1, x = 2", r"2, 1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\left\{1,2\right\}", r"1,2"),
    (r"1,2", r"\{2,1\}"),
    (r"1 \text{ and } 2", r"1,2"),
    (r"1 and 2", r"2,1"),
    (r"(1,2)", r"(1, 2)"),
    (r"\left(1,\frac{1}{2}\right)", r"(1,0.5)"),
    (r"(x,y)=(1,2)", r"(1,2)"),
    (r"(x, y) = (1, 2)", r"(1,2)"),
    (r"x=1,y=2", r"(1,2)"),
    (r"\langle 1,2\rangle", r"\langle 1, 2 \rangle"),
    (r"[1,2)", r"[1,2)"),
    (r"\text{Monday}", r"Monday"),
    (r"\textbf{Monday}", r"monday"),
    (r"\text{(B)}", r"B"),
    (r"(B)", r"B"),
    (r"\mathrm{(B)}", r"B"),
    (r"\textbf{(B) }", r"B"),
    (r"\text{even}", r"even"),
    (r"\text{Yes}", r"yes"),
    (r"\text{yes.}", r"yes"),
    (r"\infty", r"+\infty"),
    (r"-\infty", r"-\infty"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\sqrt 8", r"2\sqrt2"),
    (r"3\sqrt 10", r"3\sqrt{10}"),
    (r"2\sqrt{2}", r"\sqrt8"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"\frac{\sqrt3}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\sqrt[3]{8}", r"2"),
    (r"\sqrt[3]{-8}", r"-2"),
    (r"8+3x", r"3x+8"),
    (r"9\sqrt{2}+9", r"9+9\sqrt{2}"),
    (r"(x+1)^2", r"x^2+2x+1"),
    (r"x(x+1)", r"x^2+x"),
    (r"\frac{x^2-1}{x-1}", r"x+1"),
    (r"(x-1)(x+1)", r"x^2-1"),
    (r"2(x+y)", r"2x+2y"),
    (r"e^{2x}", r"(e^x)^2"),
    (r"\ln 4", r"2\ln 2"),
    (r"\log_{10} 100", r"2"),
    (r"\log 100", r"2"),
    (r"\sin^2 x+\cos^2 x", r"1"),
    (r"\sin 30^\circ", r"\frac12"),
    (r"2\pi r", r"2r\pi"),
    (r"4\pi", r"4 \pi"),
    (r"4π", r"4\pi"),
    (r"5!", r"120"),
    (r"\frac{5!}{3!}", r"20"),
    (r"2^{10}", r"1024"),
    (r"2^10", r"1024"),
    (r"3+4i", r"4i+3"),
    (r"i", r"\sqrt{-1}"),
    (r"(1+i)^2", r"2i"),
    (r"e^{i\pi}", r"-1"),
    (r"\pm 2", r"\pm2"),
    (r"\pm 2", r"2,-2"),
    (r"-2, 2", r"\pm 2"),
    (r"\pm\sqrt{3}", r"\sqrt3,-\sqrt3"),
    (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    (r"\emptyset", r"\varnothing"),
    (r"7.", r"7"),
    (r"7.0", r"7"),
    (r"007", r"7"),
    (r"+7", r"7"),
    (r"--7", r"7"),
    (r"$7$", r"7"),
    (r"\(7\)", r"7"),
    (r"7\,", r"7"),
    (r"\mathbf{7}", r"7"),
    (r"\displaystyle 7", r"7"),
    (r"\displaystyle\frac{1}{2}", r"\frac{1}{2}"),
    (r"0.\overline{3}", r"\frac13"),
    (r"0.\overline{12}", r"\frac{4}{33}"),
    (r".5", r"0.5"),
    (r"1,000,000", r"1000000"),
    (r"1,234.5", r"1234.5"),
    (r"12:30", r"12:30"),
    (r"3:4", r"3:4"),
    (r"3:4", r"\frac{3}{4}"),
    (r"x<3", r"(-\infty,3)"),
    (r"x \ge 3", r"[3,\infty)"),
    (r"-1 \le x < 2", r"[-1,2)"),
    (r"-1<x<2", r"(-1,2)"),
    (r"x>3", r"3<x"),
    (r"\frac{a}{b}", r"a/b"),
    (r"a^2b", r"ba^2"),
    (r"|x|", r"\left|x\right|"),
    (r"x^{2}", r"x^2"),
    (r"\overline{AB}", r"\overline{AB}"),
    (r"6\%", r"6"),
    (r"\frac{3}{4}\text{ hours}", r"3/4"),
    (r"11\text{ a.m.}", r"11\text{ a.m.}"),
    (r"12\text{ cm}", r"12 cm"),
    (r"100\text{ cm}^3", r"100\text{ cubic centimeters}"),
    (r"\boxed{5}", r"5"),
    (r"k=3", r"3"),
    (r"n = 10", r"10"),
    (r"\theta = 30^\circ", r"30"),
    (r"\text{The answer is } 5", r"5"),
    (r"5 \text{ or } 6", r"5,6"),
    (r"\frac{2}{3}\pi", r"\frac{2\pi}{3}"),
    (r"0.5x", r"\frac{x}{2}"),
    (r"\frac{1}{2}x", r"x/2"),
    (r"\mathbb{R}", r"\mathbb{R}"),
    (r"(-\infty,\infty)", r"\mathbb{R}"),
    (r"1/2, 3/4", r"\frac12,\frac34"),
    (r"p - q", r"-q+p"),
    (r"2 \cdot 3", r"6"),
    (r"2 \times 3", r"6"),
    (r"\lfloor 3.5 \rfloor", r"3"),
    (r"|-5|", r"5"),
    (r"\text{no real solutions}", r"\text{no real solutions}"),
    (r"3.14", r"3.140"),
    (r"\frac{22}{7}", r"22/7"),
    (r"1,2,3", r"3,2,1"),
    (r"(2,3],(4,5)", r"(2,3],(4,5)"),
    (r"\tan^{-1}(1)", r"\frac{\pi}{4}"),
    (r"\arctan 1", r"\pi/4"),
    (r"x^2+y^2=1", r"y^2+x^2=1"),
    (r"x^2+y^2-1=0", r"x^2+y^2=1"),
    (r"\sqrt[3]{-27}x", r"-3x"),
]
DIFFERENT = [
    (r"-5,0", r"[-5,0]"),
    (r"-5,0", r"(-5,0]"),
    (r"[-5,0]", r"(-5,0)"),
    (r"(-5,0)", r"(-5,0]"),
    (r"[-5,0)", r"(-5,0]"),
    (r"2 1/2", r"\frac{21}{2}"),
    (r"2\frac{1}{2}", r"\frac{21}{2}"),
    (r"2\frac{1}{2}", r"1"),
    (r"1 13/17", r"\frac{113}{17}"),
    (r"4\sqrt{2}", r"4"),
    (r"4", r"4\sqrt{2}"),
    (r"4\pi", r"4"),
    (r"\sqrt{2}", r"2"),
    (r"\frac{1}{2006!}", r"\frac{1}{2004!}"),
    (r"\frac{1}{10^{30}}", r"\frac{1}{10^{31}}"),
    (r"10^{-20}", r"0"),
    (r"2", r"\pm 2"),
    (r"\pm 2", r"2"),
    (r"-2", r"\pm 2"),
    (r"\pm 2", r"\pm 3"),
    (r"5", r"-5"),
    (r"5", r"6"),
    (r"1.2", r"1.3"),
    (r"0.3333", r"\frac13"),
    (r"0.333", r"1/3"),
    (r"0.0000001", r"0.0000002"),
    (r"1234567", r"1234568"),
    (r"1,2", r"1,3"),
    (r"1,2", r"1,2,3"),
    (r"(1,2)", r"(2,1)"),
    (r"(1,2,3)", r"(1,2,4)"),
    (r"\{1,2\}", r"\{1,3\}"),
    (r"x+1", r"x+2"),
    (r"x^2", r"x^3"),
    (r"2x", r"x"),
    (r"xy", r"x"),
    (r"x=5", r"y=5"),
    (r"x=5", r"x=6"),
    (r"x=5", r"x=-5"),
    (r"52_8", r"52_9"),
    (r"52_8", r"42"),
    (r"53_{8}", r"52_8"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    (r"9\text{ cm}", r"9\text{ m}"),
    (r"10,080", r"10,081"),
    (r"50\%", r"5"),
    (r"50\%", r"51"),
    (r"50\%", r"0.05"),
    (r"0.5", r"50"),
    (r"90^\circ", r"80"),
    (r"3\times10^5", r"3\times10^6"),
    (r"3e5", r"3e6"),
    (r"\infty", r"-\infty"),
    (r"\infty", r"0"),
    (r"(-\infty,1)", r"(-\infty,-1)"),
    (r"(-\infty,-1]", r"(-\infty,-1)"),
    (r"x\in(0,1)", r"[0,1]"),
    (r"x<3", r"x\le 3"),
    (r"x<3", r"x>3"),
    (r"\text{Monday}", r"Tuesday"),
    (r"A", r"B"),
    (r"(A)", r"B"),
    (r"yes", r"no"),
    (r"\text{even}", r"odd"),
    (r"\binom{5}{2}", r"\binom{5}{1}"),
    (r"5!", r"5"),
    (r"\sqrt{-1}", r"1"),
    (r"3+4i", r"3-4i"),
    (r"\log_2 8", r"\log_8 2"),
    (r"\sin x", r"\cos x"),
    (r"e^x", r"e^{-x}"),
    (r"\frac{a}{b}", r"\frac{b}{a}"),
    (r"x^2+y^2=1", r"x^2+y^2=2"),
    (r"2x+4y=8", r"x+2y=8"),
    (r"12:30", r"12:31"),
    (r"3:4", r"4:3"),
    (r"1\frac{1}{2}", r"\frac{1}{2}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{\sqrt{3}}{2}"),
    (r"0.\overline{3}", r"0.3"),
    (r"", r"5"),
    (r"5", r""),
    (r"5m", r"5"),
    (r"5t", r"5"),
    (r"2ab", r"2a"),
    (r"\frac{1}{0}", r"0"),
    (r"1/0", r"\infty"),
    (r"9^{9^{9^9}}", r"9"),
    (r"99999999!", r"1"),
    (r"x", r""),
    (r"\text{}", r"0"),
    (r"(5)", r"-5"),
    (r"(0,100)", r"100"),
    (r"(1,200)", r"1200"),
    (r"\sqrt{x^2}", r"x"),
    (r"|x|", r"x"),
    (r"a", r"b"),
    (r"\unknown{3}", r"3x"),
    ("(" * 200, "x"),
    ("import os; os.system('true')", "x"),
    ("().__class__", "x"),
    ("__import__('os')", "0"),
    ("{" * 50 + "5", "5"),
    ("x" * 3000, "x"),
]


@pytest.mark.parametrize("given, wanted", SAME)
def test_spellings_of_one_answer_are_equal(given, wanted):
    assert same_answer(given, wanted) and same_answer(wanted, given)


@pytest.mark.parametrize("given, wanted", DIFFERENT)
def test_different_answers_are_different(given, wanted):
    assert not same_answer(given, wanted) and not same_answer(wanted, given)


def test_math_needs_a_box_in_the_response_but_not_in_the_label():
    assert grade_math(r"thus \boxed{12}", "12") and grade_math(r"\boxed{12}<|im_end|>", r"\boxed{12}")
    assert not grade_math("thus 12", "12")


def test_time_is_linear_in_the_length_of_the_response():
    # 100 times the text of the listed case: at the square of its time this would take a day.
    assert not grade_math("The answer is \\boxed{5, and then " * 100_000, "5")
    assert grade_math("\\boxed{4} {" * 100_000 + r"\boxed{5}" + " <|im_end|>" * 100_000, "5")


def test_no_text_of_a_model_reaches_pythons_eval():
    code = (
        "import slime.rollout.grading.algebra, sympy\nfor t in ('7', '1.5', '__import__(\"os\")', '1+1'):\n"
        "    try: print(repr(sympy.sympify(t)))\n    except (ValueError, sympy.SympifyError) as e: print('refused')\n"
    )
    assert run_python(code) == ["7", "1.50000000000000", "refused", "refused"]


def test_sympy_still_evaluates_a_text():
    """When this fails, slime.compat.sympy_text is obsolete."""
    assert run_python("import sympy\nprint(sympy.sympify('[].__class__.__name__'))") == ["list"]


def run_python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def test_expressions_that_differ_at_no_probed_point_are_judged_by_their_domain():
    assert not same_expression(r"\sqrt{x^2}", "x") and same_expression(r"\sqrt{x^2}", "|x|")
