"""From an image's own intensities to the gray values 0 to 255 that SAM was trained on.

A window is asked for in one of these forms:

- ``None``: the image's full range where its format has one (8 bits; a 16-bit picture's own minimum and maximum), else
  the percentiles 0.5 and 99.5;
- ``[low, high]``: in the image's unit, Hounsfield units for CT;
- ``[[low, high], [low, high], [low, high]]``: three windows of one image as the three channels;
- ``{"percentiles": [0.5, 99.5]}`` of the whole image;
- ``{"zscore": 3}``: mean plus and minus so many standard deviations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blosam_monai.data.geometry import Image, Orientation

Window = None | Sequence[Any] | Mapping[str, Any]

DEFAULT_PERCENTILES = (0.5, 99.5)  # as MedSAM prepares MR (Ma et al. 2024, methods)
_SAMPLE = 4_000_000  # voxels that statistics are taken of; every n-th along each axis of a larger volume


def check_window(window: Window) -> Window:
    """The window, if it has one of the forms above.

    Raises:
        ValueError: it has not.
    """
    try:
        if isinstance(window, Mapping):
            ((name, value),) = window.items()
            low, high = (-value, value) if name == "zscore" else value
            valid = name in ("zscore", "percentiles") and _is_range(low, high)
            valid = valid and (name == "zscore" or (low >= 0 and high <= 100))
        elif window is None:
            valid = True
        else:
            pairs = window if isinstance(window[0], Sequence) else [window]
            valid = len(pairs) in (1, 3) and all(_is_range(low, high) for low, high in pairs)
    except (TypeError, ValueError, IndexError):
        valid = False
    if not valid:
        raise ValueError(
            f"window: {window!r} is not [low, high], three of these, "
            '{"percentiles": [0.5, 99.5]} or {"zscore": 3}; see docs/reference/config.md.'
        )
    return window


def window_channels(window: Window) -> int:
    """Number of channels that a window gives, 1 or 3."""
    return 3 if isinstance(window, Sequence) and len(window) == 3 else 1


def _is_range(low: Any, high: Any) -> bool:
    """Whether two values are finite numbers in order; NumPy raises TypeError on anything but numbers."""
    return bool(np.isfinite([low, high]).all()) and low < high


def channel_ranges(image: Image, window: Window) -> list[tuple[float, float]]:
    """The intensities shown as black and white, one pair a channel: 1 or 3.

    Raises:
        ValueError: a window for a colour picture.
    """
    if image.values.ndim == 4:
        if window is not None:
            raise ValueError(f"{image.path}: is in colour, a window is for gray images; leave window out.")
        return [(0.0, 255.0)]
    if isinstance(window, Mapping):
        return [_measure(image.values, window)]
    if window is not None:
        pairs = window if isinstance(window[0], Sequence) else [window]
        return [(float(low), float(high)) for low, high in pairs]
    return [image.full_range or _measure(image.values, {"percentiles": DEFAULT_PERCENTILES})]


def display_stack(
    image: Image, orientation: Orientation, window: Window = None, *, neighbours: int = 0, number: int | None = None
) -> np.ndarray:
    """Upright slices as SAM sees them: (C, D, H, W) of 0 to 255, C = 1 gray or 3.

    Several slices are kept in 8 bits, the depth of SAM's own training pictures; a single one in float32.

    Args:
        image, window: see the module.
        orientation: see ``upright``.
        neighbours: not 0: the three channels are the slice so many before, the slice and the one so many after.
        number: only this slice; D is then 1.

    Raises:
        ValueError: no such slice, or neighbours of a colour image or beside three windows.
    """
    stack = orientation.apply(image.values)  # (D, H, W) or (D, H, W, 3)
    ranges = channel_ranges(image, window)
    depth = stack.shape[0]
    if neighbours and (stack.ndim == 4 or len(ranges) == 3):
        raise ValueError(f"{image.path}: neighbours need gray slices and one window.")
    if number is not None and not 0 <= number < depth:
        raise ValueError(f"{image.path}: slice {number} asked for, it has {depth} (0 to {depth - 1}).")
    wanted = range(depth) if number is None else (number,)
    channels = 3 if stack.ndim == 4 or neighbours else len(ranges)
    result = np.empty((channels, len(wanted), *stack.shape[1:3]), np.float32 if len(wanted) == 1 else np.uint8)
    offsets = (-neighbours, 0, neighbours) if neighbours else (0,)
    for place, d in enumerate(wanted):
        shown = [
            _display(stack[min(max(d + offset, 0), depth - 1)], low, high) for offset in offsets for low, high in ranges
        ]
        values = shown[0].transpose(2, 0, 1) if stack.ndim == 4 else np.stack(shown)
        result[:, place] = np.rint(values) if result.dtype == np.uint8 else values
    return result


def _display(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Intensities as float32 gray values, 0 at ``low`` and below, 255 at ``high`` and above."""
    return (np.clip(values.astype(np.float32), low, high) - low) * np.float32(255 / (high - low))


def _measure(values: np.ndarray, window: Mapping[str, Any]) -> tuple[float, float]:
    """The range that a statistic of the image gives; its whole range where that is empty."""
    step = int(np.ceil(max(1.0, values.size / _SAMPLE) ** (1 / 3)))
    sample = np.asarray(values[tuple(slice(None, None, min(step, n)) for n in values.shape)], np.float64)
    if "zscore" in window:
        mean, reach = sample.mean(), window["zscore"] * sample.std()
        low, high = mean - reach, mean + reach
    else:
        low, high = np.percentile(sample, window["percentiles"])
    return (float(low), float(high)) if low < high else (float(values.min()), float(values.max()))
