"""Components as graphs: capture, provenance, passes and execution for parity."""
