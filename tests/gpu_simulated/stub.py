"""The library that makes a CPU build of PyTorch believe in a CUDA device: compiled once, loaded before PyTorch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path


def load() -> None:
    """Load the library; PyTorch must not have been imported."""
    ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)


def build() -> Path:
    """Compile device.cpp for the installed PyTorch, unless it has been."""
    source = Path(__file__).with_name("device.cpp")
    found = importlib.util.find_spec("torch")
    assert found is not None
    root = Path(str(found.origin)).parent
    made_for = f"{root} {importlib.metadata.version('torch')}".encode()
    name = hashlib.blake2b(source.read_bytes() + made_for, digest_size=8).hexdigest()
    library = Path(tempfile.gettempdir()) / f"simulated-cuda-{name}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        links = [f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
        command = ["g++", "-std=c++20", "-fPIC", "-shared", f"-I{root}/include", str(source), *links, "-o", str(part)]
        subprocess.run(command, check=True)
        part.replace(library)
    return library
