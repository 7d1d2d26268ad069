"""Things that run a batch: the bilevel trainer and its hypergradients."""

from blosam_monai.engines.bilevel_trainer import BilevelEvents, BilevelTrainer

__all__ = ["BilevelEvents", "BilevelTrainer"]
