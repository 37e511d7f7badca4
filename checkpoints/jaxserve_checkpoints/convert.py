"""`python -m jaxserve_checkpoints.convert HF_DIR OUT`: a Hugging Face folder to a converted checkpoint.

A converted checkpoint is a folder with `params/` (Orbax, in the layout that is served), the model's JSON
and tokenizer files, and `manifest.json` with the SHA-256 of every file. It appears at once or not at all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from jaxserve.errors import CheckpointError, JaxserveError
from jaxserve_checkpoints import manifest, orbax
from jaxserve_checkpoints.load import LoadedModel, load_model
from jaxserve_checkpoints.source import MANIFEST_FILE

# What serving reads besides weights, and the terms under which the weights are.
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
COPIED_PATTERNS = ("LICENSE*", "NOTICE*")


def convert(source: str | Path, out: Path, *, dtype: str = "auto", force: bool = False) -> LoadedModel:
    """Writes the model `source` to the folder `out`.

    Args:
        dtype: of the weights as they will be served; "auto" is the source's.
        force: replace `out` if it is a converted checkpoint.

    Returns:
        The model as it was read from `source`.

    Raises:
        CheckpointError: `out` is in the way, or `source` cannot be read.
    """
    _check_free(out, force)
    model = load_model(source, dtype=dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".incomplete", dir=out.parent))
    try:
        orbax.save(staging, model.params)
        for path in _copied_files(model.folder):
            shutil.copyfile(path, staging / path.name)
        manifest.write(staging, model.config.dtype, orbax.shapes(model.params))
        staging.chmod(0o755)  # mkdtemp's 0700 would keep the server's user out
        _put_in_place(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return model


def _check_free(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not (out / MANIFEST_FILE).is_file():
        raise CheckpointError(
            f"{out} exists and is not a converted checkpoint, so it is never replaced. Choose another."
        )
    if not force:
        raise CheckpointError(f"{out} exists. Choose another folder, or replace it with --force.")


def _copied_files(folder: Path) -> list[Path]:
    named = [folder / name for name in COPIED]
    matched = [path for pattern in COPIED_PATTERNS for path in sorted(folder.glob(pattern))]
    return [path for path in (*named, *matched) if path.is_file()]


def _put_in_place(staging: Path, out: Path) -> None:
    """Renames `staging` to `out`; a folder that was there is out of sight before it is deleted."""
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".replaced", dir=out.parent))
        os.replace(out, old / out.name)
        os.replace(staging, out)
        shutil.rmtree(old)
    else:
        os.replace(staging, out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxserve_checkpoints.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="HF_DIR", help="a Hugging Face folder or name")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a converted checkpoint")
    options = parser.parse_args(arguments)
    try:
        model = convert(options.source, options.out, dtype=options.dtype, force=options.force)
    except JaxserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.out}: {model.config.architecture}, {model.config.dtype}, {model.num_bytes / 1e6:.1f} MB, "
        f"read at {model.gb_per_s:.2f} GB/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
