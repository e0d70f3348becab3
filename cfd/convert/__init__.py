"""Weights of other programs, read safely and written in this project's formats: `python -m cfd.convert`."""
