"""Denoising diffusion GANs: Xiao, Kreis and Vahdat (arXiv:2112.07804). `python -m cfd.gan` and `cfd.gan.gaussians`.

A few large steps of the chain, whose posterior is not Gaussian: a generator with latents draws the data that the step
leads to, and is trained against a discriminator. There is no score, and therefore no guidance. Nothing else in the
package imports this room.
"""
