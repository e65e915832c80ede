"""Helpers of the tests of the mooncake program."""

import os
import pathlib
import subprocess

PROJECT = pathlib.Path(__file__).resolve().parent.parent.parent
BUILD = pathlib.Path(os.environ.get("BUILD", PROJECT / ".build")).resolve()
PROGRAM = BUILD / "release" / "mooncake"
LIBRARY = BUILD / "release" / "libmooncake.so"
LIMIT_SECONDS = 60


def clean_environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MC_")}
    return dict(kept, MOONCAKE_LIBRARY=str(LIBRARY), **more)


def run(*command, **variables):
    return subprocess.run(
        [word if isinstance(word, bytes) else str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env=clean_environment(**variables),
    )


def mooncake(*words, **variables):
    return run(PROGRAM, *words, **variables)
