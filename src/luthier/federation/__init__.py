"""The work of the commands of `luthier collaborate`, on files and over flwr."""
