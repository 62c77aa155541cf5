"""A text classification study from its configuration to its report."""

from __future__ import annotations

import dataclasses

from tokendyn.errors import OptionError
from tokendyn.experiments._devices import resolve_device
from tokendyn.experiments._loggers import expect_installed
from tokendyn.experiments._run_folder import RunRecord, open_folder
from tokendyn.experiments._study import Study, expect_trainable
from tokendyn.experiments.text_classification._config import TextConfig
from tokendyn.experiments.text_classification._report import write_report
from tokendyn.experiments.text_classification._task import TextTasks
from tokendyn.experiments.text_classification._texts import load_texts


def run_text_classification(preset: str, config: TextConfig, command: list[str]) -> None:
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
    if config.data.data is None and preset != "demo":
        raise OptionError(f"the preset {preset} needs texts; give --data with a file, a folder, or hf:NAME")
    texts = load_texts(config.data)
    make_task = TextTasks(texts, config)
    expect_trainable(make_task, config.arms, config.seeds[0], config.compute)
    folder = open_folder(
        config.run,
        stem=f"text_classification-{preset}",
        experiment="text_classification",
        identity=config.identity() | {"data": texts.fingerprint},
        shown={"preset": preset, "texts": config.data.data, "test": config.data.test},
        command=command,
    )
    print(
        f"{preset}: {len(texts.train):,} training and {len(texts.held_out):,} test texts, "
        f"{len(texts.classes)} classes, {texts.vocab_size:,} words; results in {folder}",
        flush=True,
    )
    study = Study(folder, config.arms, config.seeds, make_task, config.train, config.compute, config.run)

    def report(runs: list[RunRecord]) -> None:
        write_report(folder, preset, config, texts, runs)

    study.run_and_report(report)
