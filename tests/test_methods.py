"""The presets: each composes, says what it is, and takes no option that it would not use."""

from __future__ import annotations

import json
import re

import pytest

from blosam_monai.methods import CONFIGS, check_method, compose_config, list_methods, read_method, used_options

ASKED_FOR = [  # the methods of the three papers and what they compare with
    *("blosam", "crossfit", "joint", "swap", "prompt_only", "decoder_only", "samed", "med_sa", "ft_sam"),
    *("sam_oracle", "sam_oracle_point", "sam_oracle_box"),
    *("components_encoder", "components_prompt_conv", "components_all"),
    *("arena", "arena_encoder", "blosam_arena", "linear_probe", "bitfit", "affine_norm"),
    *("biopt", "panet", "ppnet", "rpmms", "ssp", "hsnet"),
    *("deeplabv3", "swinunetr2d", "dynunet"),
]


def test_every_method_of_the_papers_has_its_preset():
    assert sorted(ASKED_FOR) == list_methods()


@pytest.mark.parametrize("name", list_methods())
def test_a_preset_names_itself_and_says_what_it_is(name):
    preset = read_method(name)
    assert preset["method"] == preset["preset"] == name
    assert preset["about"].endswith(".")


@pytest.mark.parametrize("name", list_methods())
def test_a_preset_overlays_the_training_configuration(name):
    base = json.loads((CONFIGS / "train.json").read_text(encoding="utf-8"))
    config, preset = compose_config(name, {}), read_method(name)
    plain = [key for key in preset if not set(key) & set("+#")]
    assert {key: config[key] for key in plain} == {key: preset[key] for key in plain}
    assert config["max_epochs"] == base["max_epochs"]  # which no preset changes: methods compare at equal length


@pytest.mark.parametrize("name", list_methods())
def test_who_takes_prompts_from_the_label_is_called_an_oracle(name):
    config = compose_config(name, {})
    prompted = config["network_def"]["_target_"].endswith("PromptedSam")
    assert ("oracle" in read_method(name)["about"]) == prompted
    assert bool(read_method(name).get("oracle")) == prompted


def test_an_override_takes_the_place_of_the_presets_value():
    assert compose_config("arena", {})["lora_rank"] == 16
    assert compose_config("arena", {"lora_rank": 2, "max_epochs": 3})["lora_rank"] == 2


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dynunet", "lora_rank"),
        ("dynunet", "sam_model"),
        ("dynunet", "prompt"),
        ("ssp", "crossfit"),
        ("ssp", "lora_rank"),
        ("med_sa", "prompt"),
        ("blosam", "features"),
        ("blosam", "width"),
        ("blosam", "lora_rnk"),
        # Passed on by the configuration, but idle in what the method makes of it.
        ("blosam", "encoder_rank"),
        ("blosam", "gate_lr"),
        ("bitfit", "lora_rank"),
        ("linear_probe", "head"),
        ("prompt_only", "upper_lr"),
        ("decoder_only", "upper_lr"),
        ("dynunet", "upper_lr"),
        ("ssp", "dice_weight"),
    ],
)
def test_an_option_that_nothing_of_the_method_reads_is_refused(name, key):
    with pytest.raises(ValueError, match=f"^{key}: the method {name} does not use it; leave it out.$"):
        compose_config(name, {key: 1})


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("blosam", {"encoder_rank": 2, "train_encoder": "lora"}),
        ("blosam", {"gate_lr": 1.0, "train_decoder": "gated"}),
        ("samed", {"lora_rank": 2}),  # of the encoder; the decoder trains in full
        ("decoder_only", {"upper_lr": 0.1, "prompt": "dense"}),
        ("joint", {"upper_lr": 0.1}),
        ("swap", {"upper_lr": 0.1}),
    ],
)
def test_an_option_is_taken_where_the_others_give_it_something_to_do(name, overrides):
    config = compose_config(name, overrides)
    assert {key: config[key] for key in overrides} == overrides


def test_a_record_speaks_of_the_options_that_the_method_reads():
    given = {"prompt": "none", "train_decoder": "linear_probe", "head": "sam", "lora_rank": 4, "max_epochs": 3}
    used = used_options({"method": "linear_probe", **given})
    assert sorted(used) == ["max_epochs", "method", "prompt", "train_decoder"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("arean", "there is no 'arean'; did you mean arena?"), ("unet3p", "there is no 'unet3p'; did you mean dynunet?")],
)
def test_an_unknown_method_is_refused_with_the_near_one(name, message):
    with pytest.raises(ValueError, match=f"^method: {re.escape(message)}$"):
        check_method(name)


def test_a_method_like_none_is_refused_with_all_of_them():
    with pytest.raises(ValueError, match=r"method: there is no 'xyz'; one of affine_norm, arena, .*, swinunetr2d\.$"):
        check_method("xyz")


@pytest.mark.parametrize(
    ("method", "keys", "said"),
    [
        ("blosam", {"crossfit": True, "selection": "upper"}, "selection: blosam trains on all images"),
        ("joint", {"selection": "upper"}, "selection: joint trains on all images"),
        ("blosam_arena", {"levels": "swap", "hypergradient": "exact"}, "hypergradient: under swap the gates"),
        ("prompt_only", {"head": "two_token"}, "head: two_token is new and must train"),
        ("deeplabv3", {"weights": "resnet50.pth", "preprocess": "paper"}, "preprocess: the ResNet-50 of deeplabv3"),
        ("ssp", {"features": "layer3", "preprocess": "paper"}, "preprocess: the ResNet-50 of ssp"),
    ],
)
def test_keys_that_exclude_each_other_are_refused(method, keys, said):
    with pytest.raises(ValueError, match=said):
        compose_config(method, keys)


def test_options_of_a_preset_of_the_users_own_are_recorded_as_they_are():
    assert used_options({"method": "mine", "lora_rank": 4}) == {"method": "mine", "lora_rank": 4}
