"""Adapters on disk: exact, small, without pickle, refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from monai.networks.utils import copy_model_state
from safetensors.torch import load_file, save_file

from blosam_monai.networks.adapters import (
    build_network,
    export_model_pt,
    load_network,
    read_adapters,
    read_settings,
    save_adapters,
)
from blosam_monai.networks.few_shot.segmenter import FewShotNet
from blosam_monai.networks.prompt_sam import PromptSam
from blosam_monai.networks.prompted_sam import PromptedSam
from blosam_monai.networks.sam import TINY_SHA256, build_sam
from blosam_monai.networks.supervised import SupervisedNet

# A task of tiny, 128 channels wide: low-rank factors 2 r (2 * 256 + 5 * 192) of q and v in seven attentions, upscaling
# (two transposed convolutions of 2 x 2, a normalisation between), hyper-network, mask token; and the prompt.
FACTORS, UPSCALING = 2 * 4 * (2 * 256 + 5 * 192), (128 * 32 * 4 + 32) + 2 * 32 + (32 * 16 * 4 + 16)
HYPERNETWORK = 2 * (128 * 128 + 128) + (128 * 16 + 16)
TINY_TASK = FACTORS + UPSCALING + HYPERNETWORK + 128 + 128
PAPERS_TASK = 237_568 + 256  # of every SAM with 256 channels


def trained(
    tasks: tuple[str, ...] = ("lung", "heart"), checkpoint: str | Path = "random", *, model: str = "tiny", **options
) -> PromptSam:
    """A network whose trainable tensors are noise."""
    network = PromptSam(model, 64, checkpoint, tasks, **options)
    generator = torch.Generator().manual_seed(0)
    for p in (*network.lower_parameters(), *network.upper_parameters()):
        p.data = 0.05 * torch.randn(p.shape, generator=generator)
    return network


def settings_of(network: PromptSam) -> dict:
    return {**network.settings, "sam_weights": network.sam_weights, "preprocess": "sam"}


def save(network: PromptSam, path: Path) -> Path:
    save_adapters(path, network.decoder.adapter_state(), settings_of(network))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The file of a trained network of two tasks. Shared: tests must not change it."""
    return save(trained(), tmp_path_factory.mktemp("model") / "model.safetensors")


def test_tensors_come_back_exactly(saved):
    state, expected = read_adapters(saved)[0], trained().decoder.adapter_state()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_settings_come_back_exactly(saved):
    assert read_settings(saved) == settings_of(trained())


def test_another_reader_of_safetensors_reads_the_file(saved):
    assert load_file(saved)["phi.dense_prompt"].shape == (2, 128)


def test_the_file_is_a_json_header_and_numbers(saved):
    data = saved.read_bytes()
    length = int.from_bytes(data[:8], "little")  # the safetensors format: a length, a JSON header, the tensors
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header["__metadata__"]["blosam_monai"]) == settings_of(trained())
    assert len(data) == 8 + length + 4 * 2 * TINY_TASK


def test_the_json_file_beside_it_is_a_copy_of_the_header(saved):
    assert json.loads(saved.with_suffix(".json").read_text(encoding="utf-8")) == read_settings(saved)


def test_a_task_of_a_sam_as_wide_as_metas_takes_about_a_megabyte(small_vit, tmp_path):
    path = save(trained(model=small_vit), tmp_path / "model.safetensors")
    assert 0.9e6 < path.stat().st_size / 2 < 1.1e6


def test_a_task_of_tiny_takes_about_a_quarter_of_a_megabyte(saved):
    assert 0.23e6 < saved.stat().st_size / 2 < 0.28e6


def test_saving_leaves_nothing_but_the_two_files(saved):
    assert sorted(file.name for file in saved.parent.iterdir()) == ["model.json", "model.safetensors"]


def test_a_failed_save_keeps_the_old_file_and_leaves_no_piece(tmp_path):
    path = save(trained(("lung",)), tmp_path / "model.safetensors")
    before = path.read_bytes()
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):  # safetensors refuses two names for one tensor
        save_adapters(path, {"a": shared, "b": shared}, {})
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize(("prompt", "head"), [("dense", "sam"), ("both:2", "two_token"), ("sparse:1", "sam")])
def test_a_loaded_network_gives_the_same_logits(tmp_path, prompt, head):
    network = trained(prompt=prompt, head=head).eval()
    loaded = load_network(save(network, tmp_path / "model.safetensors"))
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(image), network(image))
    assert not loaded.training


