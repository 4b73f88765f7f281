"""The graph runtime: requests, schedules, noise, captured graphs, backends and the engine that runs them."""
