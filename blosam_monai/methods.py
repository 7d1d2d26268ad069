"""The methods: presets of the bundle's training configuration, ``configs/methods/<name>.json``.

A preset overlays ``configs/train.json`` and says in ``about`` what the method is; the config decides all else.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
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
    _check_read(config, name, overrides)
    config.update(overrides)
    if config.get("features", "sam") != "sam" and config["preprocess"] == "paper":
        raise ValueError("preprocess: a ResNet-50 needs ImageNet's normalisation, which `sam` has; leave `paper` out.")
    return config


def _check_read(config: Mapping[str, Any], name: str, keys: Iterable[str]) -> None:
    """Refuse keys that are not in the configuration, or that nothing in it reads."""
    text = json.dumps({key: value for key, value in config.items() if key not in _RECORDS})
    for key in keys:
        if key not in config or not (key in _RUN_BY_MONAI or re.search(rf"@{re.escape(key)}\b", text)):
            raise ValueError(f"{key}: the method {name} does not use it; leave it out.")


_RUN_BY_MONAI = ("bundle_root", "save_execute_config", "method")  # read by MONAI, or by us before the config is
