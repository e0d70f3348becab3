"""Speed and memory on this machine: `python -m cfd.benchmark`."""
