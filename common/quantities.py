r"""Numbers as people and models write them, read exactly.

`1,200`, `$3.50`, `-3/4`, `−2` (Unicode minus), `3 1/2`, `3½`, `1.5e-3`, `2 \times 10^5`, `\frac{1}{2}`, `50%`, `033`,
`15 apples`, `5cm`, `90^\circ`. Several numbers, or one with a variable, are no quantity: `5x`, `3 or 4`, `1, 2`.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

_MINUS = dict.fromkeys(map(ord, "−﹣－‒–"), "-")  # noqa: RUF001 (they are meant)
_SLASHES = dict.fromkeys(map(ord, "⁄∕／"), "/")  # noqa: RUF001
_SPACES = dict.fromkeys(map(ord, "\u00a0\u2007\u2008\u3000"), " ") | dict.fromkeys(map(ord, "\u2009\u202f\u200b"), "")
_TRANSLATION = _MINUS | _SLASHES | _SPACES | {ord("％"): "%", ord("，"): ",", ord("．"): "."}  # noqa: RUF001
_LATEX = (  # in this order
    (re.compile(r"\\(?:left|right|displaystyle|,|!|;|:)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([%$#&_])"), r"\1"),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\s*(?:\^\s*\{\s*\\circ\s*\}|\^\s*\\circ|\\degree|°)"), " degrees"),
    (re.compile(r"\\ |~"), " "),
)
_CURRENCY = r"(?:US\$|[$€£¥₹₩]|USD\b|EUR\b|GBP\b)"
_PLAIN = r"(?:(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d{1,3}(?:['_]\d{3})+|\d+)(?![\d])(?:\.\d+)?|\.\d+)"
_POWER = r"(?:[eE][+-]?\d{1,3}(?!\w)|\s*(?:\\times|\\cdot|[×*x])\s*10\s*\^\s*\{?\s*-?\d{1,3}\s*\}?)"  # noqa: RUF001
_GROUP = rf"(?:\{{\s*-?\s*{_PLAIN}\s*\}}|\d)"
_LATEX_FRACTION = rf"\\frac\s*{_GROUP}\s*{_GROUP}"
_SLASHED = rf"(?<!/){_PLAIN}\s*/\s*\d[\d,]*(?![\d,]*[./]\d)"
_VALUE = rf"(?:{_LATEX_FRACTION}|\d+\s+{_SLASHED}|\d+\s*{_LATEX_FRACTION}|{_SLASHED}|{_PLAIN}{_POWER}?)"
_PERCENT = r"(?:\s*%|\s+per ?cent\b)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:{_CURRENCY}\s*)?(?P<inner>[+-]?)(?P<value>{_VALUE})(?P<percent>{_PERCENT})?"
    rf"(?:\s?{_CURRENCY})?"
)
_IN_TEXT = re.compile(rf"(?:(?<![\w.)\]}}])[+-](?:{_CURRENCY})?)?(?<!\d)(?:{_VALUE}){_PERCENT}?")
_LONGEST = 1000  # characters of a number; Python converts no more than 4,300 digits
# behind a number with no space between
_ATTACHED = re.compile(
    r"(?:[cmkµ]?m|[mkµ]?g|lbs?|oz|ft|in|mi|yd|[mµn]?s|sec|min|hrs?|h|[mc]?[lL]|kmh|mph|kph|[kMG]?Hz|[kM]?W|[kM]?J|k?Pa"
    r"|[kmM]?V|[AKCFN]|[KMGT]i?B|am|pm|AM|PM|st|nd|rd|th|k?cal|px|dB)(?:[\^²³/][\w^²³]*)?(?![\w^({\\])"
)
_NO_UNITS = {
    *(
        "or",
        "and",
        "to",
        "plus",
        "minus",
        "times",
        "mod",
        "over",
        "divided",
        "pi",
        "sqrt",
        "log",
        "ln",
        "sin",
        "cos",
        "tan",
    ),
    *"abcdefijknopqrtuvwxyzBDEGHIMOPQRSUXYZ",  # variables; the other letters are units
}
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_UNIT = re.compile(r"[^\W\d_][^\s\d,;:!?=+*<>(){}\[\]]*(?:\^\{?\d\}?)?")
# more numbers, so that the first one is not the answer
_GOES_ON = re.compile(r"\s*[,;]?\s*(?:and|or|to)?\s*[-$]?\d")
_BREAK = re.compile(r"[.,;:!?)\]*\"'\s]*(?:$|\s*[(\[\n<]|\s+[-—:]\s+[^\W\d_]{2}|[.,;:!?)]\s)")


@dataclass(frozen=True)
class Quantity:
    """`percent`: the value was followed by a percent sign; `unit`: the words behind it, in lower case."""

    value: Fraction
    percent: bool
    unit: str

    def equals(self, other: Quantity) -> bool:
        """Whether both are the same; `50%` is 0.5 and, as people leave the sign out, also 50."""
        if not _same_unit(self.unit, other.unit):
            return False
        if self.value == other.value:
            return True
        return (self.percent and self.value / 100 == other.value) or (other.percent and self.value == other.value / 100)


def plain(text: str) -> str:
    r"""With ASCII digits, minus signs and spaces, and without LaTeX's spacing, `\text{}` and variants of fractions."""
    text = "".join(_ascii(c) for c in text).translate(_TRANSLATION)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text.strip()


