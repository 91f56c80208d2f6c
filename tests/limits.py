"""How long a test waits for what should end."""

# After so long a process is taken to hang: far longer than it needs on a slow machine where much else runs.
HANGS_SECONDS = 1800
