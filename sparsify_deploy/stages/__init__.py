"""One step of a plan a file: load, call, save, measure."""
