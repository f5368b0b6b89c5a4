"""The base of all methods: the base class, the table of kinds, the list of methods, and how a recipe builds one."""

from luthier.method.base import Facts, Method, Problem, Source, Traits

__all__ = ["Facts", "Method", "Problem", "Source", "Traits"]
