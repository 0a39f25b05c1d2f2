"""What pyproject.toml cannot say: the packages are found, and the folder of configs goes with them."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lfjax", "lfjax.*"]), "lfjax.configs"],
    package_dir={"lfjax.configs": "configs"},
)
