"""From torch to ONNX, and how far the two agree."""
