"""Fused operators of diffusion models, one op a file. Knows nobody else in the package."""
