"""Adapters, one file per framework. Always imported as ``lc3.hooks``."""

if __name__ != "lc3.hooks":
    raise ImportError(
        f"import lc3.hooks, not {__name__}: the folder is only mapped there"
    )
