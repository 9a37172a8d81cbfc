"""``python cached_compiler.py c++ ...``: the compiler, whose object files are kept between builds (build_cache.py).

Every test of this folder builds in a folder of its own, mostly from the same sources with the same options.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import build_cache


def main(command: list[str]) -> None:
    if "-c" not in command:
        subprocess.run(command, check=True)
        return
    output, dependencies = (command[command.index(flag) + 1] for flag in ("-o", "-MF"))
    plain = [word for word in command if word not in ("-o", output, "-MMD", "-MF", dependencies)]
    # Folders differ from build to build: -P leaves the files' names out, and options with paths are not in the hash.
    preprocess = [*plain, "-E", "-P", "-MMD", "-MF", dependencies, "-MT", output]
    text = subprocess.run(preprocess, stdout=subprocess.PIPE, text=True, check=True).stdout
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    key = build_cache.key([version, text, *(word for word in plain if not word.startswith(("-I", "/")))])
    made = build_cache.made(key, "object.o", lambda path: subprocess.run([*plain, "-o", str(path)], check=True))
    shutil.copyfile(made, output)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
