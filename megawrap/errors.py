"""The errors megawrap shows to its users.

Every error says in one sentence what was given and what is allowed; `hint` says how to fix it. Command lines
print `megawrap: error: MESSAGE. HINT` and end with `exit_code`, never with a traceback. Anything that is not a
`MegawrapError` is a defect of megawrap and keeps its traceback.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_DIFFERENT = 1  # diff and verify: the two sides differ
EXIT_USAGE = 2  # the user's input is wrong; nothing was written
EXIT_CORRUPT = 3  # a file is damaged
EXIT_UNFINISHED = 75  # saved, but the last iteration was not reached (EX_TEMPFAIL: run the same command again)


class MegawrapError(Exception):
    """A problem with what the user gave, not with megawrap.

    Args:
        message: what was given and what is allowed, with the numbers and names of this case.
        hint: how to fix it; empty when the message already says so.
        corrupt: the file named in the message is damaged (exit code 3 instead of 2).
    """

    def __init__(self, message: str, *, hint: str = "", corrupt: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = EXIT_CORRUPT if corrupt else EXIT_USAGE

    def __str__(self) -> str:
        return f"{self.message.rstrip('.')}. {self.hint}" if self.hint else self.message


class ConfigError(MegawrapError):
    """The configuration: recipe, flags, or their combination with the machine."""


class DataError(MegawrapError):
    """JSONL, indexed datasets, split strings, tokenizers."""


class CheckpointError(MegawrapError):
    """Megatron checkpoints of this project or another."""


class ConversionError(MegawrapError):
    """Hugging Face directories and what cannot be converted."""


class TrainingError(MegawrapError):
    """A run that cannot go on: a loss or gradient that is not finite."""


class LaunchError(MegawrapError):
    """Starting ranks and submitting jobs."""
