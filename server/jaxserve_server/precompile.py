"""`python -m jaxserve.compile`: fills the compilation cache ahead, for an image or for the next start, and exits.

Takes the flags of `jaxserve.serve`, so that the same command line gives the same programs; those of the server itself
change nothing. What is kept is for this machine's processor or accelerator, this version and these sizes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxserve.errors import ConfigError, JaxserveError
from jaxserve_server.flags import Options, parse_options

PROG = "python -m jaxserve.compile"
ABOUT = "Compile a model's programs into the cache, so that jaxserve.serve with the same flags starts fast."


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles and prints what was done. Returns the exit code: 1 if the model cannot be served with these flags.

    Exits with 2 upon a usage error.
    """
    begin = time.perf_counter()
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv, prog=PROG, about=ABOUT)
        folder = options.engine.compilation_cache_dir
        if folder is None:
            raise ConfigError(
                "--compilation-cache-dir none keeps no programs: there is nothing to fill. Name a folder."
            )
        seconds, num_loaded = fill(options)
    except JaxserveError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    print(table(seconds))
    num_files, num_bytes = folder_size(Path(folder).expanduser())
    print(
        f"\n{len(seconds)} programs, {len(seconds) - num_loaded} compiled and {num_loaded} there already, "
        f"in {time.perf_counter() - begin:.1f} s; {folder} holds {num_files} files, {num_bytes / 1e6:.1f} MB"
    )
    return 0


def fill(options: Options) -> tuple[Mapping[str, float], int]:
    """Starts an engine as the server would, which compiles, keeps and tries every program; returns each one's seconds
    and how many were there already.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: it cannot be served as asked.
    """
    from jaxserve.engine.engine import EngineCore  # jax: 1 s that a usage error need not wait for
    from jaxserve_checkpoints.load import load_for_engine

    model = load_for_engine(options.model, options.engine, dtype=options.dtype, revision=options.revision)
    core = EngineCore(model.config, model.params, options.engine, on_progress=show)
    compiled = core.runner.compiled
    return compiled.compile_s, compiled.num_loaded


def show(num_done: int, num_all: int, name: str, seconds: float) -> None:
    """A line on stderr for each program as it is done."""
    sys.stderr.write(f"{num_done}/{num_all} {name} {seconds:.2f} s\n")  # at once: several threads write


def table(seconds: Mapping[str, float]) -> str:
    """Programs and seconds as aligned columns, the slowest first."""
    width = max(map(len, seconds))
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return "\n".join(f"{name:<{width}} {taken:8.2f} s" for name, taken in ordered)


def folder_size(folder: Path) -> tuple[int, int]:
    """Files below a folder, and their bytes."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)
