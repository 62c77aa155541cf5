"""A language study from its configuration to its report."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from tokendyn.backends.torch.models import LanguageModel
from tokendyn.errors import OptionError
from tokendyn.experiments._devices import resolve_device
from tokendyn.experiments._loggers import expect_installed
from tokendyn.experiments._run_folder import RunRecord, open_folder
from tokendyn.experiments._study import Study, expect_trainable
from tokendyn.experiments._text._sources import HUGGING_FACE, RANDOM
from tokendyn.experiments._trainer import load_trained
from tokendyn.experiments.wikitext103._config import DataConfig, LanguageConfig
from tokendyn.experiments.wikitext103._report import write_report
from tokendyn.experiments.wikitext103._task import LanguageTasks, load_texts


def _expect_sources(preset: str, data: DataConfig) -> None:
    """What is not there is said at once and all together, before anything is read.

    Raises:
        OptionError: a text or the tokenizer is missing.
    """
    missing, text = [], data.text
    if text is None:
        if preset != "demo":
            missing.append("a text: give --text with a folder, a file, or hf:Salesforce/wikitext:wikitext-103-raw-v1")
    elif text != RANDOM and not text.startswith(HUGGING_FACE) and not Path(text).exists():
        missing.append(f"a text: --text {text} is no file or folder")
    if data.tokenizer == "gpt2":
        if data.tokenizer_dir is None:
            missing.append("GPT-2's tokenizer: give --tokenizer-dir with a folder of its vocab.json and merges.txt")
        elif not Path(data.tokenizer_dir).is_dir():
            missing.append(f"GPT-2's tokenizer: --tokenizer-dir {data.tokenizer_dir} is no folder")
    if data.zero_shot is not None and not Path(data.zero_shot).is_file():
        missing.append(f"the text of --zero-shot: {data.zero_shot} is no file")
    if missing:
        raise OptionError(f"the preset {preset} needs {'; and '.join(missing)}")


def run_wikitext103(preset: str, config: LanguageConfig, command: list[str]) -> None:
    """Run, or continue, the study that ``config`` describes, and report it on stdout and in its folder.

    Args:
        preset: the preset's name, which names the default folder.
        config: the configuration.
        command: what the user typed, for the record.

    Raises:
        DataError, OptionError, CheckpointError, NonFiniteError, Stopped: see the modules that raise them.
    """
    expect_installed(config.run.log_to)
    device = resolve_device(config.compute.device)
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, device=str(device)))
    _expect_sources(preset, config.data)
    texts = load_texts(config.data)
    make_task = LanguageTasks(texts, config)
    expect_trainable(make_task, config.arms, config.seeds[0], config.compute)
    folder = open_folder(
        config.run,
        stem=f"wikitext103-{preset}",
        experiment="wikitext103",
        identity=config.identity() | {"data": texts.fingerprint},
        shown={"preset": preset, "text": config.data.text, "zero_shot": config.data.zero_shot},
        command=command,
    )
    print(
        f"{preset}: {len(texts.train):,} training and {len(texts.held_out):,} held-out tokens; results in {folder}",
        flush=True,
    )
    study = Study(folder, config.arms, config.seeds, make_task, config.train, config.compute, config.run)

    def report(runs: list[RunRecord]) -> None:
        write_report(folder, preset, config, texts, runs)

    for run in study.run_and_report(report) or ():
        if run.seed == config.seeds[0]:  # MambaLM.from_pretrained and its like read them
            place = folder / "models" / run.folder.parent.name
            trained = load_trained(make_task(run.arm, run.seed), run.folder)
            assert isinstance(trained, LanguageModel)
            trained.save_pretrained(place)
            print(f"  {place}")
    sys.stdout.flush()
