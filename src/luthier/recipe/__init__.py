"""The recipe: the description of a run, as a typed object and as a YAML file.

Unknown keys, wrong types and impossible combinations are refused before anything is loaded. The error is one sentence with
line, key, value and remedy.
"""

from luthier.recipe.settings import DataSettings, Recipe
from luthier.recipe.text import build, load, load_file, parse

__all__ = ["DataSettings", "Recipe", "build", "load", "load_file", "parse"]
