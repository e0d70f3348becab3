"""Metrics of images: FID, sFID, Inception Score, precision and recall, and the networks whose features they use.

Images come in as arrays, from any source. Nothing here samples images.
"""
