"""luthier: fine-tune language models with less."""

__version__ = "0.1.0.dev0"
