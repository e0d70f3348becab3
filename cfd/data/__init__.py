"""Images and labels: where they come from, how one is decoded, and how they become batches.

NumPy only: no JAX arrays, no networks.
"""
