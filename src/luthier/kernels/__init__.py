"""Operations for models: cross-entropy, low-rank and sparse linear layers."""
