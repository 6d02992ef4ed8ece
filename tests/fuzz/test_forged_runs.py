"""Whole runs in which somebody changed a file and made the manifest right again, gone on with."""

import hashlib
import json
import random
import shutil
import warnings

import pytest

from lit_align.errors import LitAlignError
from tests.fuzz.mutations import other_json, other_lines
from tests.pipelines.allo_settings import tiny_allo
from tests.pipelines.alps_settings import tiny_alps
from tests.pipelines.ila_settings import tiny_ila

RUNS = {"allo": tiny_allo, "alps": tiny_alps, "ila": tiny_ila}
FORGERIES = 24


def forge(run, source: random.Random) -> str:
    """Change one JSON file of a stage, and its size and checksum in the manifest."""
    manifest = json.loads((run / "manifest.json").read_text())
    places = [
        (run / stage["name"] / file["path"], file)
        for stage in manifest["stages"]
        for file in stage["files"]
        if file["path"].endswith((".json", ".jsonl")) and "/" not in file["path"]
    ]
    path, record = source.choice([(p, r) for p, r in places if p.stat().st_size])
    mutation = other_lines if path.suffix == ".jsonl" else other_json
    data = mutation(path.read_bytes(), source)
    path.write_bytes(data)
    record["size_bytes"], record["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (run / "manifest.json").write_text(json.dumps(manifest))
    return f"{path.parent.name}/{path.name}"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("_unrendered")
@pytest.mark.parametrize("name", RUNS)
def test_forged_runs_end_with_our_errors_or_go_on(name, tiny_llama_dir, tmp_path):
    warnings.simplefilter("ignore")
    RUNS[name](tiny_llama_dir, tmp_path / "whole")
    refused = 0
    for seed in range(FORGERIES):
        run = shutil.copytree(tmp_path / "whole", tmp_path / f"forged-{seed}")
        place = forge(run, random.Random(f"{name}-{seed}"))
        try:
            RUNS[name](tiny_llama_dir, run)
        except LitAlignError:
            refused += 1
        except Exception as error:
            error.add_note(f"{name}, seed {seed}: {place}")
            raise
        shutil.rmtree(run)
    assert refused > FORGERIES // 6
