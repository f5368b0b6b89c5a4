"""Demonstrations: the recipe of `luthier demo`, and three organisations that tune together."""
