"""A few-shot head as a segmenter: what it remembers, and what it compares with what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blosam_monai.networks.adapters import build_network
from blosam_monai.networks.few_shot import HEADS
from blosam_monai.networks.few_shot.segmenter import FewShotNet, RememberingDecoder


class FirstShots(nn.Module):
    """Stands in for a head: its logit is the sum of the first channel of all supports, and it notes the masks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.masks: list[Tensor] = []

    def forward(self, support, mask, query):
        self.masks.append(mask)
        return self.weight * support[:, :, 0].sum(1)  # (E, h, w)


def items(count: int, *, tasks: int = 1) -> list[dict[str, Tensor]]:
    """Features (2, 4, 4) full of 1, 2, 4, ... and labels (T, 8, 8) of ones."""
    return [{"embedding": torch.full((2, 4, 4), 2.0**n), "label": torch.ones(tasks, 8, 8)} for n in range(count)]


def remembering(shown: list[dict[str, Tensor]], *, tasks: int = 1) -> RememberingDecoder:
    decoder = RememberingDecoder(FirstShots(), tasks, 8)
    decoder.remember(shown)
    return decoder


def test_a_new_image_is_compared_with_all_that_are_remembered():
    logits = remembering(items(3))(torch.zeros(1, 2, 4, 4))
    assert logits.shape == (1, 1, 8, 8)
    assert (logits == 1 + 2 + 4).all()


def test_a_remembered_image_does_not_support_itself():
    shown = items(3)
    logits = remembering(shown)(torch.stack([item["embedding"] for item in shown]))
    assert logits[:, 0, 0, 0].tolist() == [2 + 4, 1 + 4, 1 + 2]


def test_a_task_that_nobody_shows_is_empty_and_the_others_are_as_without_it():
    shown = items(2, tasks=3)
    for item in shown:
        item["label"][1] = 0
    logits = remembering(shown, tasks=3)(torch.zeros(1, 2, 4, 4))
    assert (logits[0, 1] < -50).all()
    assert (logits[0, (0, 2)] == 3).all()


def test_a_task_that_only_the_image_itself_shows_is_empty_there():
    shown = items(2)
    shown[1]["label"].zero_()
    assert (remembering(shown)(shown[0]["embedding"][None]) < -50).all()


def test_masks_are_averaged_onto_the_grid_of_the_features():
    shown = items(1)
    shown[0]["label"] = torch.zeros(1, 8, 8)
    shown[0]["label"][0, 0, :3] = 1  # of the places of 2 x 2 pixels: two of four, then one
    decoder = remembering(shown)
    decoder(torch.zeros(1, 2, 4, 4))
    (mask,) = decoder.head.masks
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0, 0].tolist() == [0.5, 0.25, 0, 0]
    assert not mask[0, 0, 1:].any()


def test_without_remembered_images_it_says_so():
    with pytest.raises(ValueError, match=r"head: no labelled images are remembered; call remember\(\) first"):
        RememberingDecoder(FirstShots(), 1, 8)(torch.zeros(1, 2, 4, 4))


def test_the_state_comes_back_with_another_number_of_images():
    first, second = remembering(items(4)), remembering(items(2))
    first.head.weight.data.fill_(3)
    second.load_adapter_state(first.adapter_state())
    assert (second(torch.zeros(1, 2, 4, 4)) == 3 * (1 + 2 + 4 + 8)).all()
    assert first.exported(first.adapter_state())[1] == {"remembered": 4}


def test_a_state_without_its_images_is_refused():
    state = remembering(items(2)).adapter_state()
    del state["support"]
    with pytest.raises(ValueError, match=r"adapters: .*\['support'\]"):
        remembering(items(2)).load_adapter_state(state)


@pytest.mark.parametrize("head", sorted(set(HEADS) - {"hsnet"}))
def test_logits_are_those_of_the_head_called_by_hand(head):
    network = FewShotNet(head, 64, ("lung", "heart"), sam_checkpoint="random").eval()
    torch.manual_seed(0)
    images, label = torch.randn(3, 3, 64, 64), (torch.rand(2, 2, 32, 32) > 0.6).float()
    with torch.no_grad():
        features = network.encode(images)
        network.decoder.remember([{"embedding": features[n], "label": label[n]} for n in range(2)])
        found = network(images[2:])
        for t in range(2):
            mask = F.avg_pool2d(label[:, t], 4)  # 32 x 32 pixels, 8 x 8 places
            alone = network.decoder.head(features[None, :2], mask[None], features[2:])  # (1, 8, 8)
            grid = F.interpolate(alone[None], (32, 32), mode="bilinear", align_corners=False)
            expected = F.interpolate(grid, (64, 64), mode="bilinear", align_corners=False)[0, 0]
            torch.testing.assert_close(found[0, t], expected, atol=1e-4, rtol=0)


def test_the_settings_rebuild_the_network():
    network = FewShotNet("panet", 64, ("lung",), sam_checkpoint="random", head_options={"projection": 5})
    again = build_network({**network.settings, "sam_weights": "random"})
    assert again.settings == network.settings
    assert again.decoder.head.projection.out_channels == 5


def test_features_of_sam_are_the_embedding_of_that_sam():
    network = FewShotNet("panet", 64, sam_checkpoint="random")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network.encode(image), network.features(image))
    assert network.encode(image).shape == (1, 128, 8, 8)  # of tiny
    assert network.grid_size == 32


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="head: 'canet' is not one of biopt, hsnet, panet, ppnet, rpmms, ssp"):
        FewShotNet("canet", 64)
