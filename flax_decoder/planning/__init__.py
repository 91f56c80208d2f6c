"""Planning a run: does it fit, what do devices send, how fast can it be, and is the machine ready for it."""
