"""BLO-SAM's loss, one value a task."""

from __future__ import annotations

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn


class TaskDiceCELoss(nn.Module):
    """``(1 - l) cross-entropy + l Dice`` of each task: logits (B, T, H, W), target (B, T, H, W) in {0, 1} -> (T,).

    MONAI's ``DiceCELoss`` does the work, with the arguments that equal BLO-SAM's loss: softmax over background and
    foreground, both counted, squared denominators, sums over the batch. One foreground logit z stands for the pair
    (0, z): softmax over two equals the sigmoid of the difference. MONAI's reductions mix channels, hence the mapping
    over tasks here.

    Args:
        dice_weight: l in [0, 1]; the paper's 0.8.

    Source: Zhang et al. 2024, section 3; published code, ``calc_loss``.
    """

    def __init__(self, dice_weight: float = 0.8) -> None:
        super().__init__()
        if not 0 <= dice_weight <= 1:
            raise ValueError(f"dice_weight: {dice_weight} is not in [0, 1].")
        self.dice_ce = DiceCELoss(
            include_background=True,
            to_onehot_y=True,
            softmax=True,
            squared_pred=True,
            batch=True,
            smooth_nr=1e-5,
            smooth_dr=1e-5,
            lambda_dice=dice_weight,
            lambda_ce=1 - dice_weight,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, H, W) and binary target of the same shape -> loss (T,)."""
        if input.shape != target.shape:
            raise ValueError(f"loss: logits have shape {tuple(input.shape)}, target {tuple(target.shape)}.")
        pair = torch.stack((torch.zeros_like(input), input), dim=2)  # (B, T, 2, H, W)
        return torch.stack([self.dice_ce(pair[:, t], target[:, t : t + 1]) for t in range(input.shape[1])])
