"""Training scripts of the shapes that people have, with and without lc3's lines."""
