"""Where the examples come from: one file a source."""
