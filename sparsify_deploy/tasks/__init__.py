"""Tasks: what a model is for, as a loss and metrics. An entry defines `VERSION`, `Params`, `create(params) -> Task`."""
