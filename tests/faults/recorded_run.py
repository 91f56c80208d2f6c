"""Trains below a folder while its calls are recorded: twice, as the first start loses its disk on the way.

python recorded_run.py FOLDER RECORDS ARGUMENTS
"""

import errno
import sys
from pathlib import Path

import file_calls

from flax_decoder.cli import main
from flax_decoder.training.loop import MetricsLog

folder, records, *arguments = sys.argv[1:]
# A line after the checkpoint from which the second start continues.
LAST_STEP = 22
add = MetricsLog.add


def add_or_fail(log, row):
    add(log, row)
    if row["step"] == LAST_STEP and file_calls.num_calls() == 0:
        file_calls.fail(1, errno.EIO, all_later=True)


file_calls.watch(Path(folder), Path(records))
MetricsLog.add = add_or_fail
code = main(arguments)
assert code == 1 and file_calls.failed_call(), code
file_calls.fail(-1, None)
MetricsLog.add = add
sys.exit(main(arguments))
