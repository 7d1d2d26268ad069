"""The command line: ``blosam <verb>``, thin over the bundle."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from blosam_monai import __version__
from blosam_monai.methods import BUNDLE, compose_config
from blosam_monai.parser import EVALUATE_KEYS, PREDICT_KEYS, PRETRAIN_KEYS, TRAIN_KEYS, build_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. What a user can mend is said in one line, without a traceback."""
    parser, verbs = build_parser()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in verbs:
        verbs[arguments[0]].check_names(arguments[1:])  # before argparse asks for what else is missing
    options = parser.parse_args(arguments)
    try:
        VERBS[options.verb](options)
    except KeyboardInterrupt:
        resumed = "; --resume true goes on from the last saved state."
        hint = {"train": resumed, "pretrain": resumed, "bench": "; the same command goes on."}.get(options.verb, ".")
        print(f"blosam: interrupted{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        from mlflow.exceptions import MlflowException  # a store that is unknown or does not answer
        from tqdm import tqdm

        from blosam_monai.errors import one_line, root_cause

        cause = root_cause(error)
        if not isinstance(cause, (ValueError, OSError, MlflowException)):
            raise
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # or the message would stand at the end of its line
        print(f"blosam: {one_line(cause)}", file=sys.stderr)
        return 1
    return 0


def _overrides(options: argparse.Namespace, keys: Sequence[str]) -> dict[str, Any]:
    return {key: getattr(options, key) for key in keys if hasattr(options, key)}


def _run_bundle(files: Sequence[str], workflow_type: str, overrides: dict[str, Any]) -> None:
    """What ``python -m monai.bundle run`` does, with these overrides."""
    from monai.bundle import ConfigWorkflow

    configs = BUNDLE / "configs"
    logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)  # that presets lie in a folder of their own
    workflow = ConfigWorkflow(
        config_file=[str(configs / file) for file in files],
        meta_file=str(configs / "metadata.json"),
        logging_file=str(configs / "logging.conf"),
        workflow_type=workflow_type,
        bundle_root=str(BUNDLE),
        **overrides,
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()


def _train(options: argparse.Namespace) -> None:
    method, overrides = getattr(options, "method", "blosam"), _overrides(options, TRAIN_KEYS)
    compose_config(method, overrides)  # refuses an option that the method does not use
    _run_bundle(["train.json", f"methods/{method}.json"], "train", {"dataset_dir": ".", **overrides})
    print(f"model: {Path(getattr(options, 'ckpt_dir', Path(options.output_dir, 'models')), 'model.safetensors')}")


def _evaluate(options: argparse.Namespace) -> None:
    overrides = {"dataset_dir": ".", **_overrides(options, EVALUATE_KEYS), "ckpt_dir": str(_models(options.model))}
    _run_bundle(["inference.json", "evaluate.json"], "infer", overrides)
    print(f"scores: {Path(options.output_dir, 'summary.json')}, by case: {Path(options.output_dir, 'cases.csv')}")


def _predict(options: argparse.Namespace) -> None:
    overrides = _overrides(options, PREDICT_KEYS)
    overrides |= {"dataset_dir": options.input, "ckpt_dir": str(_models(options.model))}
    _run_bundle(["inference.json"], "infer", overrides)
    print(f"masks: {options.output_dir}")


def _models(model: str) -> Path:
    """Folder of the model: a training's output_dir or its ckpt_dir."""
    for folder in (Path(model, "models"), Path(model)):
        if (folder / "model.safetensors").is_file():
            return folder
    raise FileNotFoundError(
        f"model: no model.safetensors in {model} or its folder models; give a training's output_dir."
    )


def _datalist(options: argparse.Namespace) -> None:
    from blosam_monai.data.datalist_command import run

    run(options, vars(build_parser()[0].parse_args(["datalist"])))


def _bench(options: argparse.Namespace) -> None:
    from blosam_monai.bench.command import run

    print(run(options))


def _report(options: argparse.Namespace) -> None:
    from blosam_monai.report import write_report

    given = {name: getattr(options, name) for name in ("overlays", "log_paths", "overwrite")}
    print(f"report: {write_report(options.folders, options.output, **given)}")


def _pretrain(options: argparse.Namespace) -> None:
    _run_bundle(["pretrain.json"], "train", _overrides(options, PRETRAIN_KEYS))
    model = getattr(options, "sam_model", "tiny")
    print(f"weights: {Path(options.output_dir, model + '.safetensors')}, a file for --sam_checkpoint")


def _demo(options: argparse.Namespace) -> None:
    from blosam_monai.demo import run_demo

    def run(arguments: list[str]) -> int:
        print(f"\n$ blosam {shlex.join(arguments)}", flush=True)
        return main(arguments)

    print(run_demo(options.output_dir, overwrite=options.overwrite, run=run))


def _state_of_tiny() -> str:
    """The checkpoint in this package: whether it is there, and is the published one."""
    from blosam_monai.files import file_sha256
    from blosam_monai.networks.sam import TINY_FILE, TINY_SHA256

    if not TINY_FILE.is_file():
        return f"{TINY_FILE.name}: missing from the package; reinstall blosam_monai"
    found = file_sha256(TINY_FILE)
    if found != TINY_SHA256:
        return f"{TINY_FILE.name}: altered, SHA-256 {found}, published {TINY_SHA256}; reinstall blosam_monai"
    return f"{TINY_FILE.name}: in the package, SHA-256 {found}, as published"


def _doctor(options: argparse.Namespace) -> None:
    import importlib.metadata
    import platform

    import torch

    from blosam_monai.data.embedding_cache import open_cache
    from blosam_monai.networks.sam import SAM_FILES, cache_dir

    print(f"blosam_monai {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    needed = (
        "torch",
        "torchvision",
        "monai",
        "pytorch-ignite",
        "mlflow",
        "segment-anything",
        "safetensors",
        "jinja2",
        "matplotlib",
    )
    for package in (*needed, "nibabel", "SimpleITK", "pydicom", "highdicom"):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = f"missing: pip install {'blosam_monai[dicom]' if package == 'highdicom' else package}"
        print(f"  {package:<18}{found}")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"device: {', '.join(names) or 'cpu'} ({torch.get_num_threads()} threads)")
    print(f"bundle: {BUNDLE}")
    print(f"checkpoints: {cache_dir()} (set BLOSAM_CACHE for another folder)")
    for model, file in SAM_FILES.items():
        path = cache_dir() / Path(file.url).name
        state = "here" if path.is_file() else f"missing; {file.url} ({file.size / 1e6:.0f} MB, SHA-256 {file.sha256})"
        print(f"  {model:<6} {path.name}: {state}")
    print(f"  tiny   {_state_of_tiny()}")
    cache = open_cache(options.cache_dir)
    if cache is None:
        print("encoded images: no cache")
    elif options.clear_cache:
        print(f"encoded images: {cache.clear()} removed from {cache.folder}")
    else:
        entries, size = cache.stats()
        bound = f"{size / 2**20:.1f} MiB of at most {cache.max_bytes / 2**30:.0f} GiB"
        print(f"encoded images: {entries}, {bound} in {cache.folder} (--clear_cache true removes them)")


VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "datalist": _datalist,
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "bench": _bench,
    "report": _report,
    "pretrain": _pretrain,
    "demo": _demo,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
