"""The `minigpt` commands of a piece of shell text, found without running it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

QUOTED = r"""'[^']*'|"(?:\\.|[^"\\])*"|\\."""
COMMENT = re.compile(rf"({QUOTED})|(?<![^\s;&|()])#[^\n]*", re.DOTALL)
HEREDOC = r"""(?<!<)<<-?\s*(?P<quote>['"]?)(?P<end>\w+)(?P=quote)(?P<rest>[^\n]*)\n.*?^\s*(?P=end)$"""
SUBSTITUTION = re.compile(r"\$\((.*)\)", re.DOTALL)
ASSIGNMENT = re.compile(r"\w+=")
PUNCTUATION = "();<>|&\n"
LEADS = {"!", "{", "if", "then", "elif", "else", "while", "until", "do", "time", "nohup", "exec", "env"}

# Words that stand for something else make a command a pattern: there is nothing to check.
PLACEHOLDERS = {"COMMAND", "VERB", "STAGE", "PATH", "DIR", "FILE", "MODEL", "RUN", "TEXT", "DATA"}


def commands(script: str) -> Iterator[list[str]]:
    """The words behind each `minigpt`, in pipelines, chains, conditions and `$(…)` too; redirections are left out."""
    for words in simple_commands(script):
        for word in words:
            for inner in SUBSTITUTION.findall(word):  # inside double quotes; elsewhere the parentheses split
                yield from commands(inner)
        while words and (words[0] in LEADS or ASSIGNMENT.match(words[0])):
            words = words[1:]
        if words[:1] == ["minigpt"]:
            yield words[1:]


def simple_commands(script: str) -> Iterator[list[str]]:
    """Words between the operators of a script."""
    words: list[str] = []
    parts = iter(tokens(script))
    for part in parts:
        if not part or not set(part) <= set(PUNCTUATION):
            words.append(part)
        elif "<" in part or ">" in part:
            next(parts, None)  # the file
        else:
            yield words
            words = []
    yield words


def tokens(script: str) -> Iterator[str]:
    """Words without their quotes, and runs of operators; comments and here-documents are gone."""
    text = re.sub(HEREDOC, r"\g<rest>", script, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
    text = COMMENT.sub(lambda m: m[1] or "", text)
    text = re.sub(r"(?<=\s)\d+(?=[<>])", "", text)  # the 2 of 2>
    lexer = shlex.shlex(text, posix=True, punctuation_chars=PUNCTUATION)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    yield from lexer


def is_pattern(words: list[str]) -> bool:
    return any("…" in word or word in PLACEHOLDERS for word in words)
