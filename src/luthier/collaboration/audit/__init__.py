"""What the bytes we are about to send would give away, measured with the truth at hand."""