def quantity(text: str) -> Quantity | None:
    """The quantity that a whole text is; `text` as `plain` gives it."""
    found = _NUMBER.match(text)
    if not found or len(found["value"]) > _LONGEST:
        return None
    rest = text[found.end() :]
    unit = _whole_unit(rest.rstrip(" ."))
    if unit is None:
        return None
    scale, _, what = unit.partition(" ")
    value = _value(found) * 10 ** _SCALES.get(scale, 0)
    return Quantity(value, bool(found["percent"]), what if scale in _SCALES else unit)


def leading_quantity(text: str) -> str | None:
    """The quantity that a text begins with, when a remark follows; None where mathematics goes on behind it."""
    found = _NUMBER.match(text)
    if not found:
        return None
    rest = text[found.end() :]
    if _GOES_ON.match(rest):
        return None
    if _BREAK.match(rest):
        return found[0].strip()
    words = re.split(r"[.,;:!?]\s|[.,;:!?]$|\s[(\[]|\n|<", rest, maxsplit=1)[0]
    if _whole_unit(words) is not None:
        return (found[0] + words).strip()
    first = _UNIT.match(rest.lstrip())
    follows_word = rest[:1].isspace() and first and len(first[0]) > 1 and first[0].lower() not in _NO_UNITS
    return found[0].strip() if follows_word else None


def last_quantity(text: str) -> str | None:
    """The last number of a text."""
    found = _IN_TEXT.findall(text)
    return found[-1].strip() if found else None


def _ascii(character: str) -> str:
    if character.isascii():
        return character
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if "VULGAR FRACTION" in unicodedata.name(character, ""):
        return " " + unicodedata.normalize("NFKC", character)
    return character


def _value(found: re.Match[str]) -> Fraction:
    text, sign = found["value"], -1 if "-" in (found["sign"], found["inner"]) else 1
    if "frac" in text or "/" in text:
        whole, numerator, denominator = _fraction_parts(text)
        return sign * (whole + numerator / denominator) if denominator else Fraction(0)
    number, _, power = re.sub(r"\s*(?:\\times|\\cdot|[×*x])\s*10\s*\^", "e", text).partition("e")  # noqa: RUF001
    number, _, exponent = (number, "", power) if power else text.replace("E", "e").partition("e")
    return sign * _decimal(number) * Fraction(10) ** int(exponent.strip(" {}") or 0)


def _fraction_parts(text: str) -> tuple[Fraction, Fraction, Fraction]:
    """Whole part, numerator and denominator."""
    whole, latex, rest = text.partition("\\frac")
    if latex:
        numbers = re.findall(rf"\{{\s*(-?\s*{_PLAIN})\s*\}}|(\d)", rest)
        numerator, denominator = (_decimal((braced or digit).replace(" ", "")) for braced, digit in numbers)
        return _decimal(whole) if whole.strip() else Fraction(0), numerator, denominator
    above, _, below = text.partition("/")
    *leading, numerator_text = above.split()
    return _decimal(leading[0]) if leading else Fraction(0), _decimal(numerator_text), _decimal(below)


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub(r"[,'_\s]", "", text))


def _whole_unit(rest: str) -> str | None:
    """The unit that stands behind a number, empty: none; None where it is something else."""
    if not rest.strip():
        return ""
    if not rest[0].isspace():
        return rest.lower() if _ATTACHED.fullmatch(rest) else None
    words = rest.split()
    if any(word.lower() in _NO_UNITS or word in _NO_UNITS for word in words[:1]):
        return None
    return " ".join(words).lower() if all(_UNIT.fullmatch(word) for word in words) else None


def _same_unit(a: str, b: str) -> bool:
    """Whether two units may be the same: one is left out, they share a word, or one abbreviates the other."""
    first, second = ({_stem(word) for word in unit.replace("/", " ").split()} for unit in (a, b))
    return not first or not second or bool(first & second) or a.startswith(b) or b.startswith(a)


def _stem(word: str) -> str:
    return word.rstrip(".").removesuffix("s") or word
