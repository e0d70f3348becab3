"""Classifier-free diffusion guidance (Ho and Salimans, arXiv:2207.12598) in JAX and Flax."""

__version__ = "0.1.0"
