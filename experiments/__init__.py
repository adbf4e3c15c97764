"""The evaluation harness: tasks, methods, runs, reports. Not part of the package."""
