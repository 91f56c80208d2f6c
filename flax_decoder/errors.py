"""The exceptions of the package, and the exit code of a command that ends with one."""


class UserError(ValueError):
    """Invalid input: a setting, a file, a prompt. Exit code 2.

    The message has one or two lines: file, field and value, and what to do.
    """


class FaultError(RuntimeError):
    """A fault during work: the disk, a checkpoint, a loss that is not a number. Exit code 1."""


class BrokenError(FaultError):
    """A damaged file: a bit has changed, or a part is missing. Exit code 1."""


class InUseError(RuntimeError):
    """Another process uses the run folder. Exit code 73."""
