"""Recipes: functions that return what builds a named artifact."""
