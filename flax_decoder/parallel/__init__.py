"""Devices: how they are arranged, and what each of them holds."""
