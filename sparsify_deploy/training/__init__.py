"""The one training loop and the methods that drive it."""
