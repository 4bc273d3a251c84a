"""What an ONNX file holds: weights, Q/DQ, N:M patterns and which layers hardware could run sparse."""
