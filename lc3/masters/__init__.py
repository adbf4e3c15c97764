"""Ranks that own a share of the model: gradients go there, masters stay there."""
