"""``tokendyn diagnose``: a saved model in, a report out."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from tokendyn.errors import BackendMissing, DataError, OptionError

_EXAMPLES = """examples:
  tokendyn diagnose my-model                          a folder of config.json and safetensors
  tokendyn diagnose state-spaces/mamba-130m-hf --text "The quick brown fox"
  tokendyn diagnose my-layers --channels 0 5          a folder of projections S_B, S_C, S_delta, A"""


def run(arguments: list[str]) -> int:
    """Parse and run."""
    options = _parser().parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        raise BackendMissing("diagnose: needs torch; run: pip install 'tokendyn[diagnose]'")
    import torch

    from tokendyn.diagnose import diagnose, load
    from tokendyn.diagnose._diagnosis import make_folder

    if options.out is not None:
        make_folder(options.out)  # what cannot be written to is said before the work
    torch.manual_seed(options.seed)
    model, inputs = load(options.path)
    about = "inputs that come with it"
    if inputs is None:
        inputs, about = _tokens(model, options)
    elif options.text is not None or options.tokens is not None:
        raise OptionError("diagnose: --text and --tokens are for language models; this folder holds projections")
    found = diagnose(
        model,
        inputs,
        channels=tuple(options.channels),
        sequences=options.sequences,
        name=Path(options.path).resolve().name if Path(options.path).exists() else options.path,
        progress=_Progress(),
    )
    found.model["about"] = about
    if options.json:
        print(json.dumps(found.to_json(), allow_nan=False))
    else:
        print(found)
    if options.out is not None:
        print(f"written: {found.save(options.out) / 'report.html'}", file=sys.stderr)
    elif not options.json:
        print("a page with all of it and its figures: --out FOLDER", file=sys.stderr)
    return 0


class _Progress:
    """Lines on stderr, where the work takes longer than a few seconds: one every two seconds at most."""

    def __init__(self) -> None:
        self._begun = self._last = time.monotonic()

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if now - self._begun >= 3 and now - self._last >= 2:
            from tokendyn.diagnose._words import printable

            self._last = now
            print(f"diagnose: {printable(text, 160)}", file=sys.stderr, flush=True)


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{number} is out of range, expected 0 to 2^63 - 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokendyn diagnose",
        description="Regimes, spectra, attention, sinks of a trained model, and what to do about them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", help="folder of a saved model or of projections, or a hub name owner/name")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write report.html, report.json and pictures there")
    parser.add_argument("--text", help="run the model on this text; needs its tokenizer beside it and transformers")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="run it on token ids, a JSON list (of lists)")
    parser.add_argument("--length", type=int, default=256, help="without either: so many random tokens (default 256)")
    parser.add_argument("--sequences", type=int, default=1, help="sequences the attention is averaged over")
    parser.add_argument(
        "--channels", type=int, nargs="+", default=[], metavar="C", help="channels to show by themselves"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of the random tokens (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _tokens(model: Any, options: argparse.Namespace) -> tuple[Any, str]:
    """Token ids (b, L) and a word on where they come from."""
    import torch

    if options.text is not None:
        return _tokenized(options.path, options.text), "a text given"
    table = next((m for m in model.modules() if isinstance(m, torch.nn.Embedding)), None)
    if table is None:
        raise OptionError("diagnose: the model has no embedding to take token ids; call tokendyn.diagnose from Python")
    if options.tokens is not None:
        ids = _ids(options.tokens)
        return torch.atleast_2d(ids), "token ids given"
    if options.length < 1:
        raise OptionError(f"diagnose: --length is {options.length}, expected 1 or more")
    return torch.randint(
        table.num_embeddings, (1, options.length)
    ), "random token ids: give --text or --tokens for real ones"


def _ids(file: Path) -> Any:
    """The tensor in a JSON file of token ids."""
    import torch

    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        ids = torch.tensor(given)
    except OSError as cause:
        raise DataError(f"diagnose: {file} cannot be read ({cause.strerror})") from cause
    except (ValueError, TypeError, RuntimeError) as cause:
        raise DataError(f"diagnose: {file} is no JSON list of token ids ({cause})") from cause
    if not ids.numel():
        raise DataError(f"diagnose: {file} is empty, expected at least one token")
    if not isinstance(given, list) or ids.dtype != torch.long or ids.ndim > 2:
        raise DataError(
            f"diagnose: {file} holds {str(ids.dtype).removeprefix('torch.')} numbers of shape {tuple(ids.shape)}, "
            f"expected a JSON list of whole numbers, or a list of such lists of one length"
        )
    return ids


def _tokenized(path: str, text: str) -> Any:
    if not text:
        raise DataError("diagnose: --text is empty, expected at least one token")
    try:
        from transformers import AutoTokenizer  # type: ignore[import-not-found]
    except ImportError as cause:
        raise BackendMissing("diagnose: --text needs transformers; run: pip install 'tokendyn[diagnose]'") from cause
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=Path(path).exists())
    except Exception as cause:
        said = str(cause).strip().splitlines() or [type(cause).__name__]
        raise DataError(f"diagnose: no tokenizer can be read from {path} ({said[0]}); give --tokens instead") from cause
    return tokenizer(text, return_tensors="pt")["input_ids"]
