"""An image study from its configuration to its report."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from tokendyn.errors import CheckpointError, OptionError
from tokendyn.experiments import _cli
from tokendyn.experiments._checkpoint import read_tensors
from tokendyn.experiments._devices import numerics, resolve_device
from tokendyn.experiments._distributed import current_group, joined
from tokendyn.experiments._loggers import expect_installed
from tokendyn.experiments._run_folder import RunRecord, open_folder
from tokendyn.experiments._study import Study, expect_trainable
from tokendyn.experiments._trainer import load_weights
from tokendyn.experiments.imagenet._config import MADE_FOR, ImageNetConfig
from tokendyn.experiments.imagenet._images import Images, load_digits, load_folder
from tokendyn.experiments.imagenet._packed import SUFFIX, load_packed
from tokendyn.experiments.imagenet._report import write_report
from tokendyn.experiments.imagenet._shards import holds_shards, load_shards
from tokendyn.experiments.imagenet._task import ImageTask, ImageTasks


def run_imagenet(preset: str, config: ImageNetConfig, command: list[str]) -> None:
    """Run, or continue, the study that ``config`` describes, and report it on stdout and in its folder.

    Args:
        preset: the preset's name, which names the default folder.
        config: the configuration.
        command: what the user typed, for the record.

    Raises:
        DataError, OptionError, CheckpointError, NonFiniteError, Stopped: see the modules that raise them.
    """
    expect_installed(config.run.log_to)
    with joined(resolve_device(config.compute.device)) as device:
        # In config.json the kind alone: each of torchrun's processes has a number of its own.
        group = current_group()
        named = str(device) if group.size == 1 else device.type
        described = dataclasses.replace(config, compute=dataclasses.replace(config.compute, device=named))
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, device=str(device)))
        images = load_images(preset, config)

        make_task = ImageTasks(images, config)
        if config.model.eval_only is not None:
            evaluate_weights(Path(config.model.eval_only), make_task(config.arms[0], config.seeds[0]), config)
            return
        expect_trainable(make_task, config.arms, config.seeds[0], config.compute)
        folder = Path()
        if group.leads:
            folder = open_folder(
                config.run,
                stem=f"imagenet-{preset}",
                experiment="imagenet",
                identity=described.identity() | {"data": images.fingerprint},
                shown={"preset": preset, "data_dir": config.data.data_dir, "classes": list(images.classes)},
                command=command,
            )
            _introduce(preset, config, images, folder)
        folder = group.told(folder)
        study = Study(folder, config.arms, config.seeds, make_task, config.train, config.compute, config.run)

        def report(runs: list[RunRecord]) -> None:
            write_report(folder, preset, config, images, runs)

        study.run_and_report(report)


def evaluate_weights(file: Path, task: ImageTask, config: ImageNetConfig) -> None:
    """Print the held-out measures of a model with the weights in ``file``.

    Raises:
        CheckpointError: they cannot be read, or are another model's.
    """
    device = torch.device(config.compute.device)
    with numerics(config.compute), torch.no_grad():
        model = task.build_model()
        load_weights(model, read_weights(file))
        model.to(device).eval()
        precision = torch.autocast(device.type, torch.bfloat16, enabled=config.compute.precision == "bfloat16")
        with precision:
            measures, skipped = task.held_out(model, device)
    if current_group().leads:
        for message in skipped.values():
            print(f"skipped: {message}", file=sys.stderr)
        _cli.print_json({"weights": str(file), "images": len(task.images.held_out), **measures})


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, without the name that a wrapper may have put before all of them.

    Raises:
        CheckpointError: there is no such file, or it is none.
    """
    if not file.is_file():
        raise CheckpointError(f"--eval-only {file} is no file; expected weights as safetensors")
    tensors = read_tensors(file)
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _introduce(preset: str, config: ImageNetConfig, images: Images, folder: Path) -> None:
    size, model = config.data.image_size, config.model.model
    print(
        f"{preset}: {model}, {len(images.train)} training and {len(images.held_out)} held-out images of {size} px; "
        f"results in {folder}"
    )
    if size != MADE_FOR[model]:
        print(f"note: {model} is made for images of {MADE_FOR[model]} px, not {size}; --model chooses another")
    if preset == "demo" and config.data.data_dir is not None:
        print(
            f"note: the preset demo brings images to {config.data.image_size} px; the presets cifar10 (32 px) and "
            f"imagenette (64 px) are made for larger ones"
        )
    sys.stdout.flush()


def load_images(preset: str, config: ImageNetConfig) -> Images:
    """The images that ``config`` names.

    Raises:
        DataError: they cannot be read.
        OptionError: the preset needs a tree and none was given.
    """
    data = config.data
    if data.data_dir is None:
        if preset != "demo":
            raise OptionError(
                f"the preset {preset} needs images; give --data-dir FOLDER with train/CLASS/* and val/CLASS/*"
            )
        return load_digits(data.image_size)
    options: dict[str, Any] = {
        "size": data.image_size,
        "cache_mb": data.cache_mb,
        "max_pixels": int(data.max_megapixels * 1e6),
        "skip_corrupt": data.skip_corrupt,
        "crop_share": data.crop_share,
        "interpolation": data.interpolation,
    }
    if holds_shards(Path(data.data_dir)):
        return load_shards(Path(data.data_dir), **options)
    if Path(data.data_dir).suffix == SUFFIX:
        return load_packed(Path(data.data_dir), **options)
    return load_folder(data.data_dir, **options)
