"""All metadata is in pyproject.toml; this file is here for tools that ask for it."""

from setuptools import setup

setup()
