"""Starting runs: a script, and files for every launcher. Not in the package."""
