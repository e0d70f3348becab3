"""The modes of `python -m cfd.main --mode=X`: one file per mode, and the functions that several modes share.

Only these files and `cfd.main` read a ConfigDict.
"""
