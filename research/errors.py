"""The ways a run ends that are not bugs, each with its exit code (docs/interfaces.md)."""

import errno


class InputError(Exception):
    """The user's input is wrong: names the field, says what is wrong and what to do. Exit code 2.

    Printed as one line: `field: problem; cure`.
    """

    exit_code = 2

    def __init__(self, field: str, problem: str, cure: str):
        super().__init__(f"{field}: {problem}; {cure}")
        self.field, self.problem, self.cure = field, problem, cure

    def within(self, prefix: str) -> "InputError":
        """The same error, seen from the node that holds this one at `prefix`."""
        return InputError(f"{prefix}.{self.field}", self.problem, self.cure)


class Diverged(Exception):
    """The guard gave up: a loss or gradient that isn't finite, or a spike, which no rollback cured. Exit code 3."""

    exit_code = 3


class Interrupted(Exception):
    """Stopped on request, everything saved, restartable with the same command. Exit code 75."""

    exit_code = 75


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, the largest file


def is_full(error: Exception) -> bool:
    """Whether a write failed because there was no room (TensorStore has the code in the words of a ValueError)."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(f"[os_error_code='{code}']" in str(error) for code in FULL)
