"""A run's folder: its lock and config, checkpoints, logs, results and `.npz` files.

No networks and no sampling: what is stored here is arrays, JSON and text.
"""
