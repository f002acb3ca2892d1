"""Examine an installation and a machine: versions, devices, libraries that really run, and what a recipe needs."""
