"""Maps the folder kernels/ to the package ltfast.kernels; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ltfast", "ltfast.*"]), "ltfast.kernels"],
    package_dir={"ltfast": "ltfast", "ltfast.kernels": "kernels"},
    package_data={"ltfast": ["py.typed", "baselines.json"]},
)
