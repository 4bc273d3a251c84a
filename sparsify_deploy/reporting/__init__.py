"""What a reader gets of measurements: why a layer is sparse or not, tables, the page, `deploy/`, Triton's folder."""
