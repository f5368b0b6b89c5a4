"""The parts of one optimiser step: window, forward pass, probe, order of rows, settings."""
