"""One spelling for the many that an answer has: decoration, spaces, units, money, percent, fractions. Text in, text out."""

from __future__ import annotations

import re

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ",
        "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "°": r"^\circ ", "∅": r"\emptyset ",
        "√": r"\sqrt", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}", "²": "^2", "³": "^3", "±": r"\pm ", "\n": " ", "\t": " ", "£": "", "€": "", "¥": "",
        "\u00a0": " ", "\u2009": "", "\u202f": "",
    }
)  # fmt: skip
_NOTHING = re.compile(
    r"\\(?:left|right)\.|\\(?:left|right|displaystyle|textstyle|tiny|small|large|Large|LARGE|huge|Huge|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big|bigg|Bigg)(?![A-Za-z])"
    r"|\\!|\\limits(?![A-Za-z])|\\phantom\{[^{}]*\}"
)
_COMMANDS = (
    (re.compile(r"\\(?:[dtcs]|nice)frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:varnothing|O)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\leq(?:slant)?(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\geq(?:slant)?(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"\\(?:degree|textdegree)(?![A-Za-z])(?:\{\})?"), r"^\\circ "),
    (re.compile(r"\\(?:bold|bf|rm|it)(?![A-Za-z])"), " "),
    (re.compile(r"\\(?:mathrm|textbf|mathbf|textrm|textit|mathit|textnormal|mbox|textsf|mathsf|operatorname|boldsymbol|bm)\s*\{"),
     r"\\text{"),
    # Euler's number and the imaginary unit upright, and functions by their names.
    (re.compile(r"\\text\{\s*([ei])\s*\}"), r" \1"),
    (re.compile(r"\\text\{\s*((?:arc)?(?:sin|cos|tan|cot|sec|csc)|sinh|cosh|tanh|ln|log|exp|gcd|lcm|det)\s*\}"), r"\\\1 "),
    (re.compile(r"\\backslash(?![A-Za-z])"), r"\\setminus "),
    (re.compile(r"\\[bpB]matrix|(?<=\{)(?:[bB]|small)matrix(?=\})"), "pmatrix"),
    (re.compile(r"(?<!\\)\\(?:qquad|quad|,|;|:|>| )|~"), " "),
)  # fmt: skip
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_PERIOD = re.compile(r"(?<![\d.])(\d*\.\d{0,12}?)(?P<period>\d{1,12}?)(?P=period)+(?:\.{3}|…|\\(?:l|c)?dots(?![A-Za-z]))")
"""0.333... and 0.1212...: what is written twice goes on."""
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "₀₁₂₃₄₅₆₇₈₉₋₊"
_SMALL = str.maketrans(_RAISED + _LOWERED, "0123456789-+" * 2)
_SMALL_DIGITS = re.compile(f"[{_RAISED}]+|[{_LOWERED}]+")
_PLAIN = (
    (re.compile(r"\\(?:underline|boldmath|ensuremath)\s*(?=\{)|\\(?:text)?color\s*\{[^{}]*\}"), ""),
    (re.compile(r"^\s*(?:\\approx|\\text\s*\{\s*(?:approximately|about|roughly)\s*\})\s*"), ""),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\text\s*\{\s*([:;,])\s*\}"), r"\1"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"\\triangle(?![A-Za-z])"), r"\\Delta "),
    (re.compile(r"\b([ap])\.\s?m\.", re.IGNORECASE), r"\1m"),
    # A segment is named by its ends, with or without its bar; over digits a bar is a period.
    (re.compile(r"\\overline\s*\{\s*([A-Z]\s*[A-Z])\s*\}"), r"\1"),
    (re.compile(r"(?<=\d)\s*(?:st|nd|rd|th|\^\s*\{\s*(?:\\text\s*\{\s*)?(?:st|nd|rd|th)\s*\}?\s*\})\s*$"), ""),
    (re.compile(r"\\cdot\s*(\\text\s*\{\s*[A-Za-z]+\s*\})\s*\^\s*\{\s*-([1-9])\s*\}\s*$"), r"/\1^\2"),
    (re.compile(r"/(\\text\s*\{\s*[A-Za-z]+\s*\})\^1\s*$"), r"/\1"),
    (
        re.compile(rf"^\s*(?:\\text\s*\{{\s*)?({'|'.join(_WORDS)})\s*\}}?\s*$", re.IGNORECASE),
        lambda found: str(_WORDS.index(found[1].lower())),
    ),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\(?:lor|vee)(?![A-Za-z])"), r"\\text{or}"),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
)
"""What programs and word processors write."""
# {x | x > 2} is x > 2. Of numbers that are not all real, or with a second bar, it is left as it is.
_SET_BUILDER = re.compile(
    r"^(?:\\\{|\{)\s*[A-Za-z](?:\s*\\in\s*(?:\\mathbb\s*\{?\s*R\s*\}?|\\R))?\s*(?:\\mid|\\vert|\||:|\\colon)"
    r"(?P<condition>(?:(?!\\mid|\\in|\|).)+?)(?:\\\}|\})$"
)
# Equations below each other, but no cases of a function, which stand in columns.
_EQUATIONS = re.compile(r"\\begin\{(?:cases|aligned|gathered)\}((?:[^&]|&=)*)\\end\{(?:cases|aligned|gathered)\}")
_UPPER = ("<", r"\le")
_BETWEEN = re.compile(
    r"^\s*(?P<name>[A-Za-z])\s*(?P<one_sign>[<>]|\\[lg]e(?![A-Za-z]))(?P<one>[^<>=,;{}]+?)(?:\\text\s*\{\s*and\s*\}|\band\b|\\land\b)"
    r"\s*(?P=name)\s*(?P<other_sign>[<>]|\\[lg]e(?![A-Za-z]))(?P<other>[^<>=,;{}]+)$"
)
_SETS_OF_NUMBERS = (
    (
        re.compile(r"^\s*\\text\s*\{\s*(?:the\s+set\s+of\s+)?(?:all\s+)?(?:the\s+)?real(?:s|\s+numbers)\s*\}\s*$"),
        r"\\mathbb{R}",
    ),
    (
        re.compile(r"^\s*\\mathbb\s*\{?R\}?\s*(?:\^\s*\{?\s*\+\s*\}?|_\s*\{?\s*\+\s*\}?|_\s*\{\s*>\s*0\s*\})\s*$"),
        r"(0,\\infty)",
    ),
    # k \pi with k an integer: what k is, the question says.
    (re.compile(r"(?<=\S)\s*,\s*\(?[a-z]\s*\\in\s*\\mathbb\s*\{?[ZN]\}?\)?\s*$"), ""),
)
_FRENCH = re.compile(r"^([\[\](])([^\[\]]*[,;][^\[\]]*)([\[\])])$")
"""]0, 1[ for (0, 1)."""
_LIST_WORD = re.compile(r",?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s+(?:and|or)\s+", re.IGNORECASE)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_PERCENT = re.compile(r"\s*(?:\\%|%|\\text\s*\{\s*(?:percent|per cent|%|\\%)\s*\}|\bper\s?cent\b)", re.IGNORECASE)
_DEGREE = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))(?:\s*(?:\\text\s*\{\s*)?[CF]\b\s*\}?)?")
# Under a sine the sign is no decoration: 30 degrees are not 30.
_TRIGONOMETRIC = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc))\s*[({]?\s*(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))\s*[)}]?"
)
_LEADING = re.compile(
    r"^\s*(?:\\text\s*\{[^{}]*(?:\bis|=|:)\s*\}\s*[:=]?|\\text\s*\{\s*\([A-Ja-j]\)\s*\}(?=\s*[^\s,;])"
    r"|(?:\\text\s*\{\s*)?(?:USD|US|EUR|Rs\.?)(?:\s*\})?\s*(?=\d))\s*"
)

