"""The linear probe against a matrix product, and its tasks apart."""

from __future__ import annotations

import torch

from blosam_monai.networks.linear_probe import LinearProbe


def filled(channels: int, tasks: int) -> LinearProbe:
    probe = LinearProbe(channels, tasks)
    torch.manual_seed(0)
    for p in probe.parameters():
        p.data.normal_()
    return probe


def test_an_untrained_probe_says_nothing():
    assert not LinearProbe(5, 2)(torch.randn(1, 5, 3, 3)).any()


def test_a_place_of_the_embedding_gives_weight_times_embedding_plus_bias_on_four_by_four_pixels():
    """Where all places are alike, interpolation changes nothing."""
    probe, place = filled(5, 2), torch.randn(5)
    with torch.no_grad():
        logits = probe(place[:, None, None].expand(1, 5, 3, 2))
        expected = probe.weight @ place + probe.bias
    assert logits.shape == (1, 2, 12, 8)
    torch.testing.assert_close(logits, expected[:, None, None].expand(1, 2, 12, 8))


def test_between_two_places_the_logit_changes_linearly():
    probe = LinearProbe(1, 1)
    probe.weight.data.fill_(1)
    with torch.no_grad():
        row = probe(torch.tensor([[[[0.0, 8.0]]]]))[0, 0, 0]
    # Centres of the places at pixels 1.5 and 5.5: from one to the other 8 / 4 a pixel.
    assert row.tolist() == [0, 0, 1, 3, 5, 7, 8, 8]


def test_each_task_looks_at_its_own_embedding_where_there_is_one_for_each():
    probe, embedding = filled(5, 3), torch.randn(2, 3, 5, 4, 4)
    with torch.no_grad():
        together = probe(embedding)
        for t in range(3):
            alone = probe(embedding[:, t])[:, t]
            torch.testing.assert_close(together[:, t], alone)


def test_the_gradient_of_one_task_does_not_reach_another():
    probe = filled(5, 2)
    probe(torch.randn(1, 5, 4, 4))[:, 0].square().sum().backward()
    assert not probe.shared
    for p in probe.lower_parameters():
        assert p.grad[0].any()
        assert not p.grad[1].any()
