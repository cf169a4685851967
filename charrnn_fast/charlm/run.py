"""The folder of a run: whether it may be written, and its lock."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import checkpoint
from .errors import UsageError
from .metrics import trim_metrics
from .model import ModelConfig
from .state import step_of
from .vocabulary import Vocabulary


class Run:
    """A folder that a training writes, or goes on in. Nothing is written before ``begun``.

    UsageError where there is no run to resume, or one that nobody asked to overwrite. In a group
    of processes only the first one writes (``writes``).
    """

    def __init__(
        self, folder: str | Path, *, resume: bool, overwrite: bool, writes: bool = True
    ) -> None:
        if resume and overwrite:
            raise UsageError("--resume goes on with a run, --overwrite replaces it: not both")
        self.folder, self.resume, self.overwrite = Path(folder), resume, overwrite
        self.writes, self._begun, self._locked = writes, False, False
        self.check()

    def check(self) -> None:
        exists = (self.folder / checkpoint.CONFIG).exists()
        if self.resume and not exists:
            raise UsageError(f"no run to resume in {self.folder}")
        if exists and not (self.resume or self.overwrite):
            raise UsageError(
                f"{self.folder} already holds a run; choose another --out-dir, or --resume it, "
                "or --overwrite it"
            )

    @contextmanager
    def begun(
        self, config: ModelConfig, vocabulary: Vocabulary, training: dict[str, Any], step: int
    ) -> Iterator[None]:
        """Holds the folder's lock, and on the first entry writes the settings of a run that starts
        or resumes at ``step``. Reentrant.

        UsageError where another training is writing, or has been here since this one looked.
        """
        if self._locked or not self.writes:
            yield
            return
        with checkpoint.lock(self.folder):
            self._locked = True
            try:
                if not self._begun:
                    self._begin(config, vocabulary, training, step)
                yield
            finally:
                self._locked = False

    def _begin(
        self, config: ModelConfig, vocabulary: Vocabulary, training: dict[str, Any], step: int
    ) -> None:
        self.check()
        if self.resume:
            if step_of(self.folder / checkpoint.LAST) != step:
                raise UsageError(f"another training has gone on in {self.folder}: resume again")
            trim_metrics(self.folder, step)
        else:
            for name in (checkpoint.CONFIG, checkpoint.LAST, checkpoint.MODEL):
                (self.folder / name).unlink(missing_ok=True)  # of one that is overwritten
            checkpoint.write_atomic(self.folder / checkpoint.METRICS, b"")
        # Of a resumed run as well: the next resumption goes on with what has changed now.
        for name in ("text", "init_from"):  # wherever one stands when the run goes on
            if training[name] is not None:
                training = {**training, name: os.path.abspath(training[name])}
        checkpoint.save_settings(self.folder, config, vocabulary, training)
        self._begun = True

    def command(self, words: str) -> str:
        """A command about this run, to be pasted into a shell: ``train --resume``."""
        return f"charrnn-fast {words} {shlex.quote(str(self.folder))}"
