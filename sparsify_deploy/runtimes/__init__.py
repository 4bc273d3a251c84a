"""The runtimes menu: one file for each way to turn an ONNX file into an engine and to run it."""
