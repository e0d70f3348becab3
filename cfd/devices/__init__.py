"""The machine: processes and the device mesh, the XLA compiler, stopping on request, and hung processes.

Nothing here knows about diffusion, images or runs.
"""
