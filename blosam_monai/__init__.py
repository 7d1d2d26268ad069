"""Prompt-free SAM, fine-tuned on two to eight labelled images by bi-level optimisation, as a MONAI bundle.

Importing this package imports nothing heavy. The rooms: ``networks`` (things with weights), ``engines`` (the bilevel
trainer), ``data`` (from files to tensors and back), and ``losses``, ``transforms``, ``inferers``, ``metrics``,
``handlers``.
"""

import os
import sys

__version__ = "0.1.0"

# Hospitals: nothing leaves the machine unless asked. Set before MLflow is imported; a user's own setting wins.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
if "mlflow" in sys.modules:  # `python -m monai.bundle` has imported it before us: make it look again
    from mlflow.telemetry.client import set_telemetry_client

    set_telemetry_client()
