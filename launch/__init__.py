"""Starting runs, and a lab of rate-limited hosts on one machine. Not in the package."""
