"""Does a run fit, what does it move, how fast can it be, and is all in order for it."""
