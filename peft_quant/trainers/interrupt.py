"""Interruptible training: a checkpoint on Ctrl-C, and the last complete one to resume from."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..reading import InvalidFileError, read_json


logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]{{1,18}})")


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint of a Trainer, which writes `trainer_state.json` last."""
    found = {
        int(match[1]): directory
        for directory in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := _CHECKPOINT.fullmatch(directory.name))
    }
    for step in sorted(found, reverse=True):
        try:
            read_json(found[step] / _STATE)
        except (OSError, InvalidFileError) as error:
            logger.warning("%s is incomplete and was skipped: %s", found[step], error)
            continue
        return os.fspath(found[step])
    return None


class SaveOnInterrupt(TrainerCallback):
    """Makes a Trainer stop at the first Ctrl-C, with a checkpoint after the current step.

    A second Ctrl-C ends a single process at once. The processes of a distributed run agree on the step, and further
    interrupts are ignored there, because launchers may send several.

    Example:
        ```py
        >>> interrupt = SaveOnInterrupt(trainer)
        >>> with interrupt.listening():
        ...     trainer.train()
        >>> interrupt.saved  # whether training was interrupted
        ```

    Attributes:
        saved: whether training was interrupted and a checkpoint requested.
    """

    def __init__(self, trainer: Any) -> None:
        self.saved = False
        self._trainer = trainer
        self._requested = False
        trainer.add_callback(self)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT inside the context."""
        before = signal.signal(signal.SIGINT, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _request(self, *_: Any) -> None:
        if self._requested and self._trainer.accelerator.num_processes == 1:
            raise KeyboardInterrupt
        self._requested = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        accelerator = self._trainer.accelerator
        requested = self._requested
        if accelerator.num_processes > 1:
            if requested:
                accelerator.set_trigger()
            requested = accelerator.check_trigger()
        if requested:
            self.saved = control.should_save = control.should_training_stop = True
