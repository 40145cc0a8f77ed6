"""What tests share: the command line in processes of its own, a real (tiny, random) CLIP and real shards."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fnmatch
import functools
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
from distill_data import STUDENT
from forks import clean_environment
from hypothesis import settings

# No test asserts a time: two run side by side, on machines of any speed.
settings.register_profile("clipcid", deadline=None)
settings.load_profile("clipcid")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test: where two run at once, neither waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_screens.py")


def pytest_sessionfinish() -> None:
    """End the processes that commands are forked from."""
    forks.close()


# Before torch loads: OpenMP's idle threads must not spin while another process of the test needs the core.
os.environ["GOMP_SPINCOUNT"] = "0"

TINY_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
WORDS = ("red", "green", "blue", "dark", "bright", "pale", "round", "square", "small", "large", "soft", "striped")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a finished command did; printed whole when an assertion on it fails."""

    command: tuple[str, ...]
    cwd: Path
    returncode: int | None  # None where it hung
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.stdout)

    @property
    def said(self) -> str:
        """All of stderr as one line."""
        return " ".join(self.stderr.split())

    def problems(self) -> list[str]:
        """Return how it breaks the rules of an exit: a known code, one error of two sentences, no traceback, no bug."""
        found = [] if self.returncode in (0, 1, 2) else [f"exit {self.returncode}"]
        for mark in ("Traceback", "bug in clipcid", "Interrupted"):
            found += [mark] if mark in self.stderr + self.stdout else []
        errors = [line for line in self.stderr.splitlines() if line.startswith("Error: ")]
        if len(errors) != (self.returncode in (1, 2)):
            found.append(f"{len(errors)} errors")
        return found

    def __repr__(self) -> str:
        return (
            f"\n$ cd {self.cwd}\n$ {' '.join(self.command)}\nexit {self.returncode}"
            f"\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"
        )


Clipcid = Callable[..., Run]
"""What the fixtures `clipcid`, `torchrun` and `binary` give: they take a command line and run it."""


def clipcid_command() -> list[str]:
    """Return the installed binary beside this interpreter."""
    return [str(Path(sys.executable).with_name("clipcid"))]


def torchrun_command(processes: int) -> list[str]:
    """Return torchrun, running the command line as a module; it listens on a port the system gives it."""
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--local-addr", "127.0.0.1"]
    return [*launcher, "--nproc-per-node", str(processes), "-m", "clipcid_cli"]


def run_command(
    command: list[str], cwd: Path, check: bool, timeout: float, environment: dict[str, str] | None, **streams: Any
) -> Run:
    """Run a command, its streams captured unless given; with `check`, a non-zero exit fails the test and shows all."""
    captured = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=_command_environment(command, environment),
        text=True,
        timeout=timeout,
        check=False,
        **(captured | streams),
    )
    return _finish(Run(tuple(command), cwd, done.returncode, done.stdout or "", done.stderr or ""), check)


def start_clipcid(
    *arguments: object,
    cwd: Path,
    env: dict[str, str] | None = None,
    processes: int = 1,
    hook: Callable[[], None] | None = None,
) -> forks.Started:
    """Start a command line in a process, or in several as torchrun would; see `forks`."""
    words = list(map(str, arguments))
    return forks.start(words, cwd, _command_environment(words, env), processes, hook=hook)


def run_clipcid(
    *arguments: object,
    cwd: Path,
    check: bool = True,
    code: int = 0,
    timeout: float = 300,
    env: dict[str, str] | None = None,
    processes: int = 1,
) -> Run:
    """Run a command line to its end, as `start_clipcid` starts it; with `check`, another exit code fails the test."""
    command = ("clipcid", *map(str, arguments)) if processes == 1 else (f"{processes} × clipcid", *map(str, arguments))
    started = start_clipcid(*arguments, cwd=cwd, env=env, processes=processes)
    try:
        ended = started.wait(timeout)
    except subprocess.TimeoutExpired:
        ended = None
    return _finish(Run(command, cwd, ended, *started.read()), check, code)


