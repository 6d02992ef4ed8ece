"""`lit-align bench training`: DPO by lit-align and by what else does it, on the same pairs.

Nothing is imported here: a worker shall hold in memory what its method needs, and no more.
"""
