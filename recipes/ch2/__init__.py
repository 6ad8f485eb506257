"""Recipes of chapter 2."""
