"""The pipeline: from a trained checkpoint to a judged release."""
