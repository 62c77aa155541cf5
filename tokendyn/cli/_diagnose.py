"""``tokendyn diagnose``: a saved model in, a report out."""

from __future__ import annotations

import argparse
import json
import sys
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
    import torch

    from tokendyn.diagnose import diagnose, load

    torch.manual_seed(options.seed)
    model, inputs = load(options.path)
    about = "inputs that come with it"
    if inputs is None:
        inputs, about = _tokens(model, options)
    elif options.text is not None or options.tokens is not None:
        raise OptionError("diagnose: --text and --tokens are for language models; this folder holds projections")
    found = diagnose(
        model, inputs, channels=tuple(options.channels), sequences=options.sequences, name=Path(options.path).name
    )
    found.model["about"] = about
    if options.json:
        print(json.dumps(found.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        print(found)
    if options.out is not None:
        print(f"written: {found.save(options.out) / 'report.html'}", file=sys.stderr)
    return 0


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
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens (default 0)")
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
        try:
            ids = torch.tensor(json.loads(options.tokens.read_text()), dtype=torch.long)
        except (ValueError, TypeError) as cause:
            raise DataError(f"diagnose: {options.tokens} is no JSON list of token ids ({cause})") from cause
        if not ids.numel():
            raise DataError(f"diagnose: {options.tokens} is empty, expected at least one token")
        if not 0 <= int(ids.min()) <= int(ids.max()) < table.num_embeddings:
            raise DataError(f"diagnose: {options.tokens} has ids outside 0 to {table.num_embeddings - 1}")
        return torch.atleast_2d(ids), "token ids given"
    if options.length < 1:
        raise OptionError(f"diagnose: --length is {options.length}, expected 1 or more")
    return torch.randint(
        table.num_embeddings, (1, options.length)
    ), "random token ids: give --text or --tokens for real ones"


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
