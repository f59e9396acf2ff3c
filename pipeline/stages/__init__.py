"""Stages: each maps input artifacts to output artifacts."""
