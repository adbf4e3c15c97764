"""Ranks as processes, and hosts with links of a given rate on one machine."""
