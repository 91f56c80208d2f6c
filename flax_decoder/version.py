"""The version of this package, also where it is not installed, as in a checkout."""

__version__ = "0.1.0"
