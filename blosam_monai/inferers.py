"""Inferers: how an engine calls the network, for embeddings, pictures and volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from torch import Tensor
from tqdm import tqdm

from blosam_monai.data.geometry import SLICE_AXES, Orientation, turn
from blosam_monai.networks.prompted_sam import label_prompts
from blosam_monai.networks.segmenter import Segmenter
from blosam_monai.transforms import PREPROCESS, label_to_input, picture_of, preprocess_picture, restore_logits

_LONG = 16  # slices: fewer need no progress bar of their own


class EmbeddingInferer(Inferer):
    """Decode image embeddings that were computed before: (B, C, h, w) -> logits (B, T, S, S)."""

    def __call__(self, inputs: Any, network: Segmenter, *args: Any, **kwargs: Any) -> Tensor:
        """Decode a batch of embeddings."""
        return network.decode(inputs)


class SliceStreamInferer(Inferer):
    """A case of any number of slices (C, D, H, W), 0 to 255 -> its prediction on the same grid, slice by slice.

    A picture is a case of one slice. What is kept of a slice is what ``decide`` makes of its logits, so that memory
    grows with the output only. MONAI's ``SliceInferer`` gathers the logits of all slices at the network's size.

    Args:
        image_size, preprocess: see ``PreprocessImaged``.
        decide: logits of a slice (T, H, W) -> what is kept of it, (..., H, W); None: the logits, in half precision if
            there are several slices.
        average_axes: average the logits over slices along all three axes; costs three times the time, and the logits
            of the whole volume in half precision.
        neighbours: as the channels were made, see ``data.windows``; such channels belong to one axis.
        batch_size: slices in one call of the network.
    """

    def __init__(
        self,
        image_size: int,
        preprocess: str = "sam",
        *,
        decide: Callable[[Tensor], Tensor] | None = None,
        average_axes: bool = False,
        neighbours: int = 0,
        batch_size: int = 1,
    ) -> None:
        if preprocess not in PREPROCESS:
            raise ValueError(f"preprocess: {preprocess!r} is not one of {', '.join(PREPROCESS)}.")
        if average_axes and neighbours:
            raise ValueError(
                f"average_axes: the model was trained with neighbours={neighbours} along one axis; leave "
                "average_axes out."
            )
        self.image_size, self.preprocess, self.decide = image_size, preprocess, decide
        self.average_axes, self.batch_size = average_axes, batch_size

    @torch.no_grad()
    def __call__(
        self,
        inputs: Tensor,
        network: Segmenter,
        *args: Any,
        spacing: Sequence[float] = (1, 1, 1),
        slice_axis: str = "axial",
        label: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Segment a case.

        Args:
            inputs: (C, D, H, W), C = 1 or 3, upright slices; or a batch of such.
            network: on its own device.
            spacing: of D, H and W.
            slice_axis: what D runs along; matters for ``average_axes`` only.
            label: (T, D, H, W), from which a network that is ``prompted`` takes its prompts; no other looks at it.

        Returns:
            (..., D, H, W) on the CPU, see ``decide``; logits are (T, D, H, W).
        """
        if inputs.ndim == 5:
            labels = [None] * len(inputs) if label is None else label
            pairs = zip(inputs, labels, strict=True)
            return torch.stack([self(c, network, spacing=spacing, slice_axis=slice_axis, label=t) for c, t in pairs])
        if self.average_axes and inputs.shape[1] > 1:
            if network.prompted:
                raise ValueError("average_axes: prompts from a label belong to one axis; leave average_axes out.")
            return self._average(inputs, network, spacing, slice_axis)
        kept: Tensor | None = None
        for d, logits in self._stream(inputs, network, spacing[1:], label):
            plane = logits if self.decide is None else self.decide(logits)
            if kept is None:
                half = self.decide is None and inputs.shape[1] > 1
                shape = (*plane.shape[:-2], inputs.shape[1], *plane.shape[-2:])
                kept = torch.empty(shape, dtype=torch.float16 if half else plane.dtype)
            kept[..., d, :, :] = plane
        assert kept is not None
        return kept

    def _average(self, inputs: Tensor, network: Segmenter, spacing: Sequence[float], slice_axis: str) -> Tensor:
        total = np.zeros((len(network.tasks), *inputs.shape[1:]), np.float16)
        for axis in SLICE_AXES:
            turned = turn(slice_axis, axis)
            view = _turn_spatial(total, turned)  # writing to it writes to the total
            sizes = [spacing[a] for a in turned.order][1:]
            stack = torch.from_numpy(np.ascontiguousarray(_turn_spatial(inputs.numpy(), turned)))
            for d, logits in self._stream(stack, network, sizes):
                view[:, d] += (logits / len(SLICE_AXES)).half().cpu().numpy()
        mean = torch.from_numpy(total)
        if self.decide is None:
            return mean
        planes = [self.decide(plane.float()) for plane in mean.unbind(1)]
        return torch.stack(planes, dim=planes[0].ndim - 2)

    def _stream(self, stack: Tensor, network: Segmenter, spacing: Sequence[float], label: Tensor | None = None) -> Any:
        """Yield (number, logits (T, H, W)) of every slice."""
        device = next(network.parameters()).device
        depth, native = stack.shape[1], stack.shape[2:]
        numbers = tqdm(range(depth), "slices", leave=False, disable=depth < _LONG)
        for first in range(0, depth, self.batch_size):
            pictures = (picture_of(plane) for plane in stack[:, first : first + self.batch_size].to(device).unbind(1))
            prepared = [preprocess_picture(p, self.image_size, self.preprocess, spacing=spacing) for p in pictures]
            batch = torch.stack([network_input for network_input, _ in prepared])  # (B, 3, S, S)
            prompts = [
                label_prompts(label_to_input(label[:, number].float(), (h, w), self.image_size)[:, :h, :w]).to(device)
                for number, (_, (h, w)) in enumerate(prepared, first)
                if network.prompted and label is not None
            ]
            predicted = network(batch, torch.stack(prompts)) if prompts else network(batch)
            for number, logits in enumerate(predicted, first):
                numbers.update()
                yield number, restore_logits(logits, prepared[0][1], native).float()


def _turn_spatial(values: np.ndarray, turned: Orientation) -> np.ndarray:
    """Turn the last three axes of (C, D, H, W), a view."""
    return np.moveaxis(turned.apply(np.moveaxis(values, 0, -1)), -1, 0)
