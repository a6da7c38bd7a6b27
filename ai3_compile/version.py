"""The version, alone: setup and caches read it without importing the rest."""

__version__ = "0.1.0"
