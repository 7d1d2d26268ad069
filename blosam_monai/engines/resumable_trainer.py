"""What a trainer must do so that a training can be stopped and gone on with."""

from __future__ import annotations

from ignite.engine import Events
from monai.engines import Trainer


class ResumableTrainer(Trainer):
    """MONAI's trainer, which goes on from the epoch that a loaded state ended with."""

    def run(self) -> None:
        """Train to the last epoch; after a state was loaded, from where it ended. What is finished stays as it is."""
        if self.state.epoch >= self.state.max_epochs:  # ignite would start again from the first epoch
            self.fire_event(Events.STARTED)
            self.fire_event(Events.COMPLETED)
            return
        super().run()
