"""The configuration of an image study, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tokendyn.errors import OptionError
from tokendyn.experiments._config import (
    ComputeConfig,
    Presets,
    RunConfig,
    TrainConfig,
    expect_arms_and_seeds,
    expect_at_least,
    expect_within,
    to_json,
)
from tokendyn.experiments._order_arms import resolve_arm

#: Which image size each model is made for.
MADE_FOR = {"mambavision_16px": 16, "mambavision_32px": 32, "mambavision_64px": 64, "mambavision_t": 224}


@dataclass(frozen=True)
class DataConfig:
    """Images: an ImageFolder tree, or without one scikit-learn's digits."""

    data_dir: str | None = None
    """Folder of train/CLASS/* and val/CLASS/*, or of shards train/*.tar and val/*.tar, or a file that
    imagenet.pack made."""
    image_size: int = 16
    """Pixels on a side; the shorter side is brought to it, and the centre cut out."""
    crop_padding: int = 2
    """Training crops may lie so many pixels off the image, which is padded with black."""
    flip: bool = True
    """Mirror half of the training images."""
    cache_mb: int = 1024
    """Decode all images once and keep them if they take no more memory than this."""
    max_megapixels: float = 64.0
    """Refuse larger images, millions of pixels: they may be decompression bombs."""
    skip_corrupt: bool = False
    """Train without images that cannot be read at the start, instead of stopping there."""
    crop_area: float = 1.0
    """Below 1: instead of shifted crops take parts of the image of at least this share of its area, enlarged."""
    augment: Literal["crop", "timm"] = "crop"
    """crop: crops and mirrors. timm: its whole chain, with RandAugment and colours (needs tokendyn[vision])."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of an automatic augmentation; empty for none."""
    color_jitter: float = 0.4
    """Of timm's chain without automatic augmentation: reach of random brightness, contrast, saturation."""
    mixup: float = 0.0
    """Above 0: mix images in pairs, weights from Beta(mixup, mixup) (timm)."""
    cutmix: float = 0.0
    """Above 0: paste parts of other images, areas from Beta(cutmix, cutmix) (timm)."""
    crop_share: float = 1.0
    """Side of the centre that is cut out over the image's shorter side."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are brought to size."""
    on_device: bool = False
    """Keep all training images in the device's memory and cut them out there; they must fit into --cache-mb."""
    mechanism: bool = False
    """At every evaluation measure also: accuracy with shuffled orders, gradients that reach the scores, agreement of
    order maps between images, clustering of tokens."""

    def __post_init__(self) -> None:
        expect_at_least(self, 1, "image_size")
        expect_at_least(self, 0, "crop_padding", "cache_mb")
        expect_within(self, 0.01, 1, "crop_area", "crop_share")
        expect_at_least(self, 0, "mixup", "cutmix", "color_jitter")
        if self.augment == "timm" and self.on_device:
            raise OptionError("--augment timm works on the CPU, image by image; leave out --on-device")
        expect_within(self, 0.001, 178.0, "max_megapixels")  # Pillow itself opens no larger ones


@dataclass(frozen=True)
class ModelConfig:
    """The model and its loss."""

    model: Literal["mambavision_16px", "mambavision_32px", "mambavision_64px", "mambavision_t"] = "mambavision_16px"
    """Which MambaVision, by the image size it is made for."""
    drop_path: float = 0.0
    """Stochastic depth: how often the last block is left out of a training step."""
    label_smoothing: float = 0.0
    """Part of the target spread over all classes."""
    parity: Literal["clean", "published"] = "clean"
    """published: with the quirks of the public MambaVision."""
    eval_only: str | None = None
    """Evaluate these weights (safetensors, such as the public MambaVision-T's) in the first arm; train nothing."""

    def __post_init__(self) -> None:
        expect_within(self, 0, 0.99, "drop_path")
        expect_within(self, 0, 1, "label_smoothing")


@dataclass(frozen=True)
class ImageNetConfig:
    """An image study: arms times seeds."""

    arms: tuple[str, ...] = ("baseline", "sorted")
    """Orders to compare, the first being the reference: baseline, sorted, annealed, published,
    published_restored, straight_through, random, mean, reversed; with changes as in
    sorted:tau=0.3,restore=false."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every arm for each; runs of one seed share data order and initial weights."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        expect_arms_and_seeds(self)
        for arm in self.arms:
            resolve_arm(arm)

    def orders(self) -> dict[str, Any]:
        """The settings of every arm's order, resolved, for ``config.json``."""
        return {arm: resolve_arm(arm).to_json() for arm in self.arms}

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued: all but where things lie and how they are fetched."""
        config = to_json(self)
        del config["run"], config["data"]["data_dir"], config["data"]["cache_mb"], config["data"]["on_device"]
        return {"config": config, "orders": self.orders()}


PRESETS = Presets[ImageNetConfig]()
preset = PRESETS.enter


@preset
def demo() -> ImageNetConfig:
    """Scikit-learn's digits (1,797 real images); baseline, sorted and published order: minutes on two cores."""
    return ImageNetConfig(
        arms=("baseline", "sorted", "published"),
        data=DataConfig(image_size=16, crop_padding=2, flip=False),
        model=ModelConfig(model="mambavision_16px"),
        train=TrainConfig(
            epochs=8,
            batch_size=64,
            learning_rate=2e-3,
            log_every=11,
            evaluate_every=22,
            checkpoint_every=44,
        ),
        compute=ComputeConfig(threads=1),
        run=RunConfig(jobs=2),
    )


