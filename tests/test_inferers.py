"""How engines call the network."""

import torch

from blosam_monai.inferers import EmbeddingInferer
from blosam_monai.networks.prompt_sam import PromptSam


def test_decoding_an_embedding_equals_the_network_on_its_image():
    network = PromptSam("tiny", 64, "random", ["a", "b"])
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = EmbeddingInferer()(network.encode(image), network)
        assert logits.shape == (2, 2, 64, 64)
        assert torch.equal(logits, network(image))
