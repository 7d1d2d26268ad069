"""Few-shot heads: features of labelled supports and of a query -> the query's segmentation, one class an episode.

A head is made of the channels C of its features. ``forward(support, mask, query)`` takes E episodes of K shots,
features (E, K, C, h, w), the support labels averaged onto the grid (E, K, h, w), and the query's features
(E, C, h, w), and gives one foreground logit (E, h, w), the foreground's score minus the background's.
``loss(support, mask, query, label)`` with the query's label (E, H, W) in {0, 1} gives the episodes' losses (E,).
"""

from torch import nn

from blosam_monai.networks.few_shot.biopt import BiOpt
from blosam_monai.networks.few_shot.hsnet import HSNet
from blosam_monai.networks.few_shot.panet import PANet
from blosam_monai.networks.few_shot.ppnet import PPNet
from blosam_monai.networks.few_shot.rpmms import RPMMs
from blosam_monai.networks.few_shot.ssp import SSP

HEADS: dict[str, type[nn.Module]] = {
    "biopt": BiOpt,
    "hsnet": HSNet,
    "panet": PANet,
    "ppnet": PPNet,
    "rpmms": RPMMs,
    "ssp": SSP,
}

__all__ = ["HEADS", "SSP", "BiOpt", "HSNet", "PANet", "PPNet", "RPMMs"]
