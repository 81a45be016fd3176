"""Only what pyproject.toml cannot say: nothing yet; the kernels' optional C++ extension comes here."""

from setuptools import setup

setup()
