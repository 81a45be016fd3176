"""The house: imports point down only, torch-free modules stay so, and importing us breaks nobody."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ENGINE = Path(__file__).resolve().parents[2] / "engine" / "kvrelay"
LAYERS: tuple[tuple[str, ...], ...] = (  # lowest first; a module may import its own row and those above it
    ("version", "errors", "wakeup"),
    ("sparse",),
    ("sampling_params",),
    ("types",),
    ("field_checks",),
    ("worker_settings",),
    ("config",),
    ("server_config",),
    ("wire", "codec", "energy", "cache", "models"),
    ("metrics",),
    ("cache.memory",),
    ("cache.store", "transport", "attention", "sampler"),
    ("scheduler",),
    ("decode_steps", "native_steps"),
    ("runner",),
    ("worker", "router"),
    ("outputs", "launch", "request_checks"),
    ("engine",),
    ("llm",),
    ("server", "experiments", "settings"),
    ("engine_options",),
    ("serve_command",),
    ("cli",),
    ("__init__", "__main__"),
)
TORCH_FREE = [
    *("types", "sampling_params", "errors", "sparse", "config", "version", "wakeup", "wire", "codec"),
    *("metrics", "energy", "cache.pool"),
    *(
        "cache.arrivals",
        "cache.tickets",
        "cache.prefix",
        "cache.tiers",
        "cache.file_tier",
        "scheduler",
        "router",
        "transport",
        "models.spec",
        "models.hub",
    ),
    *("models.tokenizer", "outputs", "launch", "engine", "llm", "settings", "server.run", "cli", "__init__"),
]


def modules() -> dict[str, Path]:
    """Every module by its dotted name below `kvrelay`."""
    found = {}
    for path in ENGINE.rglob("*.py"):
        parts = list(path.relative_to(ENGINE).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        found[".".join(parts)] = path
    return found


def layer(module: str) -> int:
    """The row of the longest prefix of the module's name that has one."""
    rows = {name: index for index, names in enumerate(LAYERS) for name in names}
    parts = module.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next(rows[prefix] for prefix in prefixes if prefix in rows)


def imports(path: Path) -> set[str]:
    """Modules of ours imported anywhere in the file, but for those under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kvrelay":
            found |= {f"{node.module}.{alias.name}".removeprefix("kvrelay.") for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("kvrelay.") for a in node.names if a.name.startswith("kvrelay.")}
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str) -> None:
    for imported in imports(modules()[module]):
        if "." not in imported and imported not in modules():
            continue  # a name of the package itself, such as __version__
        if module == "launch" and imported.startswith(("worker", "transport")):
            continue  # lazily, to run workers as threads
        assert layer(imported) <= layer(module), f"{module} imports {imported}, which is above it"


def test_only_the_server_imports_the_http_stack() -> None:
    for module, path in modules().items():
        if not module.startswith("server"):
            assert not {"fastapi", "starlette", "uvicorn"} & top_level_imports(path), module


def top_level_imports(path: Path) -> set[str]:
    """First components of everything a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    of = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in plain | of}


def test_worker_and_router_never_import_each_other() -> None:
    for module, path in modules().items():
        if module.startswith("router"):
            assert not [name for name in imports(path) if name.startswith("worker")]
        if module.startswith("worker"):
            assert not [name for name in imports(path) if name.startswith("router")]


def test_the_kernel_library_does_not_know_the_engine() -> None:
    for path in (ENGINE.parents[1] / "kernels").rglob("*.py"):
        assert not imports(path), f"{path.name} imports the engine"


@pytest.mark.parametrize("heavy", ["torch", "transformers", "gguf", "matplotlib", "pynvml"])
def test_the_routers_process_imports_nothing_heavy(heavy: str) -> None:
    names = ["kvrelay" if name == "__init__" else f"kvrelay.{name}" for name in TORCH_FREE]
    load = f"import importlib, sys; [importlib.import_module(name) for name in {names!r}]"
    code = f"{load}; print({heavy!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_transformers_imports_beside_us_and_beside_a_package_named_kernels(tmp_path: Path) -> None:
    """`kernels/` is a namespace folder on our path; Hugging Face's own package of that name must win."""
    root = ENGINE.parents[1]
    paths = [str(root), str(ENGINE.parent), str(root / "kernels"), str(tmp_path)]
    code = (
        f"import sys; sys.path[:0] = {paths!r}\n"
        "import kvrelay, kvrelay_kernels, transformers\n"
        "from transformers import LlamaConfig, AutoTokenizer\n"
        "import kernels; print(getattr(kernels, 'marker', None))"
    )
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("marker = 'theirs'\n__version__ = '0.0.1'\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "theirs"


def test_plain_tables_name_things_that_exist() -> None:
    from importlib import import_module

    from kvrelay.energy import METERS
    from kvrelay.router.policies import POLICIES
    from kvrelay.transport import TRANSPORTS

    for table in (METERS, POLICIES, TRANSPORTS):
        for target in table.values():
            module, _, attribute = target.partition(":")
            assert hasattr(import_module(module), attribute), target
