"""One model attached to other ranks, and the state that its user holds."""
