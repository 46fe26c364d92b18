"""The calculator of the demonstration tools: right, exact where it can be, and never at work for long."""

from __future__ import annotations

import ast
import contextlib
import math
import operator
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.core.infer.arithmetic import calculate

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.USub: operator.neg,
             ast.UAdd: operator.pos}  # fmt: skip


def by_python(expression):
    """The value of an expression as Python's own grammar reads it, with fractions for numbers."""

    def work(node):
        if isinstance(node, ast.Constant):
            return Fraction(str(node.value))
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](work(node.operand))
        return Fraction(OPERATORS[type(node.op)](work(node.left), work(node.right)))

    return work(ast.parse(expression.strip(), mode="eval").body)


NUMBERS = st.integers(0, 30).map(str) | st.decimals(0, 9, places=2).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" + ", "-", " * ", "/", "//", " % "]), inner).map("".join),
        st.tuples(inner, st.sampled_from(["**", " ** -"]), st.integers(0, 4).map(str)).map("".join),
        st.tuples(st.sampled_from("-+"), inner).map("".join),
        inner.map("({})".format),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_it_groups_and_counts_as_python(expression):
    """The order of operators, and their values, for expressions without parentheses and with."""
    try:
        wanted = by_python(expression)
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="division by zero"):
            calculate(expression)
        return
    except OverflowError:
        return
    if max(wanted.numerator.bit_length(), wanted.denominator.bit_length()) < 900:
        if wanted.denominator == 1:
            assert calculate(expression) == pytest.approx(wanted.numerator, rel=1e-12, abs=0)
        else:
            assert calculate(expression) == pytest.approx(float(wanted), rel=1e-11)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("123 + 456", 579), ("0.1 + 0.2", 0.3), ("1/3", 0.333333333333), ("100 * 1.1", 110), ("2/3*3", 2),
        ("2^10", 1024), ("2^3^2", 512), ("-2^2", -4), ("2^-2", 0.25), ("7 % 3", 1), ("7 // 2", 3), ("0^0", 1),
        ("5!", 120), ("3!^2", 36), ("√16 + 1", 5), ("sqrt(144)", 12), ("sqrt(1/4)", 0.5), ("sqrt(2)", 1.41421356237),
        ("math.sqrt(9)", 3), ("SQRT(9)", 3), ("cbrt(-27)", -3), ("abs(-3.5)", 3.5), ("round(2.567, 2)", 2.57),
        ("floor(-1.5)", -2), ("ceil(1.2)", 2), ("min(3, 1, 2)", 1), ("max(3, 1, 2)", 3), ("sum(1, 2, 3)", 6),
        ("gcd(12, 18)", 6), ("lcm(4, 6)", 12), ("factorial(20)", math.factorial(20)), ("pow(2, 0.5)", 1.41421356237),
        ("log(1000, 10)", 3), ("floor(log(1000, 10))", 3), ("log10(100)", 2), ("log2(8)", 3), ("ln(e)", 1),
        ("exp(0)", 1), ("sin(0)", 0), ("cos(pi)", -1), ("degrees(pi)", 180), ("2 * π", 6.28318530718), ("1e3", 1000),
        (".5 + 1.", 1.5),
        ("１２＋３×（４－１）", 21), ("3² + 2³", 17), ("8 ÷ 4 − 1", 1), ("max(1，2)", 2), ("2**1023", 2**1023),
        ("99999999999999999999 + 1", 10**20), ("1.0000001 ** 1000000", 1.10517091261), ("(-1) ** (10 ** 9)", 1),
    ],
)  # fmt: skip
def test_values(expression, value):
    """Whole numbers to the last digit, others to 12; the signs of other keyboards; nothing of a float's noise."""
    found = calculate(expression)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("", "the end where a number should be"),
        ("1 +", "the end where a number should be"),
        ("2 3", "'3' where the end should be"),
        ("(1", "the end where '[)]' should be"),
        ("max()", "'[)]' where a number should be"),
        ("sqrt 4", "'4' where '[(]' should be"),
        ("1,000", "',' where the end should be"),
        ("sqrt(1, 2)", "sqrt does not take 2 arguments"),
        ("1/0", "division by zero"),
        ("5 % 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("sqrt(-1)", "no real number"),
        ("(-8) ^ 0.5", "no real number"),
        ("log(0)", "log is not defined for 0"),
        ("acos(2)", "acos is not defined for 2"),
        ("2.5!", "whole numbers"),
        ("171!", "from 0 to 170"),
        ("gcd(1.5, 2)", "gcd takes whole numbers"),
        ("9**9**9", "too large"),
        ("1e400", "too large"),
        ("1e99999999999", "too large"),
        ("exp(1000)", "too large"),
        ("1e300 * 1e300", "too large"),
        ("(" * 60 + "1" + ")" * 60, "more than 50 levels"),
        ("-" * 60 + "1", "more than 50 levels"),
        ("1+" * 1000, "longer than 1,000 characters"),
        ("foo(1)", "there is no foo; there are sqrt"),
        ("x = 1", "'=' is no number"),
        ("__import__('os').system('true')", "is no number, operator or function"),
        ("open(1)", "there is no open"),
        ("(1).__class__", "is no number"),
        ("春", "is no number|there is no"),
    ],
)
def test_what_cannot_be_worked_out_is_told_in_words(expression, told):
    with pytest.raises(ValueError, match=told):
        calculate(expression)


SMALL = st.integers(0, 99).map(str) | st.sampled_from(["9", "170!", "1e300", "1/7", "0.1"])
MARKS = st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "^", "!", "√", "(", ")", ","])
NAMES = st.sampled_from(["sqrt(", "exp(", "lcm(", "round(", "max(", "pi"])
TEXTS = st.lists(SMALL | MARKS | NAMES, max_size=40).map(" ".join)


@given(TEXTS | st.text(max_size=30))
def test_anything_is_worked_out_or_refused_at_once(text):
    """No other exception, nothing infinite, and never more than half a second of work."""
    begun = time.process_time()
    with contextlib.suppress(ValueError):
        assert math.isfinite(calculate(text))
    assert time.process_time() - begun < 0.5
