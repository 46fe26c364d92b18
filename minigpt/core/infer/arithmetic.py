"""A calculator that a model may use: what it writes is parsed and worked out here, never run.

A parser by precedence (Pratt, 1973, "Top down operator precedence"). Numbers are fractions, so 0.1 + 0.2 is 0.3; only
roots, powers and functions that are no fractions are rounded to 53 bits. Lengths, depths and sizes are bounded: no
expression takes longer than a few milliseconds.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

LONGEST = 1000  # characters
_DEEPEST = 50  # parentheses, signs and powers within each other
_BITS = 1024  # of numerators and denominators: about the range of a float
_DIGITS = 12  # that are shown of what is no whole number
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)|(?P<name>(?:math\.)?[a-z][a-z0-9]*)|(?P<mark>\*\*|//|[-+*/%^(),!√]))",
    re.IGNORECASE,
)
_SPELLINGS = str.maketrans(
    {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "²": "^2", "³": "^3", "π": "pi", "，": ",", "、": ","}
)

Function = Callable[..., Fraction]


def calculate(expression: str) -> int | float:
    """The value of + - * / // % ** ^ ! √, parentheses, numbers, FUNCTIONS and CONSTANTS.

    ^ is a power, % the remainder, // the quotient rounded down. Angles are radians. A value that is no whole number
    is rounded to 12 digits. ValueError says in words what cannot be worked out.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression is longer than {LONGEST:,} characters")
    parser = _Parser(_tokens(expression))
    try:
        value = parser.expression(0)
        parser.expect("")
        return shown(value)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("the number is too large") from None


def shown(value: Fraction) -> int | float:
    """A whole number as it is, any other to 12 digits."""
    return value.numerator if value.denominator == 1 else float(f"{float(value):.{_DIGITS}g}")


def _tokens(expression: str) -> list[str]:
    text = unicodedata.normalize("NFKC", expression.translate(_SPELLINGS)).rstrip()  # also full-width digits and signs
    tokens, at = [], 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise ValueError(f"{text[at:].split()[0][:20]!r} is no number, operator or function")
        tokens.append(found[found.lastgroup or 0].lower().removeprefix("math."))
        at = found.end()
    return [*tokens, ""]


class _Parser:
    """Reads tokens, an empty one at the end, and works out their value on the way."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.at = 0
        self.depth = 0

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def expect(self, wanted: str) -> None:
        found = self.take()
        if found != wanted:
            raise ValueError(f"{_told(found)} where {_told(wanted)} should be")

    def expression(self, least: int) -> Fraction:
        """The value of what follows, up to an operator that binds less than `least`."""
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} levels within each other")
        value = self.operand()
        while True:
            operator = self.tokens[self.at]
            if operator == "!":
                self.at += 1
                value = _factorial(value)
            elif operator in _OPERATORS and _OPERATORS[operator][0] >= least:
                self.at += 1
                binds, work = _OPERATORS[operator]
                # a power groups to the right: 2^3^2 is 2^(3^2)
                value = _bounded(work(value, self.expression(binds if work is _power else binds + 1)))
            else:
                self.depth -= 1
                return value

    def operand(self) -> Fraction:
        token = self.take()
        if token[:1].isdigit() or token[:1] == ".":
            return _number(token)
        if token in ("-", "+"):
            value = self.expression(_SIGN)
            return -value if token == "-" else value
        if token == "√":
            return _bounded(_root(self.expression(_POWER)))
        if token == "(":
            value = self.expression(0)
            self.expect(")")
            return value
        if token in CONSTANTS:
            return CONSTANTS[token]
        if token in FUNCTIONS:
            return self.application(token)
        if token[:1].isalpha():
            raise ValueError(f"there is no {token}; there are {', '.join([*FUNCTIONS, *CONSTANTS])}")
        raise ValueError(f"{_told(token)} where a number should be")

    def application(self, name: str) -> Fraction:
        """What a function gives for the arguments in parentheses that follow."""
        self.expect("(")
        arguments = [self.expression(0)]
        while self.tokens[self.at] == ",":
            self.at += 1
            arguments.append(self.expression(0))
        self.expect(")")
        fewest, most, work = FUNCTIONS[name]
        if not fewest <= len(arguments) <= most:
            raise ValueError(f"{name} does not take {len(arguments)} arguments")
        return _bounded(work(*arguments))


def _told(token: str) -> str:
    return repr(token) if token else "the end"


# ------------------------------------------------------------------------------------------------ numbers


def _number(token: str) -> Fraction:
    _, _, exponent = token.partition("e")
    if exponent and abs(int(exponent)) > 400:  # before so many digits are written out
        raise ValueError("the number is too large or too small")
    return _bounded(Fraction(token))


def _bounded(value: Fraction) -> Fraction:
    """The value itself, or rounded where its digits have become too many. OverflowError when it is too large."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) <= _BITS:
        return value
    return _rounded(float(value))


