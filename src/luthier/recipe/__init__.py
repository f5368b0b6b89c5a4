"""The recipe: the description of a run, as a typed object and as a YAML file.

Unknown keys, wrong types and impossible combinations are refused before anything is loaded. The error is one sentence with
line, key, value and remedy. Reading a recipe imports torch only once its keys and names are right.
"""

from typing import TYPE_CHECKING

from luthier.support.lazy import lazy

if TYPE_CHECKING:
    from luthier.recipe.settings import DataSettings
    from luthier.recipe.text import build, load, load_file, parse
    from luthier.recipe.whole import Recipe

EXPORTS = {
    "DataSettings": "settings",
    "Recipe": "whole",
    "build": "text",
    "load": "text",
    "load_file": "text",
    "parse": "text",
}
__getattr__, __dir__, _ = lazy(__name__, EXPORTS)
__all__ = ["DataSettings", "Recipe", "build", "load", "load_file", "parse"]