_UNIT_WORDS = (
    "degrees?|radians?|dollars?|cents?|units?|inch(?:es)?|in|feet|foot|ft|yards?|yd|miles?|mi|mph|kmph|hours?|hrs?|minutes?|mins?|"
    "seconds?|secs?|days?|weeks?|months?|years?|yrs?|meters?|metres?|centimeters?|centimetres?|millimeters?|kilometers?|"
    "kilometres?|mm|cm|km|dm|kg|mg|grams?|kilograms?|pounds?|lbs?|ounces?|oz|tons?|liters?|litres?|ml|gallons?|points?|people|"
    "persons?|students?|men|women|children|boys?|girls?|ways?|times|square|sq|cubic|cu|per|second|hour|minute|day|coins?|apples?|"
    "books?|cards?|balls?|marbles?|tickets?|pages?|bananas?|oranges?|cookies|rupees?|euros?|usd|rs|eur|integers?|numbers?|"
    "solutions?|values?|pairs?|triangles?|squares?|digits?|games?|students|cups?|bottles?|each|more|total|newtons?|joules?|watts?|"
    "volts?|amperes?|ohms?|hertz|hz|kelvin|moles?|mol"
)
_UNIT = re.compile(
    rf"(?P<number>[\d.}})\]])\s*(?P<unit>(?:(?:{_UNIT_WORDS})\b[\s./]*(?:\^\s*\{{?-?\d\}}?)?[\s./]*){{1,4}})\.?\s*$",
    re.IGNORECASE,
)
_UNIT_TEXT = re.compile(
    r"(?P<head>.*[\w.})\]])\s*(?P<unit>(?:\\text\s*\{[^{}]*\}\s*(?:\^\s*\{?-?\d\}?)?(?:[\s./]|\\cdot)*){1,4})$", re.DOTALL
)
_SAME_UNITS = (
    (r"inch(?:es)?", "in"), (r"feet|foot", "ft"), (r"mph", "mi/h"), (r"kmph", "km/h"),
    (r"centimet(?:er|re)s?", "cm"), (r"millimet(?:er|re)s?", "mm"), (r"kilomet(?:er|re)s?", "km"), (r"met(?:er|re)s?", "m"),
    (r"kilograms?", "kg"), (r"grams?", "g"), (r"hours?|hrs?", "h"), (r"minutes?|mins?", "min"), (r"seconds?|secs?", "s"),
    (r"years?|yrs?", "y"), (r"days?", "d"), (r"weeks?", "w"), (r"months?", "mo"), (r"miles?", "mi"), (r"yards?|yd", "yd"),
    (r"dollars?|usd", "dollar"), (r"cents?", "cent"), (r"pounds?|lbs?", "lb"), (r"ounces?", "oz"), (r"lit(?:er|re)s?", "l"),
)  # fmt: skip
_KNOWN_UNITS = {
    "in", "ft", "cm", "mm", "km", "m", "kg", "g", "h", "min", "s", "y", "d", "w", "mo", "mi", "yd", "dollar", "cent", "lb",
    "oz", "l",
}  # fmt: skip
_BASE_WORDS = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}


