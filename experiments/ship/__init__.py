"""The codec for models beside its rivals, and what each of the six works brings."""
