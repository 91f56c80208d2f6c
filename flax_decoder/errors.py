"""What can go wrong, by whose hand: the commands turn each class into its exit code."""


class UserError(ValueError):
    """The user's input cannot be used: a setting, a file, a prompt. Exit code 2.

    The message is one or two lines: it names the file, field and value, and says what to do.
    """


class FaultError(RuntimeError):
    """Something broke that the user did not ask for: a disk, a checkpoint, a loss that is not a number. Exit code 1."""


class BrokenError(FaultError):
    """A file is not what was once written: a bit has changed, or a part is missing. Exit code 1."""


class InUseError(RuntimeError):
    """Another process works in the run folder. Exit code 73."""
