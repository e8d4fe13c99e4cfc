"""What a user can get wrong.

The CLI prints these as one clear message and exits with code 2; every other exception keeps its traceback.
"""


class DefeatError(Exception):
    """Bad input. The message names the file or key at fault and says what would be right."""


class RecipeError(DefeatError):
    """A recipe, or a `--set` on the command line, that cannot be used."""


class DataError(DefeatError):
    """Images or annotations that are missing, broken or contradict each other."""


class CheckpointError(DefeatError):
    """A checkpoint that cannot be read, or does not fit the detector it is meant for."""


class TermError(DefeatError):
    """A distillation term that a pair of detectors cannot have."""


class RunError(DefeatError):
    """A run or study folder, or a device, that cannot be used as asked."""


class OutOfMemoryError(RunError):
    """What was asked for does not fit the memory. The message says what would."""


class Ended(Exception):  # noqa: N818 - the error is another's
    """Another process of this run failed and has said why; this one has nothing to add."""


class Interrupted(BaseException):
    """The user, or the system, asked a run to stop. The message says how to go on.

    code: exit status of the process.
    """

    def __init__(self, message: str, code: int = 130) -> None:
        super().__init__(message)
        self.code = code