def _closed(text: str, opening: str, closing: str) -> bool:
    return len(text) >= len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing)


def _bare(text: str) -> str:
    """Without the signs of mathematics around it, and without the full stop behind it."""
    while True:
        before = text
        text = text.strip().removesuffix("\\\\")
        text = text.strip().rstrip(".,;").strip() if not text.rstrip().endswith("\\,") else text.strip()[:-2]
        for opening, closing in (("$$", "$$"), ("$", "$"), ("**", "**"), ("`", "`"), (r"\(", r"\)"), (r"\[", r"\]")):
            if _closed(text, opening, closing):
                text = text[len(opening) : len(text) - len(closing)]
        if text == before:
            return text


def _between(found: re.Match) -> str:
    """x > 3 and x < 5 as 3 < x < 5."""
    (low, below), (high, above) = sorted(
        ((found["one"], found["one_sign"]), (found["other"], found["other_sign"])), key=lambda bound: bound[1] in _UPPER
    )
    if (below in _UPPER) == (above in _UPPER):
        return found[0]
    turned = {">": "<", r"\ge": r"\le"}[below]
    return f"{low} {turned} {found['name']} {above} {high}"


def split_unit(text: str) -> tuple[str, str]:
    """(the text without the unit behind its number, the unit in one spelling or "" where there is none or it is not known)."""
    text = re.sub(r"(?<=[\d})])\s*\\frac\{\s*\\text\{([^{}]*)\}\s*\}\{\s*\\text\{([^{}]*)\}\s*\}\s*$", r"\\text{\1/\2}", text)
    found = _UNIT_TEXT.fullmatch(text)
    if found is not None and found["head"].strip():
        words = _TEXT.sub(r" \1 ", found["unit"])
        return found["head"].strip(), known_unit(words)
    found = _UNIT.search(text)
    if found is not None:
        return text[: found.start("unit")].strip(), known_unit(found["unit"])
    spaced = re.fullmatch(r"(.*\d)\s+([msghlLC])", text)  # a letter that touches its number is a variable: 5m, but 5 m
    if spaced is not None:
        return spaced[1], known_unit(spaced[2])
    return text, ""


