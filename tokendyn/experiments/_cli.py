"""Command lines of experiments: ``python -m tokendyn.experiments.NAME [preset] [--field value]``.

What a user can get wrong ends in one sentence on stderr and exit code 2, never in a traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import io
import json
import re
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tokendyn.errors import NonFiniteError, TokendynError

C = TypeVar("C")

# Exit codes, besides 0 (finished) and Python's own 1 (an error of ours, with its traceback).
MISTAKE = 2  # the command, the data or the folder cannot be used as given
NON_FINITE = 3  # the loss or the gradient became NaN or infinite
SIGNALLED = 128  # plus the number: 130 for Ctrl-C, 143 for SIGTERM, 142 for --max-minutes
EXIT_CODES = """
exit codes: 0 finished; 2 a mistake in the command or the data; 3 a loss or gradient that is NaN or
infinite; 130, 142, 143 stopped by Ctrl-C, --max-minutes, SIGTERM, with everything saved.
""".strip()

REQUIRED = {
    "torch": "torch",
    "safetensors": "safetensors",
    "tyro": "tyro",
    "tqdm": "tqdm",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
}


class Stopped(Exception):
    """A signal asked the process to stop; everything is saved. Arguments: the signal, a message."""

    @property
    def number(self) -> int:
        return self.args[0]

    def __str__(self) -> str:
        return self.args[1]


class _Misuse(Exception):
    """The command line cannot be understood."""


def run(
    command: Callable[[list[str]], None],
    arguments: list[str],
    required: Mapping[str, str] = REQUIRED,
    extras: str = "experiments",
) -> int:
    """Call ``command`` with ``arguments`` and return the exit code; known errors become one sentence.

    ``required`` has the packages that it needs by their modules' names, and ``extras`` bring them.
    """
    if code := not_installed(required, extras):
        return code
    try:
        command(arguments)
    except Stopped as stopped:
        return _complain(str(stopped), SIGNALLED + stopped.number)
    except KeyboardInterrupt:
        return _complain(
            "interrupted; what the last checkpoint holds can be continued with --resume auto", SIGNALLED + signal.SIGINT
        )
    except NonFiniteError as error:
        return _complain(str(error), NON_FINITE)
    except (_Misuse, TokendynError, OSError) as error:  # OSError: disk full, no permission
        return _complain(str(error), MISTAKE)
    return 0


def not_installed(required: Mapping[str, str], extras: str = "experiments") -> int:
    """Say which packages are missing and what installs them: MISTAKE then, else 0. Arguments as :func:`run`'s."""
    missing = [package for module, package in required.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _complain(f"not installed: {', '.join(missing)}; run: pip install 'tokendyn[{extras}]'", MISTAKE)
    return 0


def parse(
    arguments: list[str], presets: Mapping[str, Callable[[], C]], *, default: str, prog: str, description: str
) -> tuple[str, C]:
    """The preset's name and the configuration that ``arguments`` ask for.

    The preset comes first (``demo --seeds 0``) or by name (``--preset demo --seeds 0``); its fields are the
    defaults of the flags.
    """
    import tyro

    name, rest = _split_preset(arguments, default)
    if name not in presets:
        raise _Misuse(f"unknown preset {name!r}{_suggestion(name, presets)}; the presets are {', '.join(presets)}")
    width = max(map(len, presets))
    listing = "\n".join(
        f"  {key:<{width}} {inspect.cleandoc(preset.__doc__ or '').splitlines()[0]}" for key, preset in presets.items()
    )
    preset = presets[name]()
    help_text = (
        f"{description.strip()}\n\npresets (first argument, or --preset NAME; default {default}):\n"
        f"{listing}\n\nThe defaults below are those of the preset {name}."
    )
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            config, unknown = tyro.cli(
                type(preset),
                default=preset,
                args=rest,
                prog=f"{prog} [PRESET]",
                description=help_text,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise _Misuse(f"{_first_sentence(captured.getvalue())}; {prog} {name} --help lists the options") from None
    if unknown:
        flags = re.findall(r"--[\w-]+", _usage(type(preset), preset))
        hint = _suggestion(unknown[0], flags)
        raise _Misuse(f"unknown option {unknown[0]!r}{hint}; {prog} {name} --help lists the options")
    return name, config


def print_json(value: object) -> None:
    """Print ``value`` as indented JSON, short lists on one line."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: "[" + re.sub(r"\s*\n\s*", " ", found[1]) + "]", text))


def print_config(preset: str, config: Any, **resolved: object) -> None:
    """What a run would do: the configuration, and what its words for arms stand for."""
    from tokendyn.experiments._config import to_json

    shown = to_json(config)
    del shown["run"]["print_config"]
    print_json({"preset": preset, **shown, **resolved})


def _split_preset(arguments: list[str], default: str) -> tuple[str, list[str]]:
    rest = list(arguments)
    if rest and not rest[0].startswith("-"):
        return rest[0], rest[1:]
    for place, word in enumerate(rest):
        if word == "--preset":
            if place + 1 == len(rest):
                raise _Misuse("--preset was given without a name")
            return rest[place + 1], rest[:place] + rest[place + 2 :]
        if word.startswith("--preset="):
            return word.partition("=")[2], rest[:place] + rest[place + 1 :]
    return default, rest


def _usage(kind: type, preset: object) -> str:
    """All flags of a configuration, from the text of its help."""
    import tyro

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(kind, default=preset, args=["--help"], config=(tyro.conf.OmitArgPrefixes,))
    return printed.getvalue()


def _suggestion(word: str, choices: Mapping[str, object] | list[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _first_sentence(box: str) -> str:
    """The first paragraph of the box in which tyro reports an error, as one line."""
    lines = [line.strip("│╭╰╮╯ ") for line in box.splitlines()]
    body = [line for line in lines if line]
    rule = next((i for i, line in enumerate(body) if i and set(line) <= {"─"}), len(body))
    sentence = " ".join(body[1:rule]).rstrip(".") or box.strip()
    # tyro names the part of the configuration; our own messages name the flag.
    return re.sub(r"^Error parsing [\w.-]+: (?=--)", "", sentence)


def _complain(message: str, code: int) -> int:
    print(f"error: {message}" if code in (MISTAKE, NON_FINITE) else message, file=sys.stderr, flush=True)
    return code
