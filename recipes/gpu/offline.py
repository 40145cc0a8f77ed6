"""Packages for a machine with PyTorch and without a network: fetch them here, unpack them there.

    python recipes/gpu/offline.py fetch WHEELS            the wheels of packages.txt, each alone
    python recipes/gpu/offline.py install WHEELS VENV     an environment of them, this Python's packages and the checkout

`install` needs no pip: a wheel is an archive of what lies in site-packages. Two of clipcid's packages are not fetched, since
they are large and `run.sh` does without: faiss (PyTorch finds what is nearest) and DuckDB (for keys in another order, and
repeats among more than a million).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = Path(__file__).with_name("packages.txt")
PYTHONS = ("3.11", "3.12", "3.13")
LINUX = ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
NOT_NEEDED = ("faiss-cpu", "faiss-gpu", "duckdb")
# Of tests and figures, beside clipcid's own.
FURTHER = ("hypothesis", "pytest", "scikit-learn")
PROGRAMS = {"clipcid": "clipcid_cli.cli", "torchrun": "torch.distributed.run"}


def main() -> None:
    """Fetch or install."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("fetch", "install"))
    parser.add_argument("wheels", type=Path)
    parser.add_argument("venv", type=Path, nargs="?")
    arguments = parser.parse_args()
    if arguments.what == "fetch":
        fetch(arguments.wheels)
    else:
        install(arguments.wheels, arguments.venv)


def fetch(wheels: Path) -> None:
    """Download the wheels of all Pythons, and print their size and that of the checkout's files."""
    system = [f"--platform={name}_{platform.machine()}" for name in LINUX]
    for version in PYTHONS:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *system]
        subprocess.run(
            [*command, f"--python-version={version}", f"--dest={wheels}", f"--requirement={PACKAGES}"], check=True
        )
    files = sorted(wheels.glob("*.whl"))
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    tracked = [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name]
    sizes = [sum(path.stat().st_size for path in group) / 2**20 for group in (files, tracked)]
    print(f"{len(files)} wheels in {wheels}: {sizes[0]:.1f} MiB; the checkout's files: {sizes[1]:.1f} MiB.")


def install(wheels: Path, place: Path) -> None:
    """Make the environment; name what neither the wheels nor this Python has."""
    venv.EnvBuilder(system_site_packages=True, with_pip=False).create(place)
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(place)}))
    compiled = f"-cp{sys.version_info.major}{sys.version_info.minor}-"
    for wheel in wheels.glob("*.whl"):
        if any(tag in wheel.name for tag in ("-none-any", "-abi3-", compiled)):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(own)
    # Where this Python is of an environment itself, the new one would have the system's packages, not that one's PyTorch.
    inherited = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "checkout.pth").write_text("\n".join([str(ROOT), *sorted(inherited)]) + "\n")
    for name, module in PROGRAMS.items():
        program = place / "bin" / name
        # Worker processes import it, as they do every main program.
        program.write_text(
            f'#!{place}/bin/python\nfrom {module} import main\n\nif __name__ == "__main__":\n    main()\n'
        )
        program.chmod(0o755)
    if missing := find_missing([str(own), *sys.path]):
        raise SystemExit(
            f"{sys.executable} and the wheels in {wheels} lack {', '.join(missing)}.\n"
            f"Where there is a network: bash recipes/gpu/run.sh --prepare (it fetches what {PACKAGES.name} here lists)."
        )


def find_missing(paths: list[str]) -> list[str]:
    """List the packages that are not at these paths, or too old."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    missing = []
    for requirement in (*project["dependencies"], *FURTHER):
        name = re.split(r"[^\w.-]", requirement)[0]
        least = re.search(r">=([\d.]+)", requirement)
        found = next(iter(importlib.metadata.distributions(name=name, path=paths)), None)
        if name not in NOT_NEEDED and (found is None or (least and parse(found.version) < parse(least[1]))):
            missing.append(requirement if found is None else f"{requirement} (there is {found.version})")
    return missing


def parse(version: str) -> list[int]:
    """Return the numbers of a version."""
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


if __name__ == "__main__":
    main()
