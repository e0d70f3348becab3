"""Flax modules: the U-Net, the noisy classifier, their layers in plain form, and how λ becomes a time.

No losses, no sampling, no files. A form of a layer that is fast on one platform belongs in `kernels`.
"""
