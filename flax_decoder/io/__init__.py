"""Atomic files, folder locks, bounded reading of untrusted files, and text that is safe to print."""
