"""Allocation: how many channels each coupled group keeps."""
