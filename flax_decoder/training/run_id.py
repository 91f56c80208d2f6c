"""Random names that tell runs apart, whatever their folders are called."""

import re
import secrets
from pathlib import Path

from flax_decoder.errors import BrokenError
from flax_decoder.io.files import open_regular
from flax_decoder.io.strict_json import shown

# In a run folder. Manifests, the log and the lock repeat what it says; runs of earlier versions have none.
RUN_ID = "run_id"


def new_id() -> str:
    """A new id."""
    return secrets.token_hex(8)


def read_id(path: Path, advice: str = "restore it from a copy, or delete it") -> str | None:
    """The id in a file, None if there is none; raises BrokenError, which ends with `advice`, if it is damaged."""
    try:
        with open_regular(path, follow_links=False) as file:
            content = file.read(100)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BrokenError(f"{path}: cannot be read: {error.strerror}; {advice}") from None
    if not re.fullmatch(rb"[0-9a-f]{16}\n?", content):
        raise BrokenError(f"{path}: is damaged: {shown(content)} is no id; {advice}")
    return content.decode().strip()
