"""The loss of BLO-SAM, task by task."""

import pytest
import torch
from monai.losses import DiceCELoss

from blosam_monai.losses import TaskDiceCELoss


def paper_loss(pair: torch.Tensor, target: torch.Tensor, dice_weight: float = 0.8) -> torch.Tensor:
    """The loss as the paper's code defines it, written out: logits (B, 2, H, W), target (B, H, W)."""
    probability = pair.softmax(1)
    cross_entropy = -probability.gather(1, target[:, None]).log().mean()
    dice = 0.0
    for c in (0, 1):
        p, y = probability[:, c], (target == c).float()
        dice += 1 - (2 * (p * y).sum() + 1e-5) / (p.square().sum() + y.square().sum() + 1e-5)
    return (1 - dice_weight) * cross_entropy + dice_weight * dice / 2


def test_each_task_has_the_loss_that_the_paper_writes_out():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.randint(0, 2, (2, 3, 16, 16)).double()
    losses = TaskDiceCELoss()(logits, target)
    assert losses.shape == (3,)
    for t in range(3):
        pair = torch.stack((torch.zeros_like(logits[:, t]), logits[:, t]), 1)
        assert losses[t].item() == pytest.approx(
            paper_loss(pair, target[:, t].long()).item(), abs=1e-7
        )  # MONAI counts in float32


def test_one_foreground_logit_is_worth_two_mask_tokens():
    torch.manual_seed(0)
    pair, target = torch.randn(2, 2, 16, 16, dtype=torch.float64), torch.randint(0, 2, (2, 1, 16, 16)).double()
    difference = (pair[:, 1] - pair[:, 0])[:, None]
    two = DiceCELoss(
        to_onehot_y=True,
        softmax=True,
        squared_pred=True,
        batch=True,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
        lambda_dice=0.8,
        lambda_ce=0.2,
    )(pair, target)
    assert TaskDiceCELoss()(difference, target).item() == pytest.approx(two.item(), abs=1e-12)


def test_a_target_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\).*\(1, 1, 8, 8\)"):
        TaskDiceCELoss()(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 8, 8))
