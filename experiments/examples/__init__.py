"""One runnable script for each framework that lc3 has an adapter for."""
