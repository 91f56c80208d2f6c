"""What the system says of a process's memory; Linux only."""

from pathlib import Path


def mib_level(name: str) -> float:
    """A level of this process's memory, such as "VmRSS", what it has now, or "VmHWM", the most it has had.

    Raises:
        OSError: the system has no such file.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