def _rounded(value: float) -> Fraction:
    """A float as the decimal it stands for: its last digit is noise, and log(1000, 10) would not be 3."""
    return Fraction(f"{value:.15g}")


def _whole(value: Fraction, what: str) -> int:
    if value.denominator != 1:
        raise ValueError(f"{what} takes whole numbers")
    return value.numerator


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    fewest = (max(base.numerator.bit_length(), base.denominator.bit_length()) - 1) * abs(exponent)  # bits of the result
    if exponent.denominator == 1 and fewest <= _BITS:
        return base**exponent.numerator
    if base < 0 and exponent.denominator != 1:
        raise ValueError("a power of a negative number with a fraction as exponent is no real number")
    return _rounded(float(base) ** float(exponent))


def _root(value: Fraction) -> Fraction:
    """Exact where there is an exact root."""
    if value < 0:
        raise ValueError("the square root of a negative number is no real number")
    roots = math.isqrt(value.numerator), math.isqrt(value.denominator)
    if roots[0] ** 2 == value.numerator and roots[1] ** 2 == value.denominator:
        return Fraction(*roots)
    return _rounded(math.sqrt(value))


def _factorial(value: Fraction) -> Fraction:
    number = _whole(value, "a factorial")
    if not 0 <= number <= 170:
        raise ValueError("a factorial takes whole numbers from 0 to 170")
    return Fraction(math.factorial(number))


def _round(value: Fraction, digits: Fraction = Fraction(0)) -> Fraction:
    """To the nearest; a half goes to the even neighbour, as Python's does."""
    return Fraction(round(value, max(-400, min(400, _whole(digits, "round")))))


def _float(function: Callable[..., float]) -> Function:
    """A function of floats. ValueError outside of where it is defined."""

    def work(*values: Fraction) -> Fraction:
        try:
            return _rounded(function(*map(float, values)))
        except ValueError:
            raise ValueError(f"{function.__name__} is not defined for {', '.join(map(_short, values))}") from None

    return work


def _cbrt(value: float) -> float:
    return math.copysign(abs(value) ** (1 / 3), value)


def _short(value: Fraction) -> str:
    return f"{float(value):.6g}"


_SUM, _PRODUCT, _SIGN, _POWER = 1, 3, 5, 6  # how strongly operators bind; -2^2 is -4
_OPERATORS: dict[str, tuple[int, Function]] = {
    "+": (_SUM, lambda a, b: a + b),
    "-": (_SUM, lambda a, b: a - b),
    "*": (_PRODUCT, lambda a, b: a * b),
    "/": (_PRODUCT, lambda a, b: a / b),
    "//": (_PRODUCT, lambda a, b: Fraction(a // b)),
    "%": (_PRODUCT, lambda a, b: a % b),
    "**": (_POWER, _power),
    "^": (_POWER, _power),
}
_ANY = 100
FUNCTIONS: dict[str, tuple[int, int, Function]] = {  # fewest and most arguments
    "sqrt": (1, 1, _root),
    "cbrt": (1, 1, _float(_cbrt)),
    "abs": (1, 1, abs),
    "round": (1, 2, _round),
    "floor": (1, 1, lambda x: Fraction(math.floor(x))),
    "ceil": (1, 1, lambda x: Fraction(math.ceil(x))),
    "min": (1, _ANY, lambda *xs: min(xs)),
    "max": (1, _ANY, lambda *xs: max(xs)),
    "sum": (1, _ANY, lambda *xs: sum(xs, Fraction(0))),
    "pow": (2, 2, _power),
    "factorial": (1, 1, _factorial),
    "gcd": (1, _ANY, lambda *xs: Fraction(math.gcd(*(_whole(x, "gcd") for x in xs)))),
    "lcm": (1, _ANY, lambda *xs: Fraction(math.lcm(*(_whole(x, "lcm") for x in xs)))),
    "exp": (1, 1, _float(math.exp)),
    "ln": (1, 1, _float(math.log)),
    "log": (1, 2, _float(math.log)),
    "log2": (1, 1, _float(math.log2)),
    "log10": (1, 1, _float(math.log10)),
    "sin": (1, 1, _float(math.sin)),
    "cos": (1, 1, _float(math.cos)),
    "tan": (1, 1, _float(math.tan)),
    "asin": (1, 1, _float(math.asin)),
    "acos": (1, 1, _float(math.acos)),
    "atan": (1, 1, _float(math.atan)),
    "degrees": (1, 1, _float(math.degrees)),
    "radians": (1, 1, _float(math.radians)),
}
CONSTANTS = {"pi": Fraction(math.pi), "tau": Fraction(math.tau), "e": Fraction(math.e)}
