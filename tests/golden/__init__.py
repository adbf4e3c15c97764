"""Bytes of format 1, written once and kept: ``python -m tests.golden --write``.

``frames.json``: inputs, frames and residuals. ``messages.json``: whole messages, and
what their headers say. ``ship.json``: shipped models, and their tensors. All as
hexadecimal, floats little-endian. Tests never write them.
"""
