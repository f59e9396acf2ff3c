"""Recovery: training that gets the accuracy back."""
