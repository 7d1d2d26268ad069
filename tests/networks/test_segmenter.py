"""What all segmenters share, on networks of a few numbers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from blosam_monai.networks.segmenter import Segmenter, SharedDecoder, is_gate, load_tensors


class Scale(SharedDecoder):
    """Logits (B, T, 2, 2): the mean over channels of the four corners, times a trained number a task."""

    def __init__(self, tasks: int) -> None:
        super().__init__(tasks)
        self.scale = nn.Parameter(torch.arange(1.0, tasks + 1))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.gate = nn.Parameter(torch.ones(2))
        self.register_buffer("statistics", torch.zeros(2))
        self.register_buffer("count", torch.tensor(5))

    def forward(self, embedding):
        corners = embedding.mean(1, keepdim=True)[..., ::3, ::3]  # (B, 1, 2, 2)
        return corners * self.scale[:, None, None]


class Small(Segmenter):
    NAME = "small"

    def __init__(self) -> None:
        super().__init__(("a", "b"), 4, {"width": 7})
        self.decoder = Scale(2)


def test_what_training_changes_is_the_state():
    """The trained tensors and statistics; neither what is frozen nor a count, which is a whole number."""
    assert sorted(Scale(2).adapter_state()) == ["gate", "scale", "statistics"]


def test_a_state_comes_back_into_another_decoder():
    first, second = Scale(2), Scale(2)
    first.scale.data += 3
    first.statistics += 0.5
    second.load_adapter_state(first.adapter_state())
    assert second.scale.tolist() == [4, 5]
    assert second.statistics.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.zeros(2)}, r"differ from the network's: \['b'\]"),
        ({"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)}, r"differ from the network's: \['c'\]"),
        ({"a": torch.ones(2), "b": torch.zeros(3)}, r"b has shape \(3,\), not \(1,\)"),
    ],
    ids=["missing", "foreign", "misshapen"],
)
def test_tensors_that_do_not_fit_are_refused_and_none_is_taken(state, message):
    own = {"a": torch.zeros(2), "b": torch.zeros(1)}
    with pytest.raises(ValueError, match=f"adapters: .*{message}"):
        load_tensors(own, state)
    assert not own["a"].any()


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("blocks.0.attn.qkv.gate", True),
        ("phi.transformer/layers/0/q_proj/gate", True),
        ("gate_q", True),
        ("gates.weight", False),
        ("lora_a", False),
    ],
)
def test_a_gate_is_told_by_the_last_part_of_its_name(name, gate):
    assert is_gate(name) == gate


def test_a_network_that_freezes_nothing_has_its_image_for_embedding():
    image = torch.randn(2, 3, 4, 4)
    assert Small().encode(image) is image
    assert Small().encoder_id is None


def test_logits_are_brought_to_the_size_of_the_input():
    """By hand, bilinear from 2 x 2 to 4 x 4: a row of 0 and 1 becomes 0, 1/4, 3/4, 1."""
    image = torch.zeros(1, 3, 4, 4)
    image[..., 3] = 1
    expected = torch.tensor([0, 0.25, 0.75, 1]).expand(4, 4)
    with torch.no_grad():
        logits = Small()(image)
    assert torch.equal(logits, torch.stack([expected, 2 * expected])[None])


def test_the_settings_are_json_and_name_the_network():
    settings = json.loads(json.dumps(Small().settings))
    assert settings == {"network": "small", "image_size": 4, "tasks": ["a", "b"], "width": 7}


def test_numbers_trained_and_in_all_are_counted():
    assert Small().count_parameters() == (2 + 2, 2 + 2 + 3)


def test_gates_are_those_that_train():
    network = Small()
    assert [p is network.decoder.gate for p in network.gate_parameters()] == [True]
    network.decoder.gate.requires_grad_(False)
    assert network.gate_parameters() == []


def test_a_network_that_takes_prompts_segments_nothing_without():
    network = Small()
    network.prompted = True
    with pytest.raises(ValueError, match=r"takes its prompts from labels \(an oracle\), and segments nothing without"):
        network(torch.zeros(1, 3, 4, 4))
