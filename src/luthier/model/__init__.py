"""Models: loading, anatomy, and the view through which all methods use a model."""
