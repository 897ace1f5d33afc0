"""What the graders are worth: agreement with math-verify on generated pairs, and verdicts a second.

    python3 -m tools.bench.graders agree [--pairs 10000] [--seed 0] [--show 3]
    python3 -m tools.bench.graders speed [--workers 1 16] [--seconds 20]

`agree` makes pairs of a label and an answer in the spellings of MATH and its relatives, half of them the same value, half a
near miss, so the right verdict is known; it prints where our verdict, math-verify's and the right one differ, by kind.
`speed` grades such pairs through the pool, as a rollout does, with so many workers.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    kind: str
    label: str
    answer: str
    same: bool


Spell = Callable[[random.Random], tuple[str, str, str]]
"""-> (label, another spelling of it, a near miss)."""


def _frac(a: int, b: int, r: random.Random) -> str:
    sign, a = ("-" if a < 0 else ""), abs(a)
    forms = [rf"{sign}\frac{{{a}}}{{{b}}}", rf"{sign}\dfrac{{{a}}}{{{b}}}", f"{sign}{a}/{b}", rf"{sign}\tfrac{{{a}}}{{{b}}}"]
    if a < 10 and b < 10:
        forms.append(rf"{sign}\frac{a}{b}")
    return r.choice(forms)


def _other(value: int, r: random.Random) -> int:
    return r.choice([value + 1, value - 1, -value if value else 2, value * 10 if value else 3])


def integer(r: random.Random) -> tuple[str, str, str]:
    n = r.randint(-999, 999)
    forms = [f"{n}", f"{n}.0", f"{n}.", rf"${n}$", rf"\text{{{n}}}", f" {n} "]
    return str(n), r.choice(forms), str(_other(n, r))


def thousands(r: random.Random) -> tuple[str, str, str]:
    n = r.randint(1000, 9_999_999)
    plain, comma = str(n), f"{n:,}"
    forms = [plain, comma, comma.replace(",", "{,}"), comma.replace(",", r",\!"), comma.replace(",", r"\,")]
    return r.choice([plain, comma]), r.choice(forms), r.choice([f"{n + 1:,}", str(n + 100), f"{n * 10:,}"])


def decimal(r: random.Random) -> tuple[str, str, str]:
    n, places = r.randint(1, 9999), r.randint(1, 3)
    value = n / 10**places
    text = f"{value:.{places}f}"
    forms = [text, text + "0", text.removeprefix("0") if text.startswith("0.") else text, rf"{text}\!"]
    return text, r.choice(forms), f"{value + 10**-places:.{places}f}"


def fraction(r: random.Random) -> tuple[str, str, str]:
    a, b, k = r.randint(-30, 30) or 1, r.randint(2, 30), r.randint(1, 3)
    return _frac(a, b, r), _frac(a * k, b * k, r), _frac(_other(a, r), b, r)


def fraction_as_decimal(r: random.Random) -> tuple[str, str, str]:
    a, b = r.randint(1, 60), r.choice([2, 4, 5, 8, 10, 20])
    text = f"{a / b:g}"
    return _frac(a, b, r), text, f"{a / b + 0.01:g}"


def mixed(r: random.Random) -> tuple[str, str, str]:
    w, b = r.randint(1, 12), r.choice([2, 3, 4, 5, 6, 7, 8, 9, 11, 12])
    a = r.randint(1, b - 1)
    label = rf"{w}\frac{{{a}}}{{{b}}}"
    forms = [label, rf"{w}\ \frac{{{a}}}{{{b}}}", rf"{w} \tfrac{{{a}}}{{{b}}}", _frac(w * b + a, b, r), f"{w} {a}/{b}"]
    return label, r.choice(forms), r.choice([rf"{w + 1}\frac{{{a}}}{{{b}}}", _frac(a, b, r), _frac(10 * w + a, b, r)])


def root(r: random.Random) -> tuple[str, str, str]:
    a, n = r.randint(2, 9), r.choice([2, 3, 5, 6, 7, 10])
    forms = [
        rf"{a}\sqrt{{{n}}}",
        rf"\sqrt{{{a * a * n}}}",
        rf"{a}\sqrt {n}",
        rf"{a} \cdot \sqrt{{{n}}}",
        rf"\sqrt{{{n}}}\cdot{a}",
    ]
    misses = [rf"{a}\sqrt{{{n + 1}}}", rf"{a + 1}\sqrt{{{n}}}", str(a), rf"\sqrt{{{a * n}}}", rf"-{a}\sqrt{{{n}}}"]
    return rf"{a}\sqrt{{{n}}}", r.choice(forms), r.choice(misses)


def rationalised(r: random.Random) -> tuple[str, str, str]:
    n, b = r.choice([2, 3, 5, 7]), r.randint(1, 6)
    return rf"\frac{{{b}}}{{\sqrt{{{n}}}}}", rf"\frac{{{b}\sqrt{{{n}}}}}{{{n}}}", rf"\frac{{{b}\sqrt{{{n}}}}}{{{n + 1}}}"


def pi(r: random.Random) -> tuple[str, str, str]:
    a, b = r.randint(1, 20), r.randint(2, 9)
    forms = [
        rf"\frac{{{a}\pi}}{{{b}}}",
        rf"\frac{{{a}}}{{{b}}}\pi",
        rf"{a}\pi/{b}",
        rf"\pi \cdot \frac{{{a}}}{{{b}}}",
        f"{a}π/{b}",
    ]
    return rf"\frac{{{a}\pi}}{{{b}}}", r.choice(forms), r.choice([rf"\frac{{{a + 1}\pi}}{{{b}}}", rf"\frac{{{a}}}{{{b}}}"])


def polynomial(r: random.Random) -> tuple[str, str, str]:
    a, b = r.randint(1, 9), r.randint(1, 9)
    expanded = f"x^2+{a + b}x+{a * b}"
    forms = [f"(x+{a})(x+{b})", f"{a * b}+{a + b}x+x^2", rf"x^{{2}} + {a + b} x + {a * b}", f"x(x+{a + b})+{a * b}"]
    return expanded, r.choice(forms), r.choice([f"(x+{a})(x+{b + 1})", f"x^2+{a + b}x-{a * b}", f"x^3+{a + b}x+{a * b}"])


def linear(r: random.Random) -> tuple[str, str, str]:
    a, b = r.sample(range(2, 10), 2)
    return f"{a}x+{b}", r.choice([f"{b}+{a}x", f"{b} + {a} x", rf"{a}\cdot x+{b}"]), r.choice([f"{a}x-{b}", f"{b}x+{a}"])


def percent(r: random.Random) -> tuple[str, str, str]:
    n = r.randint(1, 99)
    return rf"{n}\%", r.choice([rf"{n}\%", f"{n}%", str(n), rf"{n}\text{{ percent}}", rf"{n} \%"]), rf"{n + 1}\%"


def degrees(r: random.Random) -> tuple[str, str, str]:
    n = r.randint(1, 179)
    forms = [rf"{n}^\circ", rf"{n}^{{\circ}}", f"{n}°", rf"{n}\text{{ degrees}}", str(n)]
    return r.choice([str(n), rf"{n}^\circ"]), r.choice(forms), rf"{n + 1}^\circ"


def money(r: random.Random) -> tuple[str, str, str]:
    n = r.randint(1, 99_999)
    forms = [rf"\${n}", rf"\${n:,}", rf"{n}\text{{ dollars}}", str(n), rf"\$ {n}.00"]
    return r.choice([str(n), rf"\${n}"]), r.choice(forms), rf"\${n + 1}"


def units(r: random.Random) -> tuple[str, str, str]:
    n, unit = r.randint(1, 500), r.choice(["cm", "inches", "square units", "miles per hour", "cm^2", "hours", "feet"])
    forms = [rf"{n}\text{{ {unit}}}", rf"{n}\ \text{{{unit}}}", rf"{n}~\mathrm{{{unit}}}", str(n)]
    return r.choice([str(n), rf"{n}\text{{ {unit}}}"]), r.choice(forms), rf"{n + 1}\text{{ {unit}}}"


def pair(r: random.Random) -> tuple[str, str, str]:
    a, b = r.randint(-9, 9), r.randint(10, 20)
    forms = [f"({a},{b})", f"({a}, {b})", rf"\left({a}, {b}\right)", rf"({a}, \frac{{{2 * b}}}{{2}})", f"({a}.0,{b})"]
    return f"({a},{b})", r.choice(forms), r.choice([f"({b},{a})", f"({a},{b + 1})", f"[{a},{b}]"])


def triple(r: random.Random) -> tuple[str, str, str]:
    a, b, c = (r.randint(-9, 9) for _ in range(3))
    return f"({a},{b},{c})", rf"\left({a}, {b}, {c}\right)", f"({a},{b},{c + 1})"


def interval(r: random.Random) -> tuple[str, str, str]:
    a, b = r.randint(-9, 0), r.randint(1, 9)
    left, right = r.choice("(["), r.choice(")]")
    label = f"{left}{a},{b}{right}"
    forms = [label, rf"\left{left}{a}, {b}\right{right}", rf"x \in {label}"]
    flipped = f"{'[' if left == '(' else '('}{a},{b}{right}"
    return label, r.choice(forms), r.choice([flipped, f"{left}{a},{b + 1}{right}"])


def ray(r: random.Random) -> tuple[str, str, str]:
    a = r.randint(-9, 9)
    return (
        rf"(-\infty,{a})",
        r.choice([rf"(-\infty, {a})", rf"x \in (-\infty,{a})", rf"\left(-\infty,{a}\right)"]),
        rf"(-\infty,{a}]",
    )


def union(r: random.Random) -> tuple[str, str, str]:
    a, b = r.randint(-9, 0), r.randint(1, 9)
    label = rf"(-\infty,{a})\cup({b},\infty)"
    return label, rf"\left(-\infty, {a}\right) \cup \left({b}, \infty\right)", rf"(-\infty,{a}]\cup({b},\infty)"


def roots_list(r: random.Random) -> tuple[str, str, str]:
    a, b = r.sample(range(-20, 20), 2)
    forms = [f"{a},{b}", f"{b}, {a}", rf"{a} \text{{ and }} {b}", rf"{b}\text{{ or }}{a}", f"x={a}, x={b}"]
    return f"{a},{b}", r.choice(forms), r.choice([f"{a},{b + 1}", str(a), f"[{a},{b}]"])


def braces(r: random.Random) -> tuple[str, str, str]:
    a, b, c = r.sample(range(-20, 20), 3)
    return rf"\{{{a},{b},{c}\}}", rf"\left\{{{c}, {a}, {b}\right\}}", rf"\{{{a},{b},{c + 50}\}}"


def assignment(r: random.Random) -> tuple[str, str, str]:
    name, n = r.choice("xyzkn"), r.randint(-50, 50)
    return r.choice([str(n), f"{name}={n}"]), r.choice([f"{name} = {n}", f"{name}={n}", str(n)]), f"{name}={_other(n, r)}"


def line(r: random.Random) -> tuple[str, str, str]:
    m, b = r.randint(2, 9), r.randint(1, 9)
    return f"y={m}x+{b}", r.choice([f"y = {m}x + {b}", f"y={b}+{m}x", f"{m}x+{b}", f"{m}x - y + {b} = 0"]), f"y={m}x-{b}"


def inequality(r: random.Random) -> tuple[str, str, str]:
    a = r.randint(-9, 9)
    return (
        rf"x \ge {a}",
        r.choice([rf"x \geq {a}", rf"{a} \le x", rf"x\ge{a}", rf"[{a},\infty)"]),
        r.choice([f"x > {a}", rf"x \le {a}"]),
    )


def matrix(r: random.Random) -> tuple[str, str, str]:
    a, b, c, d = (r.randint(-9, 9) for _ in range(4))
    label = rf"\begin{{pmatrix}} {a} & {b} \\ {c} & {d} \end{{pmatrix}}"
    forms = [rf"\begin{{pmatrix}}{a}&{b}\\{c}&{d}\end{{pmatrix}}", rf"\begin{{bmatrix}} {a} & {b} \\ {c} & {d} \end{{bmatrix}}"]
    return label, r.choice(forms), rf"\begin{{pmatrix}} {a} & {b} \\ {c} & {d + 1} \end{{pmatrix}}"


def scientific(r: random.Random) -> tuple[str, str, str]:
    m, e = r.randint(11, 99) / 10, r.randint(2, 7)
    forms = [rf"{m}\times 10^{{{e}}}", rf"{m} \cdot 10^{e}", str(round(m * 10**e)), f"{m}e{e}"]
    return rf"{m} \times 10^{{{e}}}", r.choice(forms), rf"{m}\times 10^{{{e + 1}}}"


def complex_number(r: random.Random) -> tuple[str, str, str]:
    a, b = r.randint(1, 9), r.randint(2, 9)
    return (
        f"{a}+{b}i",
        r.choice([f"{b}i+{a}", f"{a} + {b} i", f"{a}+{b}i"]),
        r.choice([f"{a}-{b}i", f"{b}+{a}i" if a != b else "i"]),
    )


def base(r: random.Random) -> tuple[str, str, str]:
    b = r.choice([5, 6, 7, 8])
    n = "".join(str(r.randint(1, b - 1)) for _ in range(3))
    return f"{n}_{b}", r.choice([f"{n}_{{{b}}}", f"{n}_{b}", n]), f"{int(n) + 1}_{{{b}}}"


def word(r: random.Random) -> tuple[str, str, str]:
    words = ["even", "odd", "Monday", "yes", "no", "ellipse", "parabola", "Evelyn", "circle", "neither"]
    label, miss = r.sample(words, 2)
    return (
        rf"\text{{{label}}}",
        r.choice([rf"\text{{{label}}}", label, rf"\textbf{{{label}}}", rf"\text{{{label.lower()}}}"]),
        miss,
    )


def letter(r: random.Random) -> tuple[str, str, str]:
    label, miss = r.sample("ABCDE", 2)
    return label, r.choice([label, rf"\text{{{label}}}", f"({label})", rf"\text{{({label})}}", rf"\mathrm{{{label}}}"]), miss


def counting(r: random.Random) -> tuple[str, str, str]:
    import math

    n = r.randint(4, 9)
    k = r.randint(2, n - 2)
    value = math.comb(n, k)
    return (
        str(value),
        r.choice([rf"\binom{{{n}}}{{{k}}}", rf"\dbinom{{{n}}}{{{k}}}", rf"\frac{{{n}!}}{{{k}!{n - k}!}}"]),
        rf"\binom{{{n + 1}}}{{{k}}}",
    )


def power(r: random.Random) -> tuple[str, str, str]:
    b, e = r.randint(2, 5), r.randint(2, 8)
    return str(b**e), r.choice([f"{b}^{e}", rf"{b}^{{{e}}}", str(b**e)]), f"{b}^{e + 1}"


def constant(r: random.Random) -> tuple[str, str, str]:
    rows = [
        (r"\frac{\sqrt{3}}{2}", r"\sin\frac{\pi}{3}", r"\cos\frac{\pi}{3}"), ("3", r"\log_2 8", r"\log_2 9"),
        (r"2\ln 3", r"\ln 9", r"\ln 6"), (r"\frac{1}{e}", "e^{-1}", "e"), ("1", r"\tan\frac{\pi}{4}", r"\tan\frac{\pi}{6}"),
        (r"\frac{1+\sqrt{5}}{2}", r"\frac{\sqrt5+1}{2}", r"\frac{1-\sqrt{5}}{2}"), ("2", r"\sqrt[3]{8}", r"\sqrt[3]{9}"),
        (r"3-2\sqrt{2}", r"(\sqrt{2}-1)^2", r"(\sqrt{2}+1)^2"),
        (r"\frac{1}{2006!}", r"\frac{1}{2006 \cdot 2005!}", r"\frac{1}{2004!}"),
    ]  # fmt: skip
    return r.choice(rows)


def plus_minus(r: random.Random) -> tuple[str, str, str]:
    n = r.randint(1, 20)
    return rf"\pm {n}", r.choice([rf"\pm{n}", f"{n},-{n}", f"-{n}, {n}"]), r.choice([str(n), f"-{n}", rf"\pm {n + 1}"])


def two_variables(r: random.Random) -> tuple[str, str, str]:
    a, b = r.randint(2, 9), r.randint(2, 9)
    return f"{a}a^2b+{b}ab", r.choice([f"{b}ab+{a}a^2b", f"ab({a}a+{b})", f"{a}ba^2 + {b}ba"]), f"{a}ab^2+{b}ab"


KINDS: tuple[Spell, ...] = (
    integer, thousands, decimal, fraction, fraction_as_decimal, mixed, root, rationalised, pi, polynomial, linear, percent,
    degrees, money, units, pair, triple, interval, ray, union, roots_list, braces, assignment, line, inequality, matrix,
    scientific, complex_number, base, word, letter, counting, power, constant, plus_minus, two_variables,
)  # fmt: skip


def pairs(count: int, seed: int) -> list[Pair]:
    """The same for the same seed; every kind equally often."""
    r = random.Random(seed)
    made = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        label, same, miss = kind(r)
        made.append(Pair(kind.__name__, label, same, True) if r.random() < 0.5 else Pair(kind.__name__, label, miss, False))
    return made


def by_math_verify(one: Pair) -> bool:
    """As its README calls it: the label between dollars, the answer in a box."""
    from math_verify import parse, verify

    return verify(parse(f"${one.label}$"), parse(rf"\boxed{{{one.answer}}}"))


def agree(count: int, seed: int, show: int) -> None:
    made = pairs(count, seed)
    theirs = [by_math_verify(one) for one in made]  # before ours: grading shuts the part of sympy that its parse() uses
    from slime.rollout.grading.mathematics import same_answer

    ours = [same_answer(one.answer, one.label) for one in made]
    apart: dict[tuple[str, bool, bool, bool], list[Pair]] = defaultdict(list)
    for one, our, their in zip(made, ours, theirs, strict=True):
        if our != their or our != one.same:
            apart[one.kind, one.same, our, their].append(one)
    wrong = Counter({"ours": sum(o != p.same for o, p in zip(ours, made, strict=True))})
    wrong["math-verify"] = sum(t != p.same for t, p in zip(theirs, made, strict=True))
    differ = sum(o != t for o, t in zip(ours, theirs, strict=True))
    print(f"{count} pairs, seed {seed}: {differ} verdicts differ ({100 * differ / count:.2f} %)")
    print(f"wrong by construction: ours {wrong['ours']}, math-verify {wrong['math-verify']}")
    for (kind, same, our, their), found in sorted(apart.items(), key=lambda item: -len(item[1])):
        print(f"{len(found):5d} {kind}: right {same}, ours {our}, math-verify {their}")
        for one in found[:show]:
            print(f"        label {one.label}    answer {one.answer}")


async def _speed(workers: int, seconds: float) -> tuple[float, float]:
    """(verdicts a second, seconds measured), on pairs that no worker has seen."""
    from slime.rollout.grading.pool import Pool
    from slime.rollout.grading.question import Question

    def questions(seed: int) -> list[Question]:
        text = r"<think>...</think> so \boxed{%s}<|im_end|>"
        return [Question("math", text % one.answer, one.label, {}) for one in pairs(10 * len(KINDS), seed)]

    pool = Pool(workers)
    rounds = [questions(seed) for seed in range(1, 200)]
    await asyncio.gather(*(pool.grade(question, 60) for question in rounds.pop(0)))  # every worker is up and warm
    started, done = time.monotonic(), 0
    while rounds and time.monotonic() - started < seconds:
        done += len(await asyncio.gather(*(pool.grade(question, 60) for question in rounds.pop(0))))
    took = time.monotonic() - started
    pool.close()
    return done / took, took


def speed(workers: list[int], seconds: float) -> None:
    import os

    for count in workers:
        rate, took = asyncio.run(_speed(count, seconds))
        print(f"{count} workers on {os.cpu_count()} cores: {rate:.0f} verdicts a second over {took:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    agreement = commands.add_parser("agree")
    agreement.add_argument("--pairs", type=int, default=10_000)
    agreement.add_argument("--seed", type=int, default=0)
    agreement.add_argument("--show", type=int, default=3)
    rate = commands.add_parser("speed")
    rate.add_argument("--workers", type=int, nargs="+", default=[1, 16])
    rate.add_argument("--seconds", type=float, default=20)
    args = parser.parse_args()
    if args.command == "agree":
        agree(args.pairs, args.seed, args.show)
    else:
        speed(args.workers, args.seconds)


if __name__ == "__main__":
    main()
