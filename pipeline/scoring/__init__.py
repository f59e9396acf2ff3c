"""Channel scores: which channels a model can lose."""