def known_unit(words: str) -> str:
    """`cm^2`, `km/h`; "" where a part of it is not known."""
    parts = [_with_power(part) for part in re.split(r"/|\bper\b", words.strip(" ./\\").lower())]
    return "/".join(parts) if all(parts) else ""


def _with_power(words: str) -> str:
    found = re.fullmatch(
        r"\s*(?P<dimension>square|sq\.?|cubic|cu\.?)?\s*(?P<name>[a-z]+)\s*(?:\^\s*\{?(?P<power>-?\d)\}?)?[\s.]*", words
    )
    if found is None:
        return ""
    name = next((short for pattern, short in _SAME_UNITS if re.fullmatch(pattern, found["name"])), found["name"])
    power = found["power"] or {"s": "2", "c": "3"}.get((found["dimension"] or "1")[0], "1")
    known = all(part in _KNOWN_UNITS for part in name.split("/"))
    return "" if not known else name if power == "1" else f"{name}^{power}"


def has_period(answer: str) -> bool:
    return _PERIOD.search(answer) is not None


def normalise(answer: str, *, periods: bool = True) -> str:
    """The answer in one spelling, still LaTeX, with its unit and a % behind it if there was one.

    periods: whether digits that are written twice before three dots go on.
    """
    text = _SMALL_DIGITS.sub(lambda found: f"{'^' if found[0][0] in _RAISED else '_'}{{{found[0].translate(_SMALL)}}}", answer)
    text = _bare((_PERIOD.sub(r"\1\\overline{\2}", text) if periods else text).translate(_CHARACTERS))
    text = _NOTHING.sub("", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\;|\\:|\{\\,\})\s*(?=\d{3}(?!\d))", "", text)
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    text = text.replace("\\$", "").replace("$", "")
    for pattern, replacement in _SETS_OF_NUMBERS:
        text = pattern.sub(replacement, text)
    text = _BETWEEN.sub(_between, text)
    text = _LIST_WORD.sub(",", text)
    text = _PERCENT.sub("%", text)
    text = _DEGREE.sub("", _TRIGONOMETRIC.sub(r"\1(\2\\cdot \\pi/180)", text))
    text = _LEADING.sub("", text)
    text = _thousands(_bare(text))
    whole = _TEXT.fullmatch(text)
    if whole is not None:
        text = whole[1].strip()
    text = re.sub(r"^\(\s*([A-Za-z])\s*\)$", r"\1", text)
    text = _EQUATIONS.sub(lambda found: re.sub(r"\\\\", ",", found[1].replace("&=", "=").strip("\\ ")), text)
    text = _FRENCH.sub(lambda found: f"{found[1].replace(']', '(')}{found[2]}{found[3].replace('[', ')')}", text)
    text = _SET_BUILDER.sub(lambda found: found["condition"], text)
    return _fractions(_bases(_bare(text)))


def _thousands(text: str) -> str:
    if re.match(r"[(\[]|\\\{", text):
        return text  # (1,200) is a pair or an interval
    if re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", text):
        return text.replace(" ", "")
    return re.sub(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", lambda found: found[0].replace(",", ""), text)


def _bases(text: str) -> str:
    """52_{8}, 52_{\\text{eight}}, 52 base 8 -> 52_8."""
    found = re.fullmatch(r"([0-9A-Fa-f]+)\s*(?:_\s*\{?\s*(?:\\text\{)?\s*|\\text\{\s*|\s)(?:base[\s~-]*)?(\w+?)\s*\}*", text)
    if found is None or not ("_" in text or "base" in text):
        return text
    base = _BASE_WORDS.get(found[2].lower(), found[2])
    return f"{found[1]}_{base}" if base.isdigit() else text


def _fractions(text: str) -> str:
    # A mixed number first: the space in 1 13/17 is all that tells it from 113/17.
    text = re.sub(r"(?<![\w./^}])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w./])", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\binom\s*(\w)\s*(\w)", r"\\binom{\1}{\2}", text)
    text = re.sub(r"\\frac\s+\{", r"\\frac{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*(\w)(?!\w)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d+|\w)", r"\\sqrt{\1}", text)  # nobody who writes \sqrt 10 means the root of 1, times 0
    return re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
