"""The parts of the documentation that are read off the program each time it is built, so that none can go stale."""
