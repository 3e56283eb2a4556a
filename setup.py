"""Reads the run-time dependencies from conda.yaml, the only place that lists them."""

from pathlib import Path

import yaml
from setuptools import setup

environment = yaml.safe_load(Path(__file__).with_name("conda.yaml").read_text())
setup(install_requires=next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict)))
