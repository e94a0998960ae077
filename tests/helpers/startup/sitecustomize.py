"""Imported by every Python process on whose path this folder is: see helpers/moments.py."""

from helpers.moments import install_from_environment

install_from_environment()
