import gc
import os
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests make no network call
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small only lose by a second thread, and pytest-xdist has the other cores."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """A pipeline collects garbage before every stage: let it skip what pytest and imports hold."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Whole programs first (they are right in tests/): their files take longest."""
    items.sort(key=lambda item: len(item.path.parts))
    if not torch.cuda.is_available():
        for item in items:
            if item.path.parent.name == "gpu":
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU here"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What damaged files make libraries log is no UTF-8, and pytest-xdist could not send it."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


def pytest_sessionfinish():
    gc.unfreeze()  # or what imports hold is reported as leaked


@pytest.fixture
def _unrendered(monkeypatch):
    """Pictures are painted, but matplotlib does not make files of them: half a small run's time."""

    def savefig(figure, file, **_):
        file.write(b'<svg xmlns="http://www.w3.org/2000/svg"/>')

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory) -> Path:
    """A tiny random Llama with tied embeddings, and its tokenizer, as a Hugging Face folder."""
    from tests.tiny_models import save_tiny_model  # imports transformers: seconds

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared data and models; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED


@pytest.fixture
def disk(tmp_path):
    """`disk("600k")`: a disk of that size, in a folder that is the same at every call."""
    if os.name == "nt" or os.geteuid() != 0:
        pytest.skip("a small disk can only be mounted by root")
    folder = tmp_path / "disk"
    folder.mkdir()

    def resized(options: str) -> Path:
        remount = ["-o", f"remount,{options}"] if folder.is_mount() else ["-o", options]
        mounted = subprocess.run(["mount", "-t", "tmpfs", *remount, "tmpfs", str(folder)])
        if mounted.returncode:
            pytest.skip("no disk can be mounted here")
        return folder

    yield resized
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)
