"""Target devices: profiles, legality, latency."""
