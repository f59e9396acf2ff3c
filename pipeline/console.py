"""What a person sees while a run is at work: a progress bar on a terminal, plain lines in CI."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

PLAIN_INTERVAL_S = 15.0


class Reporter:
    """Tells the progress of stages.

    Args:
        quiet: say nothing at all (library use, `--json`).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        self.console: Console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._live = not quiet and sys.stderr.isatty()
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._stage = ""
        self._last = 0.0

    def line(self, text: str, *, style: str | None = None) -> None:
        """One line of text."""
        self.console.print(text, style=style, markup=False)

    def warn(self, text: str) -> None:
        """One line that should be noticed."""
        self.console.print(f"! {text}", style="yellow", markup=False)

    def begin(self, stage: str, position: str) -> None:
        """A stage starts."""
        self._stage, self._last = stage, time.monotonic()
        if not self._live:
            self.line(f"{position} {stage} ...")
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self._bar = self._progress.add_task(f"{position} {stage}", total=1.0, note="")
        self._progress.start()

    def update(self, fraction: float, note: str = "") -> None:
        """The stage's progress between 0 and 1, with a short note (loss, ETA)."""
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=min(1.0, fraction), note=note)
            return
        now = time.monotonic()
        if now - self._last >= PLAIN_INTERVAL_S:
            self._last = now
            self.line(f"      {self._stage} {100 * fraction:3.0f} %  {note}")

    def end(self) -> None:
        """The stage is over, however it ended."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._bar = None
