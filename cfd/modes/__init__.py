"""What `python -m cfd.main --mode=X` does: one file per mode, and what several modes share.

Only these files and `cfd.main` read a ConfigDict.
"""
