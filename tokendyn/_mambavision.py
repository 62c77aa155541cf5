"""What MambaVision is on every backend: the sizes offered, and what its options must obey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokendyn import _checks as check
from tokendyn.errors import OptionError

PARITIES = ("clean", "published")

#: Models for small images, whose stages 3 and 4 see all 8 x 8 = 64 places at once: the options of each.
SIZES: dict[str, dict[str, Any]] = {
    "mambavision_16px": {
        "dims": (16, 24, 32, 48),
        "in_dim": 16,
        "depths": (1, 1, 2, 2),
        "num_heads": (2, 3),
        "window_size": (8, 8),
        "stem_stride": 2,
        "downsample": (False, False, False),
        "mlp_ratio": 2.0,
    },
    "mambavision_32px": {
        "dims": (48, 96, 192, 256),
        "in_dim": 32,
        "depths": (1, 2, 4, 2),
        "num_heads": (6, 8),
        "window_size": (8, 8),
        "stem_stride": 1,
        "downsample": (True, True, False),
    },
    "mambavision_64px": {
        "dims": (48, 96, 192, 384),
        "in_dim": 32,
        "depths": (1, 2, 4, 2),
        "num_heads": (6, 12),
        "window_size": (8, 8),
        "stem_stride": 2,
        "downsample": (True, True, False),
    },
}


def sized(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of the small model ``name``, overridden by those given."""
    return {"num_classes": 10, "drop_path_rate": 0.0, **SIZES[name], **options}


def expect_mixer(d_model: int, d_conv: int, expand: float, parity: str) -> int:
    """Check the options of the mixer; the channels of its two halves together.

    Raises:
        OptionError: an option is out of range or contradicts another.
    """
    check.expect_size("MambaVisionMixer", "d_model", d_model)
    check.expect_size("MambaVisionMixer", "d_conv", d_conv)
    check.expect_choice("MambaVisionMixer", "parity", parity, PARITIES)
    both = int(expand * d_model)
    if both % 2 or d_conv % 2 == 0:
        raise OptionError(
            f"MambaVisionMixer: d_model = {d_model}, expand = {expand}, d_conv = {d_conv}; expected an even "
            f"expand * d_model, for it is split in two halves, and an odd d_conv, for the kernel is centred"
        )
    return both


def expect_options(
    *,
    dims: Sequence[int],
    in_dim: int,
    in_chans: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: Sequence[int],
    downsample: Sequence[bool],
    order_blocks: Sequence[int],
    drop_path_rate: float,
    parity: str,
) -> tuple[int, int]:
    """Check the options; the number of selective mixers in stages 3 and 4. Without an order give no order_blocks.

    Raises:
        OptionError: an option is out of range or contradicts another.
    """
    check.expect_choice("MambaVision", "parity", parity, PARITIES)
    for name, values, count in (
        ("dims", dims, 4),
        ("depths", depths, 4),
        ("num_heads", num_heads, 2),
        ("window_size", window_size, 2),
        ("downsample", downsample, 3),
    ):
        if len(values) != count:
            raise OptionError(f"MambaVision: {name} is {values!r}, expected {count} values")
        for value in () if name == "downsample" else values:
            check.expect_size("MambaVision", f"an entry of {name}", value)
    check.expect_size("MambaVision", "in_dim", in_dim)
    check.expect_size("MambaVision", "in_chans", in_chans)
    selective = (depths[2] + 1) // 2, (depths[3] + 1) // 2
    for index in order_blocks:
        if not 0 <= index < min(selective):
            raise OptionError(
                f"MambaVision: order_blocks holds {index}, expected indices of selective mixers: with depths = "
                f"{tuple(depths)} these are 0 to {min(selective) - 1}"
            )
    if not 0 <= drop_path_rate < 1:
        raise OptionError(f"MambaVision: drop_path_rate is {drop_path_rate!r}, expected 0 <= rate < 1")
    return selective
