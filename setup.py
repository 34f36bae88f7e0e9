"""Package metadata from settings.ini; the job notebooks travel inside the wheel"""
from configparser import ConfigParser
from pathlib import Path
from shutil import copy
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read("settings.ini", encoding="utf-8")
s = ini["DEFAULT"]
extras = {k: s[f"{k}_requirements"].split() for k in ("jobs", "exchange", "sentiment", "rl", "cluster", "docs", "dev", "check")}


class WithJobs(build_py):
    def run(self):
        super().run()
        if self.editable_mode: return                                   # a checkout runs the notebooks in nbs/jobs
        to = Path(self.build_lib, s["lib_path"], "notebooks")
        to.mkdir(parents=True, exist_ok=True)
        for nb in Path("nbs/jobs").glob("*.ipynb"): copy(nb, to)


setup(
    name=s["lib_name"], version=s["version"], description=s["description"], author=s["author"], url=s["git_url"], license="Apache-2.0",
    long_description=Path("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    python_requires=">=" + s["min_python"], packages=find_packages(include=["cryptoml*"]),
    package_data={s["lib_path"]: ["py.typed", "assets/*"]}, cmdclass={"build_py": WithJobs},
    install_requires=s["requirements"].split(), extras_require=extras,
    entry_points={"nbdev": [f"{s['lib_path']}={s['lib_path']}._modidx:d"], "console_scripts": ["cryptoml=cryptoml.jobs:main"]},
)
