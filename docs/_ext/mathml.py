"""Formulas as MathML, made when the site is built: no script, no font and no other site is needed to read them."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

_TAG = re.compile(r"\\tag\{([^{}]*)\}")
# |x|: no relation, and not as tall as a fraction beside it.
_BAR = re.compile(r"<mo[^>]*>(&#x0007C;|\|)</mo>")
_FUNCTION = re.compile(r'(<mi>(?:ln|exp)</mi>)(?!</mrow>|<mo stretchy="false">&#x00028;)')
_log = logging.getLogger(__name__)


def _mathml(latex: str, display: str, node: nodes.Node) -> str:
    try:
        found = _BAR.sub('<mo lspace="0" rspace="0" stretchy="false">|</mo>', convert(latex, display=display))
        return _FUNCTION.sub(r'\1<mspace width="0.17em"/>', found)
    except Exception as error:
        _log.warning("a formula that cannot be read: %s (%s)", latex, error, location=node)
        return f"<code>{latex}</code>"


def inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_mathml(node.astext(), "inline", node))
    raise nodes.SkipNode


def block(translator: Any, node: nodes.math_block) -> None:
    latex = node.astext()
    tag = _TAG.search(latex)
    number = f'<span class="eqno">({tag[1]})</span>' if tag else ""
    translator.body.append(f'<div class="math">{_mathml(_TAG.sub("", latex), "block", node)}{number}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