@preset
def cifar10() -> ImageNetConfig:
    """Trees of 32 px images such as CIFAR-10 (--data-dir): baseline, sorted and published order."""
    return ImageNetConfig(
        arms=("baseline", "sorted", "published"),
        data=DataConfig(image_size=32, crop_padding=4),
        model=ModelConfig(model="mambavision_32px", drop_path=0.1, label_smoothing=0.1),
        train=TrainConfig(
            epochs=30,
            batch_size=128,
            learning_rate=1e-3,
            log_every=50,
            evaluate_every=390,
            checkpoint_every=390,
        ),
    )


@preset
def imagenette() -> ImageNetConfig:
    """Trees of 64 px images such as Imagenette (--data-dir): baseline, sorted and published order."""
    return ImageNetConfig(
        arms=("baseline", "sorted", "published"),
        data=DataConfig(image_size=64, crop_padding=8),
        model=ModelConfig(model="mambavision_64px", drop_path=0.1, label_smoothing=0.1),
        train=TrainConfig(
            epochs=60,
            batch_size=128,
            learning_rate=1e-3,
            log_every=25,
            evaluate_every=146,
            checkpoint_every=146,
        ),
    )


STUDY_ARMS = (
    "baseline",
    "published",
    "published_restored",
    "annealed",
    "straight_through",
    "random",
    "mean",
    "reversed",
)


@preset
def study() -> ImageNetConfig:
    """Does order help? All arms, mechanisms measured, on trees of 32 px images such as CIFAR-10: for one GPU."""
    return ImageNetConfig(
        arms=STUDY_ARMS,
        data=DataConfig(image_size=32, crop_padding=4, on_device=True, mechanism=True),
        model=ModelConfig(model="mambavision_32px", drop_path=0.1, label_smoothing=0.1),
        train=TrainConfig(
            epochs=30,
            batch_size=256,
            learning_rate=2e-3,
            log_every=130,
            evaluate_every=1170,
            checkpoint_every=390,
        ),
        compute=ComputeConfig(threads=1, precision="bfloat16", channels_last=True, deterministic=False),
        run=RunConfig(jobs=None),
    )


@preset
def study_64px() -> ImageNetConfig:
    """The same on trees of 64 px images such as Imagenette."""
    return ImageNetConfig(
        arms=STUDY_ARMS,
        data=DataConfig(image_size=64, crop_area=0.35, on_device=True, mechanism=True),
        model=ModelConfig(model="mambavision_64px", drop_path=0.1, label_smoothing=0.1),
        train=TrainConfig(
            epochs=40,
            batch_size=128,
            learning_rate=1e-3,
            log_every=73,
            evaluate_every=730,
            checkpoint_every=365,
        ),
        compute=ComputeConfig(threads=1, precision="bfloat16", channels_last=True, deterministic=False),
        run=RunConfig(jobs=None),
    )


def _table3(arms: tuple[str, ...]) -> ImageNetConfig:
    return ImageNetConfig(
        arms=arms,
        data=DataConfig(
            image_size=224,
            augment="timm",
            crop_area=0.08,
            mixup=0.8,
            cutmix=1.0,
            crop_share=0.875,
            interpolation="bicubic",
            cache_mb=0,
        ),
        model=ModelConfig(model="mambavision_t", drop_path=0.2, label_smoothing=0.1, parity="published"),
        train=TrainConfig(
            epochs=310,
            batch_size=512,
            learning_rate=8e-4,
            initial_learning_rate=1e-6,
            final_learning_rate=5e-6,
            warmup=20 / 310,
            weight_decay=0.05,
            clip_norm=5.0,
            log_every=100,
            evaluate_every=2502,
            checkpoint_every=1000,
        ),
        compute=ComputeConfig(
            threads=4,
            precision="bfloat16",
            channels_last=True,
            compile=True,
            sync_batch_norm=False,
            deterministic=False,
        ),
        run=RunConfig(workers=12),
    )


@preset
def table3_baseline() -> ImageNetConfig:
    """Paper 1's Table 3: MambaVision-T on ImageNet-1K at full scale, for torchrun on 4 GPUs; needs tokendyn[vision]."""
    return _table3(("baseline",))


@preset
def table3_reorder() -> ImageNetConfig:
    """The same with the published reordering of tokens."""
    return _table3(("published",))
