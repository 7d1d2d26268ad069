"""PPNet: its clusters against another library's, and what parts are good for."""

import numpy as np
import torch
from scipy.cluster.vq import kmeans2

from blosam_monai.networks.few_shot import PANet, PPNet
from blosam_monai.networks.few_shot.ppnet import k_means
from blosam_monai.networks.few_shot.prototypes import farthest_points


def test_clusters_are_scipys_from_the_same_start():
    rng = np.random.default_rng(0)
    pixels = torch.tensor(rng.normal(size=(1, 200, 4)) + 3 * rng.integers(0, 2, size=(1, 200, 4)))
    foreground = torch.tensor(rng.random((1, 200)) < 0.5).double()
    weights = torch.stack((1 - foreground, foreground), dim=1)
    start, centres = farthest_points(pixels, weights, 5), k_means(pixels, weights, 5, iterations=20)
    for c in (0, 1):
        own = pixels[0, weights[0, c] > 0].numpy()
        expected, _ = kmeans2(own, start[0, c].numpy(), iter=20, minit="matrix", missing="raise")
        np.testing.assert_allclose(centres[0, c].numpy(), expected, rtol=1e-9)


def test_a_pixel_of_weight_two_counts_as_two():
    pixels = torch.tensor([[[0.0], [3.0], [10.0], [11.0]]])
    weights = torch.tensor([[[2.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]]])
    centres = k_means(pixels, weights, 2, iterations=5)
    assert sorted(centres[0, 0, :, 0].tolist()) == [1.0, 10.5]  # (0 + 0 + 3) / 3 and (10 + 11) / 2


def test_a_class_without_a_pixel_has_zero_vectors():
    centres = k_means(torch.rand(1, 6, 3), torch.stack((torch.ones(1, 6), torch.zeros(1, 6)), 1), 4, iterations=3)
    assert centres[0, 1].abs().max() == 0


def test_one_part_is_panet():
    torch.manual_seed(0)
    support, query, mask = torch.randn(2, 1, 4, 6, 6), torch.randn(2, 4, 6, 6), (torch.rand(2, 1, 6, 6) > 0.5).float()
    torch.testing.assert_close(PPNet(4, parts=1)(support, mask, query), PANet(4)(support, mask, query))


def test_parts_find_a_class_whose_mean_looks_like_the_background():
    # foreground (1, 1) and (-1, 1), background (0, 1) and (0.1, 1): the mean of the foreground is background
    support = torch.tensor([[[[[1.0, -1.0, 0.0, 0.1]], [[1.0, 1.0, 1.0, 1.0]]]]])
    mask = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])
    assert (PANet(2)(support, mask, support[:, 0]) > 0).flatten().tolist() != [True, True, False, False]
    assert (PPNet(2, parts=2)(support, mask, support[:, 0]) > 0).flatten().tolist() == [True, True, False, False]
