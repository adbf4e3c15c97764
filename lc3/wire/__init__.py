"""What ranks say to each other, as bytes and back."""
