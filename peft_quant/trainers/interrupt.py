"""Training that is interrupted, and goes on: a checkpoint at Ctrl-C, and the last whole one."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a Trainer that was written to its end; `trainer_state.json` comes last."""
    found = {
        int(directory.name.rpartition("-")[2]): directory
        for directory in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if directory.name.rpartition("-")[2].isdigit()
    }
    for step in sorted(found, reverse=True):
        try:
            json.loads((found[step] / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was not written to its end, and is passed over.", found[step])
            continue
        return os.fspath(found[step])
    return None


class SaveOnInterrupt(TrainerCallback):
    """Makes a Trainer write a checkpoint at the first Ctrl-C, after the step it is in, and stop.

    The second one ends a single process at once, as it would without. Processes of one run, each of which a launcher
    may interrupt more than once, agree on the step.

    Example:
        ```py
        >>> interrupt = SaveOnInterrupt(trainer)
        >>> with interrupt.listening():
        ...     trainer.train()
        >>> interrupt.saved  # whether it was
        ```

    Attributes:
        saved: whether the training was stopped, with a checkpoint.
    """

    def __init__(self, trainer: Any) -> None:
        self.saved = False
        self._trainer = trainer
        self._asked = False
        trainer.add_callback(self)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT within."""
        before = signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _ask(self, *_: Any) -> None:
        if self._asked and self._trainer.accelerator.num_processes == 1:
            raise KeyboardInterrupt
        self._asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        accelerator = self._trainer.accelerator
        asked = self._asked
        if accelerator.num_processes > 1:
            if asked:
                accelerator.set_trigger()
            asked = accelerator.check_trigger()
        if asked:
            self.saved = control.should_save = control.should_training_stop = True
