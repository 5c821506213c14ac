"""The oldest PyTorch and hosts that e2kd promises: python -m benchmarks.versions [NAME ...]

Each is installed from the package registry into a folder of its own, in front of what is installed here, and has to
pass the tests that are named with it. The newest are what all other tests run with.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT


@dataclass(frozen=True)
class Oldest:
    """Packages, and words for pytest.

    Attributes:
        alone: whether packages are installed without their dependencies.
    """

    packages: tuple[str, ...]
    tests: tuple[str, ...]
    alone: bool = True


# What transformers 4 needs and 5 does not, at versions that fit.
NEEDED = (
    *("huggingface-hub==0.36.2", "tokenizers==0.21.4", "datasets==3.6.0"),
    *("requests==2.34.2", "urllib3==2.8.0", "idna==3.20", "certifi", "charset-normalizer"),
)
OLDEST = {
    "PyTorch": Oldest(
        ("torch==2.6.0", "torchvision==0.21.0"),
        (
            *("tests/test_losses.py", "tests/test_explainers.py", "tests/test_unusual_networks.py"),
            *("tests/test_bcos_training.py", "-k", "not compiled"),
        ),
        alone=False,
    ),
    "timm's tasks": Oldest(
        ("timm==1.0.27",), ("tests/test_trainers.py", "-k", "task or launcher or averages or (resumed_run and timm)")
    ),
    "Accelerate and the Trainer": Oldest(
        ("accelerate==1.4.0", "transformers==4.53.3", *NEEDED),
        (
            *("tests/test_hosts.py", "tests/test_trainers.py", "-k"),
            "(accelerate or transformers-fp32 or callback or lessons_of or trainer_bit or odd_length) and not timm",
        ),
    ),
}


class NoRegistry(RuntimeError):
    """Packages could not be installed."""


def install(oldest: Oldest, folder: Path) -> None:
    """Bring packages into a folder. Raises NoRegistry if that can't be done."""
    words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    words += ["--no-deps"] * oldest.alone
    done = subprocess.run(
        [sys.executable, *words, "--target", str(folder), *oldest.packages],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    if done.returncode != 0:
        raise NoRegistry(f"pip could not install {', '.join(oldest.packages)}: {done.stderr.strip()[-500:]}")


def passes(oldest: Oldest, folder: Path) -> tuple[bool, str]:
    """Whether the tests pass with what was installed in a folder, and what pytest said."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *oldest.tests]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(OLDEST)}; all if none is given")
    failed = []
    for name in parser.parse_args().names or OLDEST:
        with tempfile.TemporaryDirectory() as folder:
            install(OLDEST[name], Path(folder))
            good, said = passes(OLDEST[name], Path(folder))
        print(f"{name}, {OLDEST[name].packages[0]}: {said.strip().splitlines()[-1]}", flush=True)
        failed += [] if good else [f"{name}:\n{said}"]
    raise SystemExit("\n".join(failed) or 0)


if __name__ == "__main__":
    main()
