"""The evaluator of cases of any size: read, segment, write or score one after another; a bad one stops no other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine, EventEnum
from monai.engines import Evaluator
from monai.inferers import Inferer
from monai.utils.enums import CommonKeys

from blosam_monai.errors import one_line, root_cause, tell
from blosam_monai.outputs import Output, ResultExistsError

logger = logging.getLogger(__name__)

DONE, KEPT, FAILED = "done", "kept", "failed"


class CaseEvents(EventEnum):
    """After a case, whatever became of it; the last of the engine's ``cases`` says what."""

    CASE_COMPLETED = "case_completed"


@dataclass(frozen=True)
class Case:
    """What became of a case.

    Attributes:
        number: from 1, in the order of the run.
        given: the item with its paths.
        status: ``done``, ``kept`` (an earlier result was there) or ``failed``.
        seconds: from reading to writing.
        outputs: the files that were written.
        notes: what the readers had to decide.
        error: why it failed, else None.
    """

    number: int
    given: Mapping[str, Any]
    status: str
    seconds: float
    outputs: Sequence[Output] = ()
    notes: Sequence[str] = ()
    error: Exception | None = None


class CaseEvaluator(Evaluator):
    """Evaluator whose every iteration is one case, from its files to its result, within the memory of one case.

    MONAI's ``SupervisedEvaluator`` reads through its loader, so that an unreadable file ends the run, and moves whole
    volumes to the device. The output of an iteration is a list: of the one item with ``pred``, or of nothing.

    Args:
        device: where the network is.
        val_data_loader: a loader of items that hold paths, ``batch_size`` 1, ``collate_fn`` no_collation.
        network, inferer: see ``SliceStreamInferer``.
        preprocessing: path item -> item of a case.
        case_postprocessing: item with ``pred`` -> item; writes, for a prediction.
        val_handlers: see ``Evaluator``.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: Iterable,
        network: Any,
        inferer: Inferer,
        *,
        preprocessing: Callable[[Mapping], dict],
        case_postprocessing: Callable[[Mapping], dict],
        val_handlers: Sequence | None = None,
    ) -> None:
        self.network, self.inferer = network, inferer
        self.preprocessing, self.case_postprocessing = preprocessing, case_postprocessing
        self.cases: list[Case] = []
        super().__init__(
            device=torch.device(device),
            val_data_loader=val_data_loader,
            val_handlers=val_handlers,
            event_names=[CaseEvents],
            decollate=False,
        )

    def run(self, global_epoch: int = 1) -> None:
        """Run through all cases; ``cases`` then says what became of each."""
        self.cases = []
        super().run(global_epoch)
        if kept := sum(case.status == KEPT for case in self.cases):
            tell(f"{kept} of {len(self.cases)} cases had their result and are kept; overwrite=true replaces them.")

    def raise_failures(self) -> None:
        """Raise if cases have failed: called when everything else is done.

        Raises:
            ValueError: how many failed, and where it is said why.
        """
        failed = sum(case.status == FAILED for case in self.cases)
        if failed:
            raise ValueError(f"{failed} of {len(self.cases)} cases failed, see above and manifest.jsonl in output_dir.")

    def _iteration(self, engine: Engine, batchdata: Sequence[Mapping]) -> list[dict]:
        (given,) = batchdata
        item, error, status, begin = dict(given), None, DONE, time.monotonic()
        try:
            item = self.preprocessing(given)
            with self.mode(self.network):
                where = {"spacing": item["spacing"].tolist(), "slice_axis": item["slice_axis"]}
                if self.network.prompted:
                    where["label"] = item.get(CommonKeys.LABEL)
                item[CommonKeys.PRED] = self.inferer(item[CommonKeys.IMAGE], self.network, **where)
            item = self.case_postprocessing(item)
        except Exception as raised:  # whatever is wrong with one case, the others are not
            if isinstance(root_cause(raised), ResultExistsError):
                status = KEPT
            else:
                error, status = raised, FAILED
                tell(one_line(raised))
                logger.debug("case %d", len(self.cases) + 1, exc_info=raised)
        seconds, notes = time.monotonic() - begin, item.get("notes", ())
        self.cases.append(Case(len(self.cases) + 1, given, status, seconds, item.get("written", ()), notes, error))
        engine.fire_event(CaseEvents.CASE_COMPLETED)
        engine.state.batch = [item] if status == DONE else []
        return engine.state.batch
