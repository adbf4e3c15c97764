"""Between ranks: bytes in rank order, sealed, by a thread of their own."""