def kill_when(
    folder: Path, appears: str, absent: Iterable[str], *arguments: object, cwd: Path, processes: int = 1
) -> None:
    """Run a command line, kill it as soon as a file of such a name is anywhere in a folder, and prove it.

    Args:
        folder: It has no such file yet.
        appears: Pattern of the file's name, such as ``step_*.pt``.
        absent: Names of files that must not exist yet: the last that is computed, and the sidecar that marks the end.
        processes: The one that names the file is killed, the others are terminated.
    """
    assert not _holds(folder, appears), "it would be killed before it has begun"
    hook = functools.partial(forks.after_naming, appears, functools.partial(signal.raise_signal, signal.SIGKILL))
    process = start_clipcid(*arguments, cwd=cwd, processes=processes, hook=hook)
    assert process.wait() == -signal.SIGKILL, (f"ended before {appears} was seen", *process.read())
    assert _holds(folder, appears)
    assert [name for name in absent if _holds(folder, name)] == [], "killed too late"


def _holds(folder: Path, pattern: str) -> bool:
    """Whether a file of such a name is anywhere below a folder in which folders come and go."""
    return any(fnmatch.filter(names, pattern) for _, _, names in os.walk(folder))


@contextlib.contextmanager
def limited(what: int, most: int) -> Iterator[None]:
    """Limit what this process may use, one of the names of `resource`: beyond it the kernel refuses, as on a full disk."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def free_port() -> str:
    """Return a port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def process_context() -> ForkServerContext:
    """Return the context in which tests start processes of their own: they are forked from the server of workers."""
    from clipcid_cli.runtime.pipeline import start_worker_server

    start_worker_server()
    return multiprocessing.get_context("forkserver")


def run_in_two(function: Callable[..., Any], folder: Path, *arguments: object) -> list[Any]:
    """Call a function with each rank in two processes of one run (gloo), which meet in a folder; return what they do."""
    with ProcessPoolExecutor(2, process_context()) as pool:
        calls = [pool.submit(_call_as_rank, rank, folder / "store", function, *arguments) for rank in range(2)]
        return [call.result(timeout=180) for call in calls]


def _call_as_rank(rank: int, store: Path, function: Callable[..., Any], *arguments: object) -> Any:
    import torch.distributed as dist

    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        return function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def _command_environment(command: list[str], environment: dict[str, str] | None) -> dict[str, str]:
    """Return the environment of a command.

    Images are decoded without workers where the command does not say how many: starting the server they are forked from
    takes as long as the rest of most tests. The evaluations, which start none by default on a CPU, keep their default.
    """
    workers = {} if any(word.startswith("eval-") for word in command) else {"CLIPCID_WORKERS": "0"}
    return clean_environment() | workers | (environment or {})


def _finish(run: Run, check: bool, code: int = 0) -> Run:
    if check and run.returncode != code:
        pytest.fail(repr(run))
    return run


@pytest.fixture(scope="session", autouse=True)
def _no_folder_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What fixtures of several tests write to a relative path goes to a folder of the run; so does the user's cache."""
    with contextlib.chdir(tmp_path_factory.mktemp("run")), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPCID_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test or a default writes to a relative path goes to its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clipcid(tmp_path: Path) -> Clipcid:
    """Run a command line in the test's own folder: ``clipcid("balance", …, check=False)``."""
    return functools.partial(run_clipcid, cwd=tmp_path)


@pytest.fixture
def torchrun(tmp_path: Path) -> Clipcid:
    """Run a command line in several processes of one run (gloo): ``torchrun(2, "balance", …)``."""

    def call(processes: int, *arguments: object, cwd: Path = tmp_path, **options: Any) -> Run:
        return run_clipcid(*arguments, cwd=cwd, processes=processes, **options)

    return call


@pytest.fixture
def binary(tmp_path: Path) -> Clipcid:
    """Run the installed binary, as a user does: where what happens while Python starts and ends is tested, too."""

    def call(*arguments: object, check: bool = True, env: dict[str, str] | None = None, **streams: Any) -> Run:
        return run_command([*clipcid_command(), *map(str, arguments)], tmp_path, check, 300, env, **streams)

    return call


