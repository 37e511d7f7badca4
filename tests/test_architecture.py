"""The rules of the house that no linter knows: sizes, names, forbidden constructs, lazy imports.

The import layers themselves are contracts in pyproject.toml, run by `lint-imports`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGES = {
    "jaxserve": REPO / "jaxserve",
    "pallas_kernels": REPO / "pallas_kernels",
    "jaxserve_server": REPO / "server" / "jaxserve_server",
    "jaxserve_checkpoints": REPO / "checkpoints" / "jaxserve_checkpoints",
}
HOST = ("cache", "scheduler", "text", "metrics.py", "results.py")
DEVICE = ("parallel", "layers", "models", "ops", "state.py", "steps.py")
GROUND = ("config.py", "types.py", "checks.py", "errors.py")

MAX_FILE_LINES = {"pallas_kernels": 500}
DEFAULT_MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70

CODE_LOADERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
HEAVY_FRAMEWORKS = {"torch", "torchvision", "transformers", "tensorflow"}


def source_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in ([folder] if folder.is_file() else folder.rglob("*.py")))


SHIPPED = source_files(*PACKAGES.values())
ALL_PYTHON = source_files(
    *(REPO / top for top in ("jaxserve", "pallas_kernels", "server", "checkpoints", "benchmarks"))
)
ALL_PYTHON += source_files(REPO / "tests", REPO / "scripts")


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def imports_of(path: Path) -> frozenset[str]:
    """The absolute dotted modules that a file names in import statements, wherever they stand."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return frozenset(found)


def top_imports(path: Path) -> set[str]:
    return {module.partition(".")[0] for module in imports_of(path)}


def calls_in(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name as written, node) of every call."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def tracked_files() -> list[Path]:
    """What is or may be committed: tracked files, and untracked ones that git does not ignore."""
    command = ["git", "-C", str(REPO), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files are tracked is unknown")
    return [REPO / name for name in listing.split("\0") if name and (REPO / name).is_file()]


def in_subprocess(code: str) -> str:
    paths = os.pathsep.join(str(REPO / part) for part in (".", "server", "checkpoints"))
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_under(*names: str) -> list[str]:
    files = source_files(*(REPO / "jaxserve" / name for name in names))
    return [".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__") for path in files]


# --- imports ---------------------------------------------------------------------------------------------


def test_the_host_layer_leaves_jax_unimported():
    modules = modules_under(*HOST, *GROUND)
    assert len(modules) > 10
    loaded = json.loads(
        in_subprocess(f"import importlib, json, sys; [importlib.import_module(m) for m in {modules}]; "
                      "print(json.dumps(sorted(sys.modules)))")
    )  # fmt: skip
    assert set(modules) <= set(loaded)
    assert not {"jax", "jaxlib", "flax", "orbax"} & set(loaded)


def test_public_names_are_lazy_and_complete():
    found = json.loads(
        in_subprocess(
            "import json, sys, jaxserve\n"
            "heavy = lambda: sorted({m.split('.')[0] for m in sys.modules} & {'jax', 'numpy'})\n"
            "at_import = heavy()\n"
            "from jaxserve import SamplingParams, EngineConfig, JaxserveError\n"
            "of_types = heavy()\n"
            "missing = [name for name in jaxserve.__all__ if getattr(jaxserve, name) is None]\n"
            "unlisted = sorted(set(jaxserve.__all__) - set(dir(jaxserve)))\n"
            "print(json.dumps([at_import, of_types, missing, unlisted, jaxserve.LLM.__module__]))\n"
        )
    )
    at_import, of_types, missing, unlisted, home = found
    assert at_import == [], "importing jaxserve is not free"
    assert "jax" not in of_types
    assert missing == unlisted == []
    assert home == "jaxserve.llm"


def test_an_unknown_public_name_is_an_attribute_error():
    import jaxserve

    with pytest.raises(AttributeError, match=r"no attribute 'LLMM'.*LLM"):
        _ = jaxserve.LLMM


def test_the_ground_layer_needs_numpy_at_most():
    allowed = set(sys.stdlib_module_names) | {"numpy", "jaxserve"}
    for path in source_files(*(REPO / "jaxserve" / name for name in GROUND)):
        assert top_imports(path) <= allowed, name_of(path)


def test_device_code_has_no_clock_io_or_logging():
    banned = {"time", "logging", "os", "io", "pathlib", "random", "socket", "threading", "asyncio", "queue", "warnings"}
    for path in source_files(*(REPO / "jaxserve" / name for name in DEVICE)):
        assert not top_imports(path) & banned, name_of(path)
        assert "print" not in {name for name, _ in calls_in(path)}, name_of(path)


def test_kernels_import_jax_only():
    allowed = set(sys.stdlib_module_names) | {"jax", "jaxtyping", "numpy", "pallas_kernels"}  # jax brings numpy
    for path in source_files(PACKAGES["pallas_kernels"]):
        assert top_imports(path) <= allowed, name_of(path)


def test_nothing_that_runs_code_from_files_and_no_torch():
    banned = CODE_LOADERS | HEAVY_FRAMEWORKS
    for path in SHIPPED + source_files(REPO / "benchmarks"):
        assert not top_imports(path) & banned, name_of(path)
    assert not any(framework in (REPO / "pyproject.toml").read_text() for framework in HEAVY_FRAMEWORKS)


