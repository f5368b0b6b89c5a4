"""Operations that the passes through a model rest on: cross-entropy, low-rank and sparse linear layers."""
