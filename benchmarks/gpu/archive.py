"""The output folder as a few files, for a machine that is fresh each time and gives back few: packed, and unpacked."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

RESULTS, KERNELS = "results.tar.gz", "kernels.tar.gz"
KERNEL_FOLDERS = ("triton_cache", "inductor_cache")
SHOWN = ("summary.md", "report.html")
LARGEST = 15 * 2**20
"""Bytes of an archive: those machines give back files of 16 MiB at most."""


def pack(work: Path, output: Path) -> list[str]:
    """Writes the archives of a working folder and copies what is looked at first; gives what was too large, in words.

    Args:
        work: with results, logs, state and the compiled kernels' caches.
        output: gets four files at most.
    """
    output.mkdir(parents=True, exist_ok=True)
    kernels = [work / name for name in KERNEL_FOLDERS if (work / name).exists()]
    others = [path for path in sorted(work.iterdir()) if path.name not in KERNEL_FOLDERS]
    complaints = []
    for name, paths in ((RESULTS, others), (KERNELS, kernels)):
        if not paths:
            continue
        unfinished = output / f"{name}.unfinished"
        with tarfile.open(unfinished, "w:gz") as archive:
            for path in paths:
                archive.add(path, arcname=path.name)
        if unfinished.stat().st_size > LARGEST:
            complaints.append(f"{name} is {unfinished.stat().st_size / 2**20:.0f} MiB and was left out")
            unfinished.unlink()
        else:
            unfinished.replace(output / name)
    for name in SHOWN:
        found = next((path for path in (work / name, work / "results" / name) if path.exists()), None)
        if found is not None:
            shutil.copyfile(found, output / name)
    return complaints


def unpack(source: Path, work: Path) -> list[str]:
    """Puts what an earlier call has packed into a working folder that has no state yet; gives the archives' names.

    Raises:
        ValueError: the source has none of them.
    """
    found = [source / name for name in (RESULTS, KERNELS) if (source / name).exists()]
    if not found:
        raise ValueError(f"--from must be a folder with {RESULTS} or {KERNELS} in it; got {source}")
    if (work / "state.json").exists():
        return []
    work.mkdir(parents=True, exist_ok=True)
    for path in found:
        with tarfile.open(path) as archive:
            archive.extractall(work, filter="data")
    return [path.name for path in found]