# --- sizes and names -------------------------------------------------------------------------------------


def test_files_are_short():
    for package, folder in PACKAGES.items():
        bound = MAX_FILE_LINES.get(package, DEFAULT_MAX_FILE_LINES)
        lengths = {name_of(path): len(path.read_text().splitlines()) for path in source_files(folder)}
        assert not {name: lines for name, lines in lengths.items() if lines > bound}


def test_functions_are_short():
    too_long = {}
    for path in SHIPPED:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    too_long[f"{name_of(path)}:{node.name}"] = lines
    assert not too_long


def test_no_file_is_named_after_nothing():
    vague = re.compile(r"^_?(utils?|helpers?|misc|common_utils)$")
    named = [
        path for path in tracked_files() if any(vague.match(Path(part).stem) for part in path.relative_to(REPO).parts)
    ]
    assert not named


def test_every_module_says_what_it_owns():
    silent = [name_of(p) for p in SHIPPED if p.read_text().strip() and ast.get_docstring(tree_of(p)) is None]
    assert not silent


# --- constructs ------------------------------------------------------------------------------------------


def test_no_dynamic_code_and_no_allow_pickle():
    for path in SHIPPED:
        for name, call in calls_in(path):
            assert name not in {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"}, name_of(
                path
            )
            pickled = [k for k in call.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"]
            assert not pickled, name_of(path)


def test_templates_only_in_the_sandbox():
    """jinja2.Environment and Template run what they are given; ImmutableSandboxedEnvironment does not."""
    for path in SHIPPED:
        called = {name.rpartition(".")[2] for name, _ in calls_in(path)}
        assert not called & {"Environment", "Template", "NativeEnvironment", "SandboxedEnvironment"}, name_of(path)


def test_authentication_never_reads_the_url_that_the_client_wrote():
    """CVE-2026-48710: starlette's request.url took its path from Host. `scope["path"]` is what is routed."""
    for path in source_files(PACKAGES["jaxserve_server"]):
        urls = [
            node.lineno
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Attribute) and node.attr in {"url", "base_url"}
            and isinstance(node.value, ast.Name) and node.value.id in {"request", "connection", "conn"}
        ]  # fmt: skip
        assert not urls, f"{name_of(path)}: {urls}"


def test_nobody_edits_sys_path():
    for path in ALL_PYTHON:
        edits = [name for name, _ in calls_in(path) if re.fullmatch(r"sys\.path\.(insert|append|extend)", name)]
        assert not edits, name_of(path)


def test_nobody_polls():
    """Waiting is for an event: a condition, a future, a queue, a socket."""
    for path in SHIPPED:
        assert "time.sleep" not in {name for name, _ in calls_in(path)}, name_of(path)


def test_no_exception_is_swallowed():
    for path in SHIPPED:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{name_of(path)}:{node.lineno}: bare except"
                broad = {"Exception", "BaseException"} & {ast.unparse(part) for part in ast.walk(node.type)}
                silent = all(
                    isinstance(line, ast.Pass | ast.Continue | ast.Expr) and _does_nothing(line) for line in node.body
                )
                assert not (broad and silent), f"{name_of(path)}:{node.lineno}: swallows every exception"


def _does_nothing(line: ast.stmt) -> bool:
    return isinstance(line, ast.Pass | ast.Continue) or (
        isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
    )


def test_no_module_level_mutable_state():
    """Module-level containers are constants (ALL_CAPS, `_` before it or not) or `__all__`; nothing is `global`."""
    makers = {
        "list",
        "dict",
        "set",
        "bytearray",
        "deque",
        "defaultdict",
        "OrderedDict",
        "Counter",
        "WeakValueDictionary",
    }
    literals = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
    for path in SHIPPED:
        assert not [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.Global)], name_of(path)
        for node in tree_of(path).body:
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                continue
            value = node.value
            made = isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] in makers
            if made or isinstance(value, literals):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [ast.unparse(target) for target in targets]
                assert all(re.fullmatch(r"_?[A-Z][A-Z0-9_]*|__all__", n) for n in names), f"{name_of(path)}: {names}"


def test_nothing_happens_at_import():
    """No call stands alone at module level: no logging set-up, no jax.config, no registration."""
    for path in SHIPPED:
        for node in tree_of(path).body:
            acts = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            assert not acts, f"{name_of(path)}:{node.lineno}: {ast.unparse(node)[:60]}"
            assert not isinstance(node, ast.For | ast.While | ast.With), f"{name_of(path)}:{node.lineno}"


# --- text ------------------------------------------------------------------------------------------------


def test_no_machine_paths_in_the_repository():
    """A path of somebody's home or workplace works on one machine only."""
    homes = re.compile(
        r"/(?:home|Users)/(?!(?:me|you|user)/)[\w.-]+/|(?<![\w.])/(?:root|work|workspace)/[\w.]", re.ASCII
    )
    text_suffixes = {".py", ".md", ".toml", ".txt", ".json", ".yaml", ".yml", ".sh", ".cfg", ""}
    for path in tracked_files():
        if path.suffix not in text_suffixes or path == Path(__file__) or path.stat().st_size > 1_000_000:
            continue
        found = homes.search(path.read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{name_of(path)}: {found[0]}"


def test_the_readme_fits_on_two_screens():
    assert len((REPO / "README.md").read_text().splitlines()) <= 200
