"""The version, alone in its file: a build reads it without importing torch."""

__version__ = "0.2.0"
