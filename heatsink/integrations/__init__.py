"""Heatsink inside other libraries: diffusers' pipelines, torch.compile, attention processors."""