def test_adapters_fill_a_network_that_is_there(saved):
    network = PromptSam("tiny", 64, "random", ("lung", "heart"))
    assert load_network(saved, into=network) is network
    assert torch.equal(network.decoder.phi["dense_prompt"], trained().decoder.phi["dense_prompt"])


def test_without_a_file_the_settings_are_those_of_an_untrained_network(tmp_path):
    network = PromptSam()
    expected = {**network.settings, "sam_weights": "random"}
    found = read_settings(tmp_path / "none.safetensors")
    assert {key: found[key] for key in expected} == expected


# Refusals


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        load_network(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"\xff" * len(data),
        lambda data: data + b"more",
    ],
    ids=["half", "header cut", "empty", "noise", "longer"],
)
def test_a_damaged_file_is_refused_by_name(saved, tmp_path, spoil):
    (tmp_path / "broken.safetensors").write_bytes(spoil(saved.read_bytes()))
    with pytest.raises(ValueError, match=r"broken\.safetensors is damaged or not a model of blosam_monai"):
        load_network(tmp_path / "broken.safetensors")


def test_a_pickle_is_refused_by_name(tmp_path):
    torch.save(trained().decoder.adapter_state(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or not a model of blosam_monai"):
        load_network(tmp_path / "model.safetensors")


def test_safetensors_of_another_program_are_refused_by_name(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is damaged or not a model of blosam_monai"):
        load_network(tmp_path / "other.safetensors")


def test_other_sam_weights_are_refused_with_both_hashes(tmp_path):
    state = build_sam("tiny", 64, "random").state_dict()
    torch.save(state, tmp_path / "first.pth")
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / "second.pth")
    network = trained(checkpoint=tmp_path / "first.pth")
    other = build_sam("tiny", 64, tmp_path / "second.pth")
    path = save(network, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{network.sam_weights[:12]}, these are {other.weights[:12]}"):
        load_network(path, tmp_path / "second.pth")


@pytest.mark.parametrize(("checkpoint", "weights"), [("random", "random"), (None, TINY_SHA256[:12])])
def test_random_weights_and_those_of_the_package_are_refused_for_adapters_of_a_file(tmp_path, checkpoint, weights):
    torch.save(build_sam("tiny", 64, "random").state_dict(), tmp_path / "sam.pth")
    path = save(trained(checkpoint=tmp_path / "sam.pth"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"these are {weights}; give the checkpoint it was trained on"):
        load_network(path, checkpoint)


def test_random_weights_are_refused_for_adapters_of_the_package(tmp_path):
    path = save(trained(checkpoint=None), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"was trained on SAM weights {TINY_SHA256[:12]}, these are random; give"):
        load_network(path, "random")


@pytest.mark.parametrize("checkpoint", ["random", None])
def test_adapters_find_the_weights_of_tiny_that_they_were_trained_on(tmp_path, checkpoint):
    network = trained(checkpoint=checkpoint)
    loaded = load_network(save(network, tmp_path / "model.safetensors"))
    assert loaded.sam_weights == network.sam_weights == (checkpoint or TINY_SHA256)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("image_size", 128, "image_size: .* trained with 64, found 128"),
        ("tasks", ("heart", "lung"), r"tasks: .* trained with \['lung', 'heart'\], found \['heart', 'lung'\]"),
        ("head", "two_token", "head: .* trained with 'sam', found 'two_token'"),
        ("lora_rank", 2, "lora_rank: .* trained with 4, found 2"),
    ],
)
def test_a_network_with_another_setting_is_refused_naming_it(saved, option, value, message):
    arguments = {"image_size": 64, "sam_checkpoint": "random", "tasks": ("lung", "heart"), option: value}
    with pytest.raises(ValueError, match=message):
        load_network(saved, into=PromptSam("tiny", **arguments))


# The file for monai.bundle.load


@pytest.mark.parametrize(("model", "numbers"), [("tiny", TINY_TASK), ("small_vit", PAPERS_TASK)])
def test_an_exported_file_holds_plain_tensors_and_nothing_frozen(small_vit, tmp_path, model, numbers):
    network = trained(model=model)
    export_model_pt(tmp_path / "model.pt", network)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert sum(value.numel() for value in state.values()) == 2 * numbers


def test_monai_copies_every_tensor_of_an_exported_file(tmp_path):
    network, fresh = trained().eval(), PromptSam("tiny", 64, "random", ("lung", "heart")).eval()
    export_model_pt(tmp_path / "model.pt", network)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    _, updated, _ = copy_model_state(fresh, state)
    assert updated == sorted(state)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(fresh(image), network(image))


@pytest.mark.parametrize("prompt", ["sparse:3", "both:2"])
def test_a_sparse_prompt_of_any_seed_comes_back_as_the_same_network(tmp_path, prompt):
    network = PromptSam("tiny", 64, "random", ["a"], prompt=prompt, seed=5)
    settings = {**network.settings, "sam_weights": network.sam_weights}
    save_adapters(tmp_path / "model.safetensors", network.decoder.adapter_state(), settings)
    embedding = torch.randn(1, 128, 8, 8)
    with torch.no_grad():
        again = load_network(tmp_path / "model.safetensors").decode(embedding)
        assert torch.equal(again, network.decode(embedding))


# Other networks


def test_a_model_with_learned_ranks_is_kept_as_plain_low_rank_and_predicts_the_same(tmp_path):
    network = trained(train_decoder="gated", lora_rank=3).eval()
    for i, (_, gate) in enumerate(item for item in network.decoder.phi.items() if item[0].endswith("gate")):
        gate.data[0, : i % 4] = 0
        gate.data[1, :3] *= torch.arange(3) == i % 3
    state, changed = network.decoder.exported(network.decoder.adapter_state())
    save_adapters(tmp_path / "model.safetensors", state, {**settings_of(network), **changed})
    loaded = load_network(tmp_path / "model.safetensors")
    assert loaded.settings["train_decoder"] == "lora"
    assert sorted(loaded.settings["lora_rank"]) == sorted(max(3 - i % 4, 1) for i in range(14))
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), network(image), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: PromptedSam("tiny", 64, "random", train_encoder="adapter", train_decoder="full"),
        lambda: FewShotNet("panet", 64, sam_checkpoint="random", head_options={"projection": 4}),
        lambda: PromptSam("tiny", 64, "random", train_encoder="lora", train_decoder="full"),
        lambda: PromptSam("tiny", 64, "random", prompt="none", train_decoder="linear_probe"),
        lambda: SupervisedNet("dynunet", 64, width=4),
    ],
    ids=["prompted_sam", "few_shot", "samed", "linear_probe", "supervised"],
)
def test_every_kind_of_network_is_rebuilt_from_its_file(tmp_path, build):
    network = build()
    if hasattr(network.decoder, "remember"):
        network.decoder.remember([{"embedding": torch.randn(128, 8, 8), "label": torch.ones(1, 32, 32)}])
    for p in network.lower_parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    loaded = load_network(save(network, tmp_path / "model.safetensors"))
    assert type(loaded) is type(network)
    found, expected = loaded.decoder.adapter_state(), network.decoder.adapter_state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_network_of_a_newer_version_is_refused():
    with pytest.raises(ValueError, match="network: 'mamba' is not one of prompt_sam, prompted_sam, few_shot, superv"):
        build_network({"network": "mamba"})


def test_a_model_of_an_earlier_version_says_no_network_and_is_read_as_one_without_prompts():
    network = build_network({"sam_model": "tiny", "image_size": 64, "tasks": ["lung"], "sam_weights": "random"})
    assert type(network) is PromptSam
    assert network.settings["train_decoder"] == "lora"


def test_model_pt_holds_the_statistics_of_a_backbone(tmp_path):
    """FrozenBatchNorm2d of ResNet-50 keeps four buffers in each of its 53 places; two are not of the parameters."""
    network = SupervisedNet("deeplabv3", 64, norm="frozen_batch")
    export_model_pt(tmp_path / "model.pt", network)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert sum(name.endswith(("running_mean", "running_var")) for name in saved) == 2 * 53


def test_a_network_that_remembers_images_has_no_model_pt(tmp_path):
    with pytest.raises(ValueError, match="a few-shot network remembers images"):
        export_model_pt(tmp_path / "model.pt", FewShotNet("panet", 64, sam_checkpoint="random"))
