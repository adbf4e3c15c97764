"""The path of a gradient between ranks: by owners, in one hop, or on two levels."""
