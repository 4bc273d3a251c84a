"""From a PyTorch model to a 2:4-sparse INT8 engine, with a measured verdict on what that bought."""

__version__ = "0.1.0"
