"""`python -m flax_decoder` is `flax-decoder`."""

import sys

from flax_decoder.cli import main

sys.exit(main())
