"""WikiText's spacing undone: ``1 @,@ 000 km ( 620 mi )`` back to ``1,000 km (620 mi)``.

WikiText separates words from punctuation by spaces. A model that learned ordinary text is measured on ordinary text,
so the raw split is put back first; perplexity is then given per word of the split as it was. The rules are near, not
exact: the original text is not to be had from the split.
"""

from __future__ import annotations

import re

_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" @([-,.])@ ", r"\1"),  # inside a word or number
        (r" ([,.;:!?%)\]}’])(?= |$)", r"\1"),  # joins what is before it
        (r"(?<= )([(\[{$£€#]) ", r"\1"),  # joins what is after it
        (r"^([(\[{$£€#]) ", r"\1"),
        (r" '(s|S|re|ve|ll|d|m|t)(?= |[,.;:!?)]|$)", r"'\1"),
        (r" n't(?= |[,.;:!?)]|$)", r"n't"),
        (r"(?<=\d) / (?=\d)", r"/"),
        (r"= = = = (.*?) = = = =", r"==== \1 ===="),
        (r"= = = (.*?) = = =", r"=== \1 ==="),
        (r"= = (.*?) = =", r"== \1 =="),
    )
]
_QUOTED = {mark: re.compile(rf"(^|(?<=[\s(\[])){mark} (.*?) {mark}(?=[\s,.;:!?)\]]|$)") for mark in ('"', "'")}


def detokenize(text: str) -> str:
    """``text`` line by line, its spaces around punctuation and quotes undone."""
    return "\n".join(_line(line) for line in text.split("\n"))


def _line(line: str) -> str:
    lead = line[: len(line) - len(line.lstrip(" "))]
    line = line[len(lead) :].rstrip(" ")
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)
    for mark, pattern in _QUOTED.items():
        line = pattern.sub(rf"\1{mark}\2{mark}", line)
    line = line.replace("s ' ", "s' ")  # a possessive: what was a pair of quotes is joined already
    return lead + line