def write_tiny_model(folder: Path, config: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """Write an open_clip folder with random weights."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    config = config or TINY_CONFIG
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    size = config["vision_cfg"]["image_size"]
    preprocess = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "size": size,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(dict(model.state_dict()), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a real open_clip model with random weights: 32 px, 32 wide, context 12."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a model's configuration with some settings changed, `vision_cfg__width` for one inside."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        part, _, inner = name.rpartition("__")
        (config[part] if part else config)[inner] = value
    return config


def make_image(seed: int, side: int = 48, kind: str = "PNG") -> bytes:
    """Draw an image of a few coloured rectangles; the same seed gives the same bytes."""
    from PIL import Image, ImageDraw

    random = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(int(value) for value in random.integers(0, 256, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        left, top = (int(value) for value in random.integers(0, side - 8, 2))
        width, height = (int(value) for value in random.integers(6, side // 2, 2))
        draw.rectangle(
            (left, top, left + width, top + height), tuple(int(value) for value in random.integers(0, 256, 3))
        )
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def embed_with_open_clip(model_folder: Path, images: list[bytes], texts: list[str]) -> tuple[Any, Any]:
    """Embed images and texts with open_clip alone; unit rows, float32 tensors."""
    import open_clip
    import torch
    from PIL import Image

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{model_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_folder}")
    model.eval()
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
        return model.encode_image(pixels, normalize=True), model.encode_text(tokenizer(texts), normalize=True)


def make_caption(seed: int) -> str:
    """Write a caption of a few words; the same seed gives the same text."""
    random = np.random.default_rng(seed)
    return "a " + " ".join(WORDS[index] for index in random.choice(len(WORDS), 3, replace=False)) + f" drawing {seed}"


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar of the given members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def shard_members(first: int, count: int, *, captions: bool = True, classes: int = 0) -> list[tuple[str, bytes]]:
    """Make the members of a shard: image, caption, attributes and, where there are classes, the class of `count` samples."""
    members: list[tuple[str, bytes]] = []
    for number in range(first, first + count):
        members.append((f"{number:06d}.png", make_image(number)))
        if captions:
            members.append((f"{number:06d}.txt", make_caption(number).encode()))
        members.append((f"{number:06d}.json", json.dumps({"number": number}).encode()))
        if classes:
            members.append((f"{number:06d}.cls", str(number % classes).encode()))
    return members


def write_benchmark(folder: Path, split: str, *shards: Iterable[tuple[str, bytes]], **texts: str) -> Path:
    """Write the shards of a split as CLIP_benchmark lays them out, and text files beside the split."""
    for number, members in enumerate(shards):
        write_tar(folder / split / f"{number}.tar", members)
    (folder / split / "nshards.txt").write_text(str(len(shards)))
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def write_class_folders(
    folder: Path, classes: Mapping[str, Iterable[int]], draw: Callable[[int], bytes] = make_image
) -> Path:
    """Write a folder of images for each class; each image is called as the number it is drawn from."""
    for name, numbers in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            (folder / name / f"{number}.png").write_bytes(draw(number))
    return folder


def write_inputs(folder: Path) -> None:
    """Write what every step can begin with: a model, a student, two shards of pairs, and images of three classes."""
    write_tiny_model(folder / "model")
    write_tar(folder / "data/00000.tar", shard_members(0, 10))
    write_tar(folder / "data/00001.tar", shard_members(10, 8))
    write_classified(folder / "classified")
    (folder / "student.json").write_text(json.dumps(STUDENT))


def write_classified(folder: Path) -> None:
    """Write a tar of 12 images of three classes, and the classes' names."""
    write_tar(folder / "0.tar", shard_members(0, 12, captions=False, classes=3))
    (folder / "classnames.txt").write_text("one\ntwo\nthree\n")


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two shards, 14 and 10 samples, images 3 and 20 the same picture; treat it as read-only."""
    folder = tmp_path_factory.mktemp("shards")
    first, second = shard_members(0, 14), shard_members(14, 10)
    second = [(name, make_image(3) if name == "000020.png" else data) for name, data in second]
    write_tar(folder / "00000.tar", first)
    write_tar(folder / "00001.tar", second)
    return folder


@pytest.fixture(scope="session")
def distill_prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_shards: Path) -> Path:
    """A folder with a tiny teacher's embeddings and clusters, and ``student.json``; treat it as read-only."""
    folder = tmp_path_factory.mktemp("prepared")
    for arguments in (
        ("embed", tiny_shards, "--model", tiny_model, "--workers", 0),
        ("cluster", "--num-clusters", 4, "--iterations", 3),
    ):
        run_clipcid(*arguments, cwd=folder)
    (folder / "student.json").write_text(json.dumps(STUDENT))
    return folder


@pytest.fixture
def distill_place(distill_prepared: Path, tmp_path: Path) -> Path:
    """The test's own copy of the prepared folder."""
    shutil.copytree(distill_prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path
