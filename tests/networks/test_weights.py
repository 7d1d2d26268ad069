"""The weights of the tiny SAM in this package: whole, small, described, and part of what is installed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from setuptools import Distribution

from blosam_monai.engines.pretrainer import Recipe
from blosam_monai.methods import BUNDLE
from blosam_monai.networks.sam import TINY_FILE, TINY_SHA256, build_sam

ROOT = Path(__file__).resolve().parents[2]


def test_the_file_has_the_hash_that_the_code_states():
    assert hashlib.sha256(TINY_FILE.read_bytes()).hexdigest() == TINY_SHA256


def test_the_model_card_states_the_same_hash():
    assert TINY_SHA256 in (TINY_FILE.parent / "README.md").read_text(encoding="utf-8")


def test_the_file_has_less_than_ten_megabytes():
    assert TINY_FILE.stat().st_size < 10_000_000


def test_every_tensor_is_of_half_precision_and_finite():
    for name, value in load_file(TINY_FILE).items():
        assert value.dtype == torch.float16, name
        assert torch.isfinite(value).all(), name


def test_the_header_carries_the_recipe_that_the_verb_trains_by():
    config = json.loads((BUNDLE / "configs" / "pretrain.json").read_text(encoding="utf-8"))
    with safe_open(TINY_FILE, "pt") as file:
        header = file.metadata()
    assert json.loads(header["recipe"]) == {field.name: config[field.name] for field in dataclasses.fields(Recipe)}


def test_no_model_and_no_checkpoint_said_is_this_file(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOSAM_CACHE", str(tmp_path))  # empty
    sam = build_sam("tiny", 256)
    assert sam.weights == TINY_SHA256
    file = load_file(TINY_FILE)
    assert all(torch.equal(value.half(), file[name]) for name, value in sam.state_dict().items())


@pytest.mark.parametrize("image_size", [64, 256, pytest.param(512, marks=pytest.mark.slow)])
def test_it_encodes_at_other_sizes_too_and_unlike_random_weights(image_size):
    torch.manual_seed(0)
    image = torch.rand(1, 3, image_size // 8, image_size // 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        embedding, untrained = (
            build_sam("tiny", image_size, checkpoint).image_encoder(4 * image - 2) for checkpoint in (None, "random")
        )
    assert embedding.shape == (1, 128, image_size // 8, image_size // 8)
    assert torch.isfinite(embedding).all()
    cosine = torch.nn.functional.cosine_similarity(embedding, untrained)
    assert float(cosine.abs().mean()) < 0.5


def test_an_embedding_in_the_middle_does_not_change_much_with_the_image_size():
    """The picture in the upper left quarter of one twice as large, SAM's mean colour (0) around it: the same places."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
    disc = (x**2 + y**2 < 0.3).float() - (x**2 + y**2 < 0.05).float() * 1.5
    image = disc.expand(1, 3, -1, -1)
    with torch.no_grad():
        small = build_sam("tiny", 256).image_encoder(image)
        large = build_sam("tiny", 512).image_encoder(torch.nn.functional.pad(image, (0, 256, 0, 256)))[..., :32, :32]
    centre = (..., slice(8, 24), slice(8, 24))
    assert float(torch.nn.functional.cosine_similarity(small[centre], large[centre]).mean()) > 0.5


def test_weights_and_card_are_part_of_the_built_package(monkeypatch, tmp_path):
    """What setuptools would copy into a wheel, asked of setuptools."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    build = distribution.get_command_obj("build_py")
    build.build_lib = str(tmp_path)
    build.ensure_finalized()
    outputs = {Path(path).relative_to(tmp_path).as_posix() for path in build.get_outputs(include_bytecode=False)}
    assert "blosam_monai/networks/sam.py" in outputs
    assert "blosam_monai/networks/weights/tiny.safetensors" in outputs
    assert "blosam_monai/networks/weights/README.md" in outputs
