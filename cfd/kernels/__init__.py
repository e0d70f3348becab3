"""Forms of the layers that are fast on one platform. `networks.layers` chooses among them.

Every form computes the same function as the plain layer, up to rounding. No parameters and no Flax modules.
"""
