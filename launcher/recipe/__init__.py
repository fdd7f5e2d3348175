"""YAML text -> `document` (values and places) -> `schema` (pydantic) -> `rules` (between fields) -> a frozen Recipe.

`reading` puts them together, `shipped` finds files by name.
"""

from launcher.recipe.reading import LoadedRecipe, all_keys, load_recipe
from launcher.recipe.schema import Recipe
from launcher.recipe.shipped import find_recipe, purpose, recipes, shipped_folder

__all__ = ["LoadedRecipe", "Recipe", "all_keys", "find_recipe", "load_recipe", "purpose", "recipes", "shipped_folder"]
