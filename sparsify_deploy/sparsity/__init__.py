"""Pure tensor mathematics of sparse weights: masks, allocation over layers, schedules, N:M patterns.

Knows tensors, parameter names and shapes; knows no files but a mask's own, no recipe and no stage.
"""
