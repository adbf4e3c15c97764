"""Local steps: who is there, what each has moved, and the outer step."""
