"""Trainings: methods, tasks and models, and how runs are made and kept."""
