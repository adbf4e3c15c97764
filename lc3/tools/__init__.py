"""Measurements before a training: what compression would save here, and cost."""
