"""What others wrote: code and pickles that need trust, names that are shown, secrets that are not, paths that wait."""
