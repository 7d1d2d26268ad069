"""The methods: presets of the bundle's training configuration, ``configs/methods/<name>.json``.

A preset overlays ``configs/train.json`` and says in ``about`` what the method is; the config decides all else.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
# Beside the package in a checkout, inside it when installed.
BUNDLE = next(
    p for p in (_HERE / "bundles" / "blosam", _HERE.parent / "bundles" / "blosam") if (p / "configs").is_dir()
)
CONFIGS = BUNDLE / "configs"
_RECORDS = ("options", "settings")  # sections that note the options, whether anything reads them or not


def list_methods() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(path.stem for path in (CONFIGS / "methods").glob("*.json"))


def check_method(name: str) -> str:
    """The name, if there is such a method.

    Raises:
        ValueError: there is none; names the near one.
    """
    names = list_methods()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        raise ValueError(
            f"method: there is no {name!r}; " + (f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}.")
        )
    return name


def read_method(name: str) -> dict[str, Any]:
    """What the preset of a method says; raises ValueError as ``check_method``."""
    content: dict[str, Any] = json.loads((CONFIGS / "methods" / f"{check_method(name)}.json").read_text("utf-8"))
    return content


def compose_config(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The training configuration of a method, with the overrides: what ``monai.bundle run`` would see.

    Raises:
        ValueError: no such method, or an override that nothing in this method's configuration reads.
    """
    from monai.bundle import ConfigParser

    check_method(name)
    files = [str(CONFIGS / "train.json"), str(CONFIGS / "methods" / f"{name}.json")]
    config: dict[str, Any] = ConfigParser.load_config_files(files)
    unknown = [key for key in overrides if key not in config]
    config.update(overrides)
    for key in overrides:
        if key in unknown or not _is_read(config, key):
            raise ValueError(f"{key}: the method {name} does not use it; leave it out.")
    _check_together(config)
    return config


def _check_together(config: Mapping[str, Any]) -> None:
    """Refuse what the keys of a configuration make impossible together."""
    one_level = config["levels"] in ("joint", "alternate")
    second_order = config["hypergradient"] != "first_order"
    resnet = config.get("features", "sam") != "sam" or config.get("weights") is not None
    rules = (
        (
            one_level and (config["crossfit"] or second_order),
            "crossfit, hypergradient: {} is joint training, without an upper level; leave them out, or choose a method "
            "that has two levels.",
        ),
        (
            config["selection"] == "upper" and (one_level or config["crossfit"]),
            "selection: {} trains on all images, D2 too; use last or validation.",
        ),
        (
            config["levels"] == "swap" and second_order and _gated(config),
            "hypergradient: under swap the gates of {} take no AdamW step to look back through; use first_order.",
        ),
        (
            config["head"] == "two_token" and config["train_decoder"] == "frozen",
            "head: two_token is new and must train, {} keeps the decoder as it is; leave it out.",
        ),
        (
            config["preprocess"] == "paper" and resnet,
            "preprocess: the ResNet-50 of {} needs ImageNet's normalisation, which `sam` has; leave `paper` out.",
        ),
    )
    for broken, text in rules:
        if broken:
            raise ValueError(text.format(config["method"]))


def used_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the values of all keys of a training, those that its method reads: what a record of it should speak of.

    Args:
        options: with ``method``.
    """
    if options["method"] not in list_methods():
        return dict(options)  # a preset of the user's own
    config = {**compose_config(options["method"], {}), **options}
    return {key: value for key, value in options.items() if _is_read(config, key)}


def _is_read(config: Mapping[str, Any], key: str) -> bool:
    """Whether anything in a configuration reads a key."""
    if key in _RUN_BY_MONAI:
        return True
    text = json.dumps({k: v for k, v in config.items() if k not in _RECORDS}, default=str)
    return re.search(rf"@{re.escape(key)}\b", text) is not None and (key not in _READ_IF or _READ_IF[key](config))


def _low_rank(config: Mapping[str, Any], part: str) -> bool:
    return config[part] in ("lora", "gated")


def _gated(config: Mapping[str, Any]) -> bool:
    return "gated" in (config["train_decoder"], config["train_encoder"])


def _episodic(config: Mapping[str, Any]) -> bool:
    return bool(config["train"]["trainer"]["_target_"].endswith(".EpisodicTrainer"))


def _encodes_once(config: Mapping[str, Any]) -> bool:
    """Whether there is a frozen encoder, whose embeddings can be kept."""
    supervised = config["network_def"]["_target_"].endswith(".SupervisedNet")
    return config["train_encoder"] == "frozen" and not supervised


def _has_upper(config: Mapping[str, Any]) -> bool:
    """Whether there are variables beside those that ``lower_lr`` moves."""
    if not config["network_def"]["_target_"].endswith(".PromptSam"):
        return False
    lower = (config["train_decoder"], config["train_encoder"]) != ("frozen", "frozen")
    upper = config["prompt"] != "none" or _gated(config)
    return config["levels"] != "joint" or (lower and upper)


# Keys that a configuration passes on, but that something else in it may make idle.
_READ_IF: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "gate_lr": _gated,
    "gate_penalty": _gated,
    "lora_rank": lambda c: (
        _low_rank(c, "train_decoder") or (_low_rank(c, "train_encoder") and c["encoder_rank"] is None)
    ),
    "cache_dir": _encodes_once,
    "encoder_rank": lambda c: _low_rank(c, "train_encoder"),
    "head": lambda c: c["train_decoder"] != "linear_probe",
    "upper_lr": _has_upper,
    "dice_weight": lambda c: not _episodic(c),
    "augment_views": lambda c: not _episodic(c),  # an image's views would support each other
}
_RUN_BY_MONAI = ("bundle_root", "save_execute_config", "method")  # read by MONAI, or by us before the config is
