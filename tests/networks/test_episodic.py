"""Trained heads on disk, heads without training, and networks at other sizes."""

import pytest
import torch

from blosam_monai.networks.episodic import check_train_free, load_head, save_head, scaled_networks
from blosam_monai.networks.few_shot.segmenter import FewShotNet


def make_network(head="biopt", **options) -> FewShotNet:
    return FewShotNet(head, **{"image_size": 64, "sam_checkpoint": "random", **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A head with weights of its own, and its file."""
    network, path = make_network(), tmp_path_factory.mktemp("head") / "model.safetensors"
    with torch.no_grad():
        for p in network.decoder.head.parameters():
            p.normal_(generator=torch.Generator().manual_seed(1))
    save_head(path, network, {"n_shot": 1})
    return network, path


def test_a_head_read_again_predicts_the_same_for_other_tasks(trained):
    network, path = trained
    again = make_network(tasks=["liver", "spleen"])
    load_head(path, again)
    support, query = torch.randn(2, 3, 128, 8, 8), torch.randn(2, 128, 8, 8)
    mask = (torch.rand(2, 3, 8, 8) > 0.5).float()
    assert torch.equal(again.decoder.head(support, mask, query), network.decoder.head(support, mask, query))
    assert not again.training


def test_what_a_network_remembers_is_not_in_the_file(trained, tmp_path):
    network = make_network()
    network.decoder.remember([{"embedding": torch.ones(128, 8, 8), "label": torch.ones(1, 32, 32)}])
    save_head(tmp_path / "model.safetensors", network, {})
    again = make_network()
    load_head(tmp_path / "model.safetensors", again)
    assert len(again.decoder.support) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "panet"}, "head: .* was trained with 'biopt', found 'panet'; drop head"),
        ({"image_size": 128}, "image_size: .* was trained with 64, found 128; drop image_size"),
        ({"head_options": {"steps": 3}}, r"head_options: .* was trained with \{\}, found \{'steps': 3\}"),
        ({"sam_checkpoint": None}, "was trained on weights random, these are [0-9a-f]{12}; give the file"),
    ],
)
def test_a_head_of_another_network_is_refused(trained, options, message):
    with pytest.raises(ValueError, match=message):
        load_head(trained[1], make_network(**options))


def test_only_a_head_that_learns_nothing_is_used_untrained():
    check_train_free(make_network("panet"))
    check_train_free(make_network(head_options={"train_free": True}))
    with pytest.raises(ValueError, match="train_free: biopt has 32896 numbers to train"):  # 2 * 128 * 128 + 128
        check_train_free(make_network())


def test_other_scales_are_the_nearest_multiples_of_32_pixels_with_the_same_weights():
    """0.7, 1 and 1.3 of 128 pixels: 89.6 and 166.4."""
    network = make_network(image_size=128)
    sizes = scaled_networks(network, [0.7, 1, 1.3], sam_checkpoint="random")
    assert [one.image_size for one in sizes] == [96, 128, 160]
    assert sizes[1] is network
    embedding = sizes[0].encode(torch.randn(1, 3, 96, 96))
    assert embedding.shape == (1, 128, 12, 12)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ([], r"scales: \[\] must be positive numbers"),
        ([1, -1], "must be positive numbers, as"),
        ([1, 1.1], r"scales: \[1, 1.1\] are \[64, 64\] pixels; drop those that are the same"),
    ],
)
def test_scales_that_make_no_sense_are_refused(scales, message):
    with pytest.raises(ValueError, match=message):
        scaled_networks(make_network(), scales, sam_checkpoint="random")


def test_a_head_on_packed_maps_is_read_again_and_is_of_one_size(tmp_path):
    network = FewShotNet("hsnet", 64, features="pyramid")
    save_head(tmp_path / "model.safetensors", network, {})
    load_head(tmp_path / "model.safetensors", network)
    with pytest.raises(ValueError, match=r"scales: a head on features=pyramid .* give scales=\[1\]"):
        scaled_networks(network, [1, 1.5], sam_checkpoint=None)
