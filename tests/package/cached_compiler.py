"""``python cached_compiler.py c++ ...``: the compiler, whose object files are kept between builds (build_cache.py).

Every test of this folder builds in a folder of its own, mostly from the same sources with the same options.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import build_cache  # noqa: E402


def main(command: list[str]) -> int:
    if "-c" not in command or "-o" not in command:
        return subprocess.run(command).returncode
    at = command.index("-o")
    output = Path(command[at + 1])
    arguments = command[:at] + command[at + 2 :]
    # -P: without the names of the files, which lie in another folder every time. The list of headers is written here.
    preprocessed = subprocess.run([*arguments, "-E", "-P", "-MT", str(output)], stdout=subprocess.PIPE, text=True)
    if preprocessed.returncode:
        return preprocessed.returncode
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    names = ("-I", "-MF", "/")  # of folders and files, which the preprocessor has read
    options = [word for word in arguments if not word.startswith(names)]

    def compile_to(path: Path) -> None:
        without_dependencies = [word for word in arguments if word != "-MMD"]
        at = without_dependencies.index("-MF")
        del without_dependencies[at : at + 2]
        subprocess.run([*without_dependencies, "-o", str(path)], check=True)

    try:
        made = build_cache.made(build_cache.key([version, *options, preprocessed.stdout]), "object.o", compile_to)
    except subprocess.CalledProcessError as error:
        return error.returncode
    shutil.copyfile(made, output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
