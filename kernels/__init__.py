"""Native sources, installed with the package."""
