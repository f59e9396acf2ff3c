"""ONNX files and engines: export, checks, runtimes, builders."""
