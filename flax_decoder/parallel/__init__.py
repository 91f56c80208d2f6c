"""Many devices: which holds what."""
