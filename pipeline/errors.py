"""Every error a user can meet, and the exit code of its branch.

* FusepressError
  + UsageError (exit 2: the recipe, the task, the checkpoint or the target is wrong)
    - RecipeError
    - TaskError
    - CheckpointError
    - TargetError
  + StageError (exit 5: a stage could not do its work)
    - TraceError
    - TrainingError
    - ExportError
    - QuantizeError
    - BuildError
    - MeasureError
    - DeviceError
    - StoreError
    - RankError (exit code of the rank that failed)

A message says what was expected, what was found and where, and what to do.
"""

from __future__ import annotations

EXIT_RELEASED = 0
EXIT_USAGE = 2
EXIT_GATE_FAILED = 3
EXIT_INCONCLUSIVE = 4
EXIT_STAGE_FAILED = 5
EXIT_INTERRUPTED = 130


class FusepressError(Exception):
    """Base of all errors raised on purpose; carries the exit code of its branch."""

    exit_code = EXIT_STAGE_FAILED


class UsageError(FusepressError):
    """The input is wrong: nothing was spent yet."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """A recipe or an override does not fit the schema."""


class TaskError(UsageError):
    """The user's task does not keep the task contract."""


class CheckpointError(UsageError):
    """The checkpoint is missing, damaged, of another architecture or not finite."""


class TargetError(UsageError):
    """The target is unknown, or cannot do what the recipe asks."""


class StageError(FusepressError):
    """A stage could not do its work."""


class TraceError(StageError):
    """The model's channel dependencies could not be traced."""


class TrainingError(StageError):
    """Training met a NaN, an infinity or a divergence."""


class ExportError(StageError):
    """The model could not be exported to ONNX, or the file is not faithful."""


class QuantizeError(StageError):
    """The ONNX model could not be brought to the asked precision."""


class BuildError(StageError):
    """The engine could not be built."""


class MeasureError(StageError):
    """A latency could not be measured so that it can be trusted."""


class DeviceError(StageError):
    """A device could not be reached over SSH, is in use, or cannot do what was asked."""


class StoreError(StageError):
    """A run folder is locked, damaged or not writable."""


class RankError(StageError):
    """Another process of the same run failed or was lost.

    Args:
        message: what happened there.
        exit_code: of the error there.
        lost: it ended without a word, so that nobody else tells the user.
        details: its traceback, where there is one.
    """

    def __init__(
        self, message: str, *, exit_code: int = EXIT_STAGE_FAILED, lost: bool = False, details: str = ""
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.lost = lost
        self.details = details
