"""The machine: processes, the device mesh, seeds, the XLA compiler, output, stopping on request, hung processes.

Nothing here knows about diffusion, images or runs.
"""
