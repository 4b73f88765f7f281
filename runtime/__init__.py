"""The graph runtime: requests, schedules, noise, graphs, backends, and the engine over them."""
