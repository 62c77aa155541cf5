"""Names and texts that come from a model, made harmless to read."""

from __future__ import annotations

from typing import Any


def printable(text: str, longest: int | None = None) -> str:
    """``text`` with what does not print (escapes of a terminal, marks that turn the direction of writing, line breaks)
    as its code, and with its middle left out beyond ``longest`` characters."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if longest is not None and len(text) > longest:
        half = (longest - 1) // 2
        text = f"{text[: longest - 1 - half]}…{text[-half:]}"
    return text


def readable(value: Any) -> Any:
    """Every text in nested dictionaries and lists made :func:`printable`."""
    if isinstance(value, dict):
        return {printable(str(key)): readable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [readable(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value
