"""The work behind `luthier collaborate`, with files and over flwr."""
