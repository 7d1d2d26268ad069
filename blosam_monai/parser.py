"""The options of the command line: their names, helps and types. They are spelt like the keys of the configs."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from blosam_monai import __version__
from blosam_monai.methods import BUNDLE, check_method

# Every key that a user sets, with its help; the defaults stand in the configs.
LABEL_CODINGS = ("index", "threshold", "colour", "segments", "files")  # as in data.readers, which takes long to import
KEYS = {
    "data_list": "data list (JSON), see `blosam datalist`",
    "dataset_dir": "folder that the list's paths are relative to",
    "output_dir": "folder for everything that is written",
    "ckpt_dir": "folder of the model and the training state (default: models in output_dir)",
    "device": "cpu, cuda or cuda:1 (default: cuda where there is one)",
    "seed": "seed of weights, order of images and views",
    "tasks": "JSON list of labels to train, each a task of its own (default: all)",
    "sam_model": "tiny, vit_b, vit_l or vit_h",
    "sam_checkpoint": "SAM checkpoint file, `download` or `random` (default: the file in this package for tiny, "
    "else Meta's file in the cache); with ResNet features their file (default: random)",
    "image_size": "side of the network input in pixels, a multiple of 16",
    "preprocess": "sam (longer side, padding, SAM's normalisation) or paper (squashed, [0, 1])",
    "head": "sam (SAM's own mask token) or two_token (as published)",
    "prompt": "learned prompt: dense, sparse:n, both:n or none",
    "lora_rank": "rank of the low-rank updates; of gated ones, the highest",
    "train_decoder": "of SAM's decoder: lora, gated (the rank is learned), bitfit, affine_norm, full, frozen; or "
    "linear_probe in its place",
    "train_encoder": "of SAM's image encoder: frozen (each image is encoded once), lora, gated, adapter or full",
    "encoder_rank": "rank of the encoder's low-rank updates (default: lora_rank)",
    "mask_prompt": "decode twice, the first masks as prompt of the second",
    "gate_lr": "learning rate of the gates",
    "gate_penalty": "weight of their L1 norm (default: by the number of iterations)",
    "method": "preset of configs/methods, see `blosam bench --list_methods`; further options change it",
    "weights": "of deeplabv3, swinunetr2d, dynunet: file to start from (default: scratch)",
    "width": "of swinunetr2d, dynunet: channels of the first level",
    "features": "of few-shot methods: sam, or layers of a ResNet-50: layer3, layer4, layer2+3, pyramid",
    "head_options": "of few-shot methods: JSON object of options of the head",
    "oracle": "of med_sa and sam_oracle: prompts from the label: point, box or both",
    "levels": "bilevel, joint (one level on all images), alternate (joint, one variable after the other) or swap (the "
    "levels exchange their variables)",
    "hypergradient": "first_order, finite_difference or exact",
    "crossfit": "the halves swap roles at every second iteration",
    "dice_weight": "share of Dice in the loss, the rest is cross-entropy",
    "lower_lr": "learning rate of the decoder",
    "upper_lr": "learning rate of the prompt",
    "weight_decay": "of both levels; the prompt decays to where it started",
    "max_epochs": "passes over the lower set",
    "batch_size": "images of a step, at each level",
    "selection": "model kept: last, upper (best Dice on D2, the paper) or validation",
    "val_interval": "epochs between validations and between saves of the training state",
    "augment_views": "extra fixed views of each support image",
    "window": 'gray values shown: [low, high] (HU), three of these, {"percentiles": [1, 99]} or {"zscore": 3} '
    "(default: that of the list; else pictures as they are, volumes from percentile 0.5 to 99.5)",
    "neighbours": "slices so many before and after as the other two channels; 0: none",
    "cache_dir": "folder of encoded images (default: in the package's cache), `none` for no cache on disk",
    "nsd_tolerance": "tolerance of the surface Dice, mm (pixels where an image has no spacing)",
    "amp": "bfloat16 on CUDA",
    "resume": "go on with the training in output_dir",
    "overwrite": "replace what is in output_dir",
    "use_mlflow": "track the run in MLflow",
    "log_paths": "let MLflow and manifest.jsonl keep names of files and subjects",
    "tracking_uri": "MLflow store (default: SQLite in output_dir)",
    "experiment_name": "MLflow experiment",
    "run_name": "MLflow run (default: method and time)",
    "section": "section of the data list to evaluate",
    "threshold": "probability above which a pixel is foreground",
    "merge": "argmax (one label map) or separate (one mask a task)",
    "probabilities": "also write a map of probabilities for each task",
    "dicom_output": "what a DICOM series becomes: JSON list of seg and nifti",
    "largest_component": "keep the largest component: true, false or a JSON list of tasks",
    "fill_holes": "fill holes: true, false or a JSON list of tasks",
    "average_axes": "average over slices along all three axes of a volume",
    "slice_axis": "axial, coronal or sagittal (default: that of the data list, then of the training)",
    "series": "SeriesInstanceUID, where a folder holds several series",
    "allow": "JSON list of flaws of a DICOM series to accept",
    "steps": "steps of the encoder, a multiple of 50",
    "decoder_steps": "steps of the decoder after these, a multiple of 50",
    "ensembles": "drawn anatomies in a step",
    "subjects": "images of each anatomy in a step",
    "masks": "masks drawn in a step of the decoder, from points, boxes and exemplars",
    "few_shot": "weight of segmenting other subjects from a few",
    "contrast": "weight of the contrast between structures",
    "ridge": "penalty of the classifier that is fitted to the few subjects",
    "temperature": "of the contrast",
    "lr": "highest learning rate of the encoder",
    "decoder_lr": "highest learning rate of the decoder",
    "warmup": "steps over which a learning rate rises",
    "max_norm": "largest norm of a gradient",
    "overlays": "also write pictures: masks tinted or, beside a label, both outlined",
}
POSITIVE_KEYS = (
    *("max_epochs", "batch_size", "val_interval"),
    *("ensembles", "subjects", "masks", "warmup"),
)
_CASE_KEYS = ("largest_component", "fill_holes", "average_axes", "slice_axis")
_PREDICT_ONLY = ("merge", "probabilities", "dicom_output", *_CASE_KEYS, "series", "allow")
_RECIPE = (
    *("steps", "decoder_steps", "ensembles", "subjects", "masks", "few_shot", "contrast", "ridge", "temperature"),
    *("lr", "decoder_lr", "warmup", "max_norm"),
)
PRESET_KEYS = ("weights", "width", "features", "head_options", "oracle")  # in the presets of some methods only
TRAIN_KEYS = [k for k in KEYS if k not in ("section", "threshold", *_PREDICT_ONLY, *_RECIPE)]
_PRETRAIN_TEXTS = {"seed": "seed of the images; SAM starts as `random` does", "weight_decay": "of AdamW"}
PRETRAIN_KEYS = [
    *("output_dir", "device", "resume", "overwrite", "tracking_uri"),
    *("sam_model", "image_size", "seed", "weight_decay", *_RECIPE),
]
EVALUATE_KEYS = [
    *("data_list", "dataset_dir", "output_dir", "device", "sam_checkpoint", "section", "threshold", *_CASE_KEYS),
    *("overlays", "nsd_tolerance", "use_mlflow", "log_paths", "tracking_uri", "experiment_name", "run_name"),
    "overwrite",
]
PREDICT_KEYS = [
    *("output_dir", "device", "sam_checkpoint", "threshold", *_PREDICT_ONLY, "overlays", "log_paths", "overwrite"),
]


class Parser(argparse.ArgumentParser):
    """Names the near option for one that it does not know; one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit."""
        self.exit(2, f"blosam: {message}\n")

    def check_names(self, arguments: Sequence[str]) -> None:
        """Exit over an argument that is no option of the verb."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in (argument.split("=")[0] for argument in arguments if argument.startswith("--")):
            if word not in known:
                near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`."
                self.error(f"unknown option {word}; {hint}")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and that of each verb."""
    parser = Parser(
        prog="blosam",
        description="Two to eight labelled images in, an automatic segmenter out. "
        "Research use only, not a medical device.",
        epilog="Each verb explains itself: blosam train --help",
    )
    parser.add_argument("--version", action="version", version=f"blosam_monai {__version__}")
    actions = parser.add_subparsers(dest="verb", required=True, parser_class=Parser, metavar="verb")
    verbs: dict[str, Parser] = {}

    def verb(name: str, text: str) -> Parser:
        verbs[name] = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        return verbs[name]

    datalist = verb("datalist", "Draw a few-shot data list from labelled images.")
    datalist.add_argument("--images", help="folder of images: pictures, volumes, DICOM series")
    datalist.add_argument("--labels", help="folder of labels, paired with the images by stem")
    datalist.add_argument("--from", dest="source", help="or an existing list: ours, Decathlon or nnU-Net dataset.json")
    datalist.add_argument("--recipe", help="a public data set's options (data_lists/*.json), under those given here")
    datalist.add_argument("--dataset_dir", help="folder that paths are relative to (default: the list's own)")
    datalist.add_argument("--output", help="the JSON file to write; needless to --check a list --from a file as it is")
    datalist.add_argument("--overwrite", type=_boolean, default=False, help="replace that file (default: false)")
    datalist.add_argument("--n_shot", type=_positive_number, default=4, help="labelled images to train on (default: 4)")
    datalist.add_argument("--seed", type=_whole_number, default=0, help="seed of the draw (default: 0)")
    datalist.add_argument(
        "--n_validation", type=_whole_number, default=0, help="images kept for validation (default: 0)"
    )
    datalist.add_argument("--n_testing", type=_whole_number, help="images to test on (default: all others)")
    datalist.add_argument(
        "--support", type=_expression, help="draw supports from cases whose names match, test on the rest"
    )
    datalist.add_argument("--label_names", type=_json, help='JSON: {"lung": 1, "wheels": [2, 3]} (default: guessed)')
    datalist.add_argument("--label_coding", choices=LABEL_CODINGS, help="default: guessed from all labels")
    datalist.add_argument("--subject", type=_expression, help="on the stem; its first group is the subject")
    datalist.add_argument("--image_suffix", default="", help="cut off image stems before pairing, as _0000")
    datalist.add_argument("--label_suffix", default="", help="cut off label stems before pairing, as _mask")
    datalist.add_argument("--slice_axis", help="axial, coronal or sagittal (default: as the volumes were acquired)")
    datalist.add_argument(
        "--slices_per_volume", type=_positive_number, default=1, help="supports from one volume (default: 1)"
    )
    datalist.add_argument(
        "--shared_subjects", type=_boolean, default=False, help="both halves may hold slices of one subject"
    )
    datalist.add_argument(
        "--channel", type=_whole_number, help="of nnU-Net images in several files: the number of the channel"
    )
    datalist.add_argument("--allow", type=_json, help="JSON list of flaws of a DICOM series to accept")
    datalist.add_argument("--window", type=_json, help="kept in the list for the training, as [-160, 240]")
    datalist.add_argument("--snomed", type=_json, help='for DICOM SEG, JSON: {"liver": ["10200004", "Liver"]}')
    datalist.add_argument("--check", type=_boolean, default=False, help="read every pair and print what it holds")
    datalist.add_argument("--name", default="", help="name of the data set")

    train = verb("train", "Train a segmenter on a data list.")
    _add_keys(train, TRAIN_KEYS, ("train.json",), required=("data_list", "output_dir"))
    evaluate = verb("evaluate", "Score a trained segmenter on a section of a data list.")
    evaluate.add_argument("--model", required=True, help="output_dir of the training")
    _add_keys(evaluate, EVALUATE_KEYS, ("inference.json", "evaluate.json"), required=("data_list", "output_dir"))
    predict = verb("predict", "Segment a picture, a volume, a DICOM series, or a folder of these.")
    predict.add_argument("--model", required=True, help="output_dir of the training")
    predict.add_argument("--input", required=True, help="picture, volume, DICOM series, or folder of these")
    _add_keys(predict, PREDICT_KEYS, ("inference.json",), required=("output_dir",))
    bench = verb("bench", "Run methods x data sets x shots x draws, with intervals; goes on where it stopped.")
    bench.add_argument("--list_methods", action="store_true", help="show all methods and stop")
    bench.add_argument("--grid", help="the grid (JSON), see docs/reference/grid.md")
    bench.add_argument("--output_dir", help="folder for lists, cells, tables and figures")
    bench.add_argument("--dataset_dir", action="append", default=[], metavar="NAME=DIR", help="folder of a data set")
    bench.add_argument("--device", type=_devices, help="as cuda:0,cuda:1, dealt to the workers in turn")
    bench.add_argument("--workers", type=_positive_number, help="processes (default: one for each device)")
    bench.add_argument("--tables_only", type=_boolean, default=False, help="train nothing (default: false)")
    bench.add_argument("--overwrite", type=_boolean, default=False, help="remove an earlier run (default: false)")
    bench.add_argument("--use_mlflow", type=_boolean, default=True, help="track the cells in MLflow (default: true)")
    bench.add_argument("--tracking_uri", help="MLflow store (default: SQLite in output_dir)")
    report = verb("report", "Write one HTML file of trainings, evaluations and predictions.")
    report.add_argument(
        "--run", dest="folders", nargs="+", required=True, help="output_dir of one or more of them, side by side"
    )
    report.add_argument("--output", help="the HTML file to write (default: report.html in the first folder)")
    report.add_argument("--overlays", type=_boolean, default=True, help="with pictures of the cases (default: true)")
    report.add_argument("--log_paths", type=_boolean, default=False, help="name cases and folders (default: false)")
    report.add_argument("--overwrite", type=_boolean, default=False, help="replace that file (default: false)")
    pretrain = verb("pretrain", "Train the weights of the tiny SAM anew, on drawn images.")
    _add_keys(pretrain, PRETRAIN_KEYS, ("pretrain.json",), required=("output_dir",), texts=_PRETRAIN_TEXTS)
    demo = verb("demo", "Every verb once, on generated CT of the abdomen: at most a minute.")
    demo.add_argument("--output_dir", default="demo", help="folder for everything (default: demo)")
    demo.add_argument("--overwrite", type=_boolean, default=False, help="replace an earlier demo (default: false)")
    doctor = verb("doctor", "Show versions, device, and where weights and caches are.")
    doctor.add_argument("--cache_dir", help="folder of encoded images (default: in the package's cache)")
    doctor.add_argument(
        "--clear_cache", type=_boolean, default=False, help="remove all encoded images (default: false)"
    )
    return parser, verbs


def _add_keys(
    parser: Parser,
    keys: Sequence[str],
    files: Sequence[str],
    *,
    required: Sequence[str],
    texts: Mapping[str, str] | None = None,
) -> None:
    """One option a config key, checked against the type of its default; ``texts`` are helps other than in KEYS."""
    texts = {**KEYS, **(texts or {})}
    defaults: dict[str, Any] = {}
    for file in files:
        defaults |= json.loads((BUNDLE / "configs" / file).read_text(encoding="utf-8"))
    for key in keys:
        default = None if key in PRESET_KEYS else defaults[key]
        shown = "" if default is None or "default" in texts[key] or key in required else f" (default: {_show(default)})"
        parser.add_argument(
            f"--{key}",
            type=_type_of(key, default),
            required=key in required,
            default=argparse.SUPPRESS,
            help=texts[key] + shown,
            metavar="VALUE",
        )


def _show(default: Any) -> str:
    return json.dumps(default) if not isinstance(default, str) else ("computed" if default.startswith("$") else default)


def _type_of(key: str, default: Any) -> Callable[[str], Any]:
    if key in ("device", "method"):
        return {"device": _device, "method": _method}[key]
    if key in ("gate_penalty", "width", "encoder_rank"):
        return _number if key == "gate_penalty" else _positive_number
    if key in ("largest_component", "fill_holes"):
        return _boolean_or_names
    if isinstance(default, bool):
        return _boolean
    if isinstance(default, int):
        return _positive_number if key in POSITIVE_KEYS else _whole_number
    if isinstance(default, float):
        return _number
    return _text


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return text.lower() == "true"


def _boolean_or_names(text: str) -> Any:
    return _json(text) if text.startswith("[") else _boolean(text)


def _whole_number(text: str, least: int = 0) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"expected {least} or more, found {text!r}")
    return number


def _positive_number(text: str) -> int:
    return _whole_number(text, least=1)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected 0 or more, found {text!r}")
    return number


def _device(text: str) -> str:
    """A device that is there: asked of torch before anything is read."""
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"no device {text!r} on this machine; see `blosam doctor`") from None
    return text


def _method(text: str) -> str:
    try:
        return check_method(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("method: ")) from None


def _devices(text: str) -> list[str]:
    return [_device(name) for name in text.split(",")]


def _text(text: str) -> Any:
    """A JSON list or object as such, anything else as text; MONAI would run text that begins with $ or @ as code."""
    if text[:1] in ("$", "@", "%"):
        raise argparse.ArgumentTypeError(f"{text!r} begins with {text[0]}, which a config would take for code")
    return _json(text) if text[:1] in ("[", "{") else text


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression ({error})") from None
    return text


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
