"""Time, encoder calls and memory of one training, and the ratio to running the frozen encoder at every step.

    python benchmarks/train_speed.py                  # ViT-B at 256 pixels: all three hypergradients; and at 1024
    python benchmarks/train_speed.py --quick          # the tiny SAM, seconds

Each row is a process of its own, for its peak memory: 4 images, batch 1, 100 epochs of 2 images = 200 iterations,
random weights (time does not depend on their values). "every step" runs the encoder on the lower and the upper image of
10 iterations, as the published code does, and scales to 200. Timed are encoder and trainer, without reading files,
validation and MLflow. Runs on CUDA where there is one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
from torch.utils.data import DataLoader, DistributedSampler

from blosam_monai.engines.bilevel_trainer import BilevelTrainer
from blosam_monai.losses import TaskDiceCELoss
from blosam_monai.networks.prompt_sam import PromptSam

ROWS = [
    {"model": "vit_b", "image_size": 256, "hypergradient": "first_order"},
    {"model": "vit_b", "image_size": 256, "hypergradient": "finite_difference"},
    {"model": "vit_b", "image_size": 256, "hypergradient": "exact"},
    {"model": "vit_b", "image_size": 256, "hypergradient": "first_order", "tasks": 4},
    {"model": "vit_b", "image_size": 1024, "hypergradient": "first_order"},
]
QUICK = [
    {"model": "tiny", "image_size": 256, "hypergradient": h} for h in ("first_order", "finite_difference", "exact")
]
COLUMNS = (
    *("model", "image_size", "hypergradient", "tasks", "encode_s", "train_s", "total_s", "ms_per_iteration"),
    *("encoder_calls", "every_step_s", "ratio", "peak_gb"),
)


def measure(model: str, image_size: int, hypergradient: str, tasks: int = 1, epochs: int = 100) -> dict:
    """One training of 4 images; seconds and gigabytes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = PromptSam(model, image_size, "random", [f"task {t}" for t in range(tasks)]).to(device)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    network.sam.image_encoder.register_forward_hook(count)
    torch.manual_seed(0)
    images = torch.randn(4, 3, image_size, image_size, device=device)
    grid = network.grid_size
    label = (torch.rand(4, tasks, grid, grid) > 0.7).float()

    if device.type == "cuda":
        torch.zeros(1, device=device).sum()  # start-up is not the encoder's
    start = _now(device)
    embeddings = [network.encode(image[None])[0].cpu() for image in images]
    encoded = _now(device)
    items = [{"embedding": e, "label": y} for e, y in zip(embeddings, label, strict=True)]
    trainer = _trainer(network, items, hypergradient, epochs, device)
    trainer.run()
    trained = _now(device)
    total_calls = calls

    every_step = _trainer(network, items, "first_order", 5, device)  # 10 iterations, with the encoder in each
    began = _now(device)
    every_step.run()
    for _ in range(10):
        network.encode(images[:1])
        network.encode(images[2:3])
    iterations = epochs * 2
    every_step_s = (_now(device) - began) / 10 * iterations
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _rss_bytes()
    return {
        "model": model,
        "image_size": image_size,
        "hypergradient": hypergradient,
        "tasks": tasks,
        "encode_s": round(encoded - start, 2),
        "train_s": round(trained - encoded, 2),
        "total_s": round(trained - start, 2),
        "ms_per_iteration": round(1000 * (trained - encoded) / iterations, 1),
        "encoder_calls": total_calls,
        "every_step_s": round(every_step_s, 1),
        "ratio": round(every_step_s / (trained - start), 1),
        "peak_gb": round(peak / 1e9, 2),
    }


def _trainer(network: PromptSam, items: list, hypergradient: str, epochs: int, device: torch.device) -> BilevelTrainer:
    def loader(half: list) -> DataLoader:
        return DataLoader(half, batch_size=1, sampler=DistributedSampler(half, num_replicas=1, rank=0, seed=0))

    return BilevelTrainer(
        device,
        epochs,
        loader(items[:2]),
        network.decoder,
        torch.optim.AdamW(network.lower_parameters(), lr=5e-3, weight_decay=0.1),
        torch.optim.AdamW(network.upper_parameters(), lr=5e-3, weight_decay=0.1),
        TaskDiceCELoss(),
        upper_data_loader=loader(items[2:]),
        hypergradient=hypergradient,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _rss_bytes() -> int:
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Measure every row in a process of its own and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(**options.row)))
        return
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}\n\n| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for row in QUICK if options.quick else ROWS:
        command = [sys.executable, "-W", "ignore", __file__, "--row", json.dumps(row)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        values = json.loads(output.splitlines()[-1])
        print("| " + " | ".join(str(values[c]) for c in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
