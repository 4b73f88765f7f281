"""Builds engine folders: capture, ONNX, parity, exactness, manifest."""
