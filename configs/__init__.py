"""One file an experiment; each is a complete lab note. Run one with `python -m cfd.main --config=configs/NAME.py`."""
