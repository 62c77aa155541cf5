"""Reading images: trees, sizes, and everything that can be wrong with them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from tests.experiments.trees import write_image, write_tree
from tokendyn.errors import DataError
from tokendyn.experiments import _cli
from tokendyn.experiments.imagenet import pack
from tokendyn.experiments.imagenet._batches import (
    Augmentation,
    crop,
    epoch_augmentation,
    epoch_order,
    epoch_zoom,
    plan_batch,
    readable_batch,
)
from tokendyn.experiments.imagenet._images import Images, load_digits, load_folder, read_image
from tokendyn.experiments.imagenet._packed import load_packed
from tokendyn.experiments.imagenet._shards import holds_shards, load_shards

LIMIT = 10**6


def load(root: Path | str, **options: Any) -> Images:
    return load_folder(str(root), **{"size": 16, "cache_mb": 10, "max_pixels": LIMIT, "skip_corrupt": False} | options)


def test_a_tree(tmp_path: Path) -> None:
    images = load(write_tree(tmp_path, classes=3))
    assert images.classes == ("class0", "class1", "class2")
    assert len(images.train) == 24
    assert images.held_out.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert images.train.pixels is not None
    pixels, problems = images.train.read(np.array([0, 23]))
    assert pixels.shape == (2, 16, 16, 3)
    assert problems == {}
    assert pixels[0].mean() < 60 < 120 < pixels[1].mean()
    assert images.fingerprint["train"] == 24


def test_memory_and_files_give_the_same_pixels(tmp_path: Path) -> None:
    write_tree(tmp_path)
    cached, streamed = load(tmp_path), load(tmp_path, cache_mb=0)
    assert streamed.train.pixels is None
    everything = np.arange(len(cached.train))
    np.testing.assert_array_equal(cached.train.read(everything)[0], streamed.train.read(everything)[0])
    assert cached.fingerprint == streamed.fingerprint


def test_the_fingerprint_follows_the_names(tmp_path: Path) -> None:
    before = load(write_tree(tmp_path)).fingerprint
    (tmp_path / "train" / "class0" / "000.png").rename(tmp_path / "train" / "class0" / "zzz.png")
    assert load(tmp_path).fingerprint != before


def test_what_belongs_to_a_tree(tmp_path: Path) -> None:
    """Links, folders inside classes and suffixes in capitals count; hidden files, notes and loops do not."""
    write_tree(tmp_path / "tree")
    folder = tmp_path / "tree" / "train" / "class0"
    write_image(tmp_path / "elsewhere.png")
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    write_image(folder / "inner" / "x.png")
    (folder / "000.png").rename(folder / "000.PNG")
    (folder / "._000.png").write_text("not an image")
    (folder / "notes.txt").write_text("not an image")
    (folder / "inner" / "loop").symlink_to(folder)
    (tmp_path / "tree" / "train" / ".cache").mkdir()
    assert len(load(tmp_path / "tree").train) == 16 + 2
    (tmp_path / "link").symlink_to(tmp_path / "tree")
    assert len(load(tmp_path / "link").train) == 16 + 2


def test_shorter_side_and_centre(tmp_path: Path) -> None:
    array = np.zeros((8, 24, 3), np.uint8)
    array[:, 8:16] = 200  # the middle third
    Image.fromarray(array).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", 8, LIMIT) == 200).all()
    Image.fromarray(array.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert read_image(tmp_path / "tall.png", 8, LIMIT).shape == (8, 8, 3)
    assert (read_image(tmp_path / "tall.png", 8, LIMIT) == 200).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (9, 9)).save(tmp_path / f"image.{suffix}")
    pixels = read_image(tmp_path / f"image.{suffix}", 8, LIMIT)
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8


def truncate(root: Path) -> None:
    file = root / "train" / "class1" / "004.png"
    file.write_bytes(file.read_bytes()[:200])


def remove_all(folder: str) -> Callable[[Path], None]:
    def remove(root: Path) -> None:
        for file in (root / folder).rglob("*.png"):
            file.unlink()

    return remove


def remove_folder(folder: str) -> Callable[[Path], None]:
    def remove(root: Path) -> None:
        (root / folder).rename(root.parent / "elsewhere")

    return remove


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no train": (remove_folder("train"), "has no folder train/"),
    "no val": (remove_folder("val"), "has no folder val/"),
    "no classes": (lambda root: (remove_folder("val")(root), (root / "val").mkdir()), "val holds no class folders"),
    "an empty class": (remove_all("train/class1"), "class folder .*class1 holds no images"),
    "no images": (remove_all("val"), "class folder .*class0 holds no images"),
    "one class": (
        lambda root: [(root / split / "class1").rename(root / f"gone-{split}") for split in ("train", "val")],
        r"holds one class only \(class0\)",
    ),
    "a class in train only": (remove_folder("val/class1"), "differ: only in train: class1"),
    "a class in val only": (remove_folder("train/class1"), "differ: only in val: class1"),
    "a truncated image": (truncate, r"004\.png cannot be decoded .*--skip-corrupt"),
    "a text with an image's name": (
        lambda root: (root / "val/class0/001.png").write_text("hello"),
        r"001\.png is no image that can be read",
    ),
    "an empty file": (lambda root: (root / "val/class0/001.png").write_bytes(b""), r"001\.png is no image"),
    "a large image": (
        lambda root: Image.new("RGB", (1001, 1000)).save(root / "train/class0/009.png"),
        r"009\.png is 1001 x 1000 pixels, more than the limit of 1 million",
    ),
    "a gigantic image": (
        lambda root: Image.new("1", (20000, 20000)).save(root / "train/class0/009.png"),
        r"009\.png has far more pixels than the limit of 1 million",
    ),
    "a link to nothing": (
        lambda root: (root / "train/class0/009.png").symlink_to(root / "nowhere"),
        r"009\.png cannot be decoded .*No such file",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_wrong_with_a_tree_is_said(tmp_path: Path, name: str) -> None:
    break_it, message = MISTAKES[name]
    break_it(write_tree(tmp_path / "tree"))
    with pytest.raises(DataError, match=message):
        load(tmp_path / "tree")


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(DataError, match="is no folder; expected one that holds train/CLASS"):
            load(place)


def test_without_a_cache_the_first_image_of_a_class_is_tried(tmp_path: Path) -> None:
    write_tree(tmp_path)
    truncate(tmp_path)
    assert len(load(tmp_path, cache_mb=0).train) == 16
    (tmp_path / "train" / "class1" / "000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000\.png"):
        load(tmp_path, cache_mb=0)


@pytest.mark.parametrize("cache_mb", [0, 10])
def test_an_unreadable_image_is_replaced_and_named(tmp_path: Path, cache_mb: int) -> None:
    write_tree(tmp_path)
    truncate(tmp_path)
    images = load(tmp_path, cache_mb=cache_mb, skip_corrupt=True).train
    planned, _ = plan_batch(images, 0, batch_size=16, seed=0, augmentation=Augmentation(0, flip=False))
    pixels, taken, skipped = readable_batch(images, planned)
    labels = images.labels[taken]
    assert list(skipped) == [str(tmp_path / "train" / "class1" / "004.png")]
    assert "cannot be decoded" in next(iter(skipped.values()))
    order = epoch_order(16, 0, 0)
    bad = int(np.flatnonzero(order == 12)[0])
    np.testing.assert_array_equal(pixels[bad], images.read(np.array([13]))[0][0])
    assert labels.tolist() == [int(i >= 8) for i in order]


def test_no_readable_image_is_an_error(tmp_path: Path) -> None:
    write_tree(tmp_path)
    images = load(tmp_path, cache_mb=0, skip_corrupt=True).train
    for file in images.files:
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 16 training images can be read"):
        readable_batch(images, np.arange(4))
    with pytest.raises(DataError, match="none of the 16 images"):
        load(tmp_path, skip_corrupt=True)


def test_digits_are_split_once(tmp_path: Path) -> None:
    images = load_digits(16)
    assert (len(images.train), len(images.held_out)) == (1437, 360)
    assert not set(images.train.names) & set(images.held_out.names)
    assert np.bincount(images.held_out.labels).min() > 20
    pixels, _ = images.held_out.read(np.arange(360))
    assert pixels.shape == (360, 16, 16, 3)
    assert pixels.max() == 255


def test_an_epoch_shows_every_image_once() -> None:
    images = load_digits(8).train
    shown = []
    for step in range(14):
        indices, crops = plan_batch(images, step, batch_size=100, seed=1, augmentation=Augmentation(2, flip=True))
        np.testing.assert_array_equal(indices, epoch_order(1437, 1, 0)[100 * step : 100 * step + 100])
        np.testing.assert_array_equal(crops, epoch_augmentation(1437, 1, 0, 2)[indices])
        np.testing.assert_array_equal(readable_batch(images, indices)[0], images.read(indices)[0])
        shown += indices.tolist()
    assert len(set(shown)) == 1400
    assert (epoch_order(1437, 1, 1) != epoch_order(1437, 1, 0)).any()
    assert (epoch_order(1437, 2, 0) != epoch_order(1437, 1, 0)).any()


def test_a_crop_is_a_shift_and_a_mirror() -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (3, 6, 6, 3), dtype=np.uint8)
    where = torch.tensor([[2, 2, 0], [0, 1, 0], [3, 4, 1]])
    out = crop(torch.from_numpy(pixels), where, 2).numpy()
    np.testing.assert_array_equal(out[0], pixels[0])
    np.testing.assert_array_equal(out[1][2:, 1:], pixels[1][:4, :5])
    assert (out[1][:2] == 0).all()
    np.testing.assert_array_equal(out[2][:5, ::-1][:, :4], pixels[2][1:, 2:])
    assert out.dtype == np.uint8


def test_crops_are_uniform_and_half_are_mirrored() -> None:
    table = epoch_augmentation(20_000, 0, 0, 2)
    assert table.min(axis=0).tolist() == [0, 0, 0]
    assert table.max(axis=0).tolist() == [4, 4, 1]
    np.testing.assert_allclose(table.mean(axis=0), [2, 2, 0.5], atol=0.04)
    assert abs(np.corrcoef(table.T) - np.eye(3)).max() < 0.03


def test_a_zoomed_crop_is_the_part_asked_for() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8))
    whole, mirrored, part = [0, 0, 0, 1, 1], [1, 0, 0, 1, 1], [0, 0.5, 0.25, 0.5, 0.5]
    out = crop(pixels, torch.tensor([whole, mirrored, part]), 0)
    torch.testing.assert_close(out[0], pixels[0].float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(out[1], pixels[1].flip(1).float(), rtol=0, atol=1e-3)
    square = pixels[2, 4:, 2:6].permute(2, 0, 1)[None].float()
    enlarged = torch.nn.functional.interpolate(square, size=8, mode="bilinear")[0].permute(1, 2, 0)
    # One pixel inside: at the edge the part borders on more image, the square on nothing.
    torch.testing.assert_close(out[2][1:-1, 1:-1], enlarged[1:-1, 1:-1], rtol=0, atol=1e-3)


def test_zoomed_crops_lie_inside_the_image() -> None:
    table = epoch_zoom(20_000, 0, 0, 0.35)
    top, left, height, width = table.T
    assert table.min() >= 0
    assert (top + height).max() <= 1 + 1e-6
    assert (left + width).max() <= 1 + 1e-6
    assert 0.34 < (height * width).min() < 0.36
    assert 1.3 < (width / height).max() < 4 / 3 + 1e-5
    assert (epoch_zoom(20, 0, 1, 0.35) != epoch_zoom(20, 0, 0, 0.35)).any()


def test_a_packed_tree_is_the_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, file = write_tree(tmp_path / "tree"), tmp_path / "packed.safetensors"
    truncate(tree)
    assert _cli.run(pack.command, [str(tree), str(file)]) == 0
    assert "22 images" in capsys.readouterr().out
    for cache_mb in (0, 10):
        options: dict[str, Any] = {"size": 16, "cache_mb": cache_mb, "max_pixels": LIMIT, "skip_corrupt": True}
        packed, loose = load_packed(file, **options), load_folder(str(tree), **options)
        assert packed.fingerprint == loose.fingerprint
        assert packed.classes == loose.classes
        for one, other in ((packed.held_out, loose.held_out), (packed.train, loose.train)):
            pixels, problems = one.read(np.arange(len(one)))
            expected, as_well = other.read(np.arange(len(other)))
            np.testing.assert_array_equal(pixels, expected)
            np.testing.assert_array_equal(one.labels, other.labels)
            assert problems.keys() == as_well.keys()
        assert "packed.safetensors/train/class1/004.png cannot be decoded" in one.read(np.array([12]))[1][0]


def test_files_that_are_no_packed_tree(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    options = {"size": 16, "cache_mb": 1, "max_pixels": 10**6, "skip_corrupt": False}
    with pytest.raises(DataError, match="is no packed tree"):
        load_packed(file, **options)
    file.write_bytes(b"\x80\x05 a pickle")
    with pytest.raises(DataError, match="is no packed tree"):
        load_packed(file, **options)
    save_file({"bytes": np.zeros(4, np.uint8), "offsets": np.array([0, 9]), "names": np.zeros(3, np.uint8)}, file)
    with pytest.raises(DataError, match="is no packed tree"):
        load_packed(file, **options)


def write_shards(root: Path, tree: Path, *, classes: tuple[str, ...] = ("0", "1")) -> Path:
    """The tree in two shards a split."""
    for split in ("train", "val"):
        files = sorted((tree / split).glob("*/*.png"))
        for number in range(2):
            shard = root / split / f"part-{number}.tar"
            shard.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(shard, "w") as archive:
                for file in files[number::2]:
                    key = f"{file.parent.name}-{file.stem}"
                    archive.add(file, f"{key}.png")
                    label = classes[int(file.parent.name[-1])].encode()
                    entry = tarfile.TarInfo(f"{key}.cls")
                    entry.size = len(label)
                    archive.addfile(entry, io.BytesIO(label))
    return root


def test_shards_hold_the_tree(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    root = write_shards(tmp_path / "shards", tree)
    assert holds_shards(root)
    assert not holds_shards(tree)
    options: dict[str, Any] = {"size": 16, "max_pixels": LIMIT, "skip_corrupt": False}
    loose = load_folder(str(tree), cache_mb=1, **options).train
    assert loose.pixels is not None
    for cache_mb in (0, 1):
        images = load_shards(root, cache_mb=cache_mb, **options)
        assert images.classes == ("0", "1")
        assert len(images.held_out) == 6
        pixels, problems = images.train.read(np.arange(16))
        assert not problems
        # Within a class a shard after the other: even files, then odd ones.
        order = [*range(0, 8, 2), *range(1, 8, 2), *range(8, 16, 2), *range(9, 16, 2)]
        np.testing.assert_array_equal(pixels, loose.pixels[order])
        np.testing.assert_array_equal(images.train.labels, loose.labels)


def test_shards_that_are_damaged(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    options: dict[str, Any] = {"size": 16, "max_pixels": LIMIT, "skip_corrupt": False, "cache_mb": 0}
    root = write_shards(tmp_path / "a", tree, classes=("0", "one"))
    with pytest.raises(DataError, match=r"part-0\.tar cannot be read"):
        load_shards(root, **options)
    root = write_shards(tmp_path / "b", tree)
    shard = root / "train" / "part-1.tar"
    shard.write_bytes(b"\x80\x04 no archive" * 100)
    with pytest.raises(DataError, match=r"part-1\.tar cannot be read"):
        load_shards(root, **options)
    with tarfile.open(shard, "w") as archive:
        archive.add(tree / "train" / "class0" / "000.png", "a.png")
    with pytest.raises(DataError, match=r"holds a\.png but no a\.cls"):
        load_shards(root, **options)
    for file in (root / "val").iterdir():
        file.unlink()
    shard.unlink()
    with pytest.raises(DataError, match="holds no shards with images"):
        load_shards(root, **options)


def test_the_centre_of_an_image(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", width=40, height=20)
    whole = np.asarray(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 20, LIMIT), whole[:, 10:30])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 10, LIMIT, crop_share=0.5), whole[5:15, 15:25])
    smooth = read_image(tmp_path / "a.png", 30, LIMIT, interpolation="bicubic")
    expected = Image.fromarray(whole).resize((60, 30), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(smooth, np.asarray(expected)[:, 15:45])
