"""Measurements of codec, steps and memory, and of bytes and loss between sites."""
