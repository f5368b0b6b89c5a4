"""What one optimiser step is made of: its window, the forward pass, the probe, the order of rows, the settings."""
