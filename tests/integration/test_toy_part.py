"""A part of a route that is one file of tests goes through every command, which knows nothing of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.integration.test_pipeline import FIT
from tests.tiny import save_tiny, tiny_prompts
from tests.toy_part import Constant, MeanUpdateEntry
from viasd_calib import load_engine
from viasd_calib.cli import main
from viasd_calib.spec import file_sha256, load_spec

SHARES = ["--shares", json.dumps(FIT["data"]["shares"])]  # type: ignore[index]
MODEL = {
    "target_cost": 0.7,
    "bridges": False,
    "adapter_rank": 1,
    "keep_layers": [0, 3],
    "parts": {"mean_update": {"scale": 0.5}},
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job whose route has the part."""
    out = tmp_path_factory.mktemp("job")
    save_tiny(out / "verifier", eos=None)
    prompts = out / "prompts.jsonl"
    prompts.write_text("\n".join(prompt.model_dump_json() for prompt in tiny_prompts(40)) + "\n")
    (out / "fit.yaml").write_text(
        yaml.safe_dump({**FIT, "model": MODEL, "trainer": {**FIT["trainer"], "max_steps": 1}})
    )  # type: ignore[dict-item]
    verifier, spec, common = str(out / "verifier"), f"{out}/spec/routing.json", ["--prompts", str(prompts), *SHARES]
    commands = [
        ["capture", "--out", f"{out}/traces", "--verifier", verifier, *common, "--max_new_tokens", "12"],
        ["fit", "--config", str(out / "fit.yaml"), "--out", f"{out}/fit", "--model.verifier", verifier,
         "--data.folders", f"[{out}/traces]", "--trainer.default_root_dir", f"{out}/fit"],
        ["calibrate", "--fit", f"{out}/fit", "--out", f"{out}/calibrate", *common, "--max_loss", "0.9",
         "--max_new_tokens", "8"],
        ["export", "--calibrate", f"{out}/calibrate", "--out", spec, "--audit", "strict"],
        ["validate", spec],
        ["generate", "--spec", spec, "--prompt", "w1 w2", "--max_new_tokens", "8"],
        ["bench", "--spec", spec, *common, "--split", "test", "--limit", "2", "--max-new-tokens", "8",
         "--methods", "autoregressive,three_tier", "--json", f"{out}/bench.json"],
        ["report", "--spec", spec, "--bench", f"{out}/bench.json", "--out", f"{out}/report.html", *common,
         "--max_new_tokens", "8"],
    ]  # fmt: skip
    for command in commands:
        assert main([*command, "--debug"]) == 0, command
    return out


def test_its_entry_and_its_tensors_lie_in_the_spec(job: Path) -> None:
    route = load_spec(job / "spec/routing.json").route
    assert [*route.entries()] == ["adapter", "mean_update"]
    entry = route.entries()["mean_update"]
    assert isinstance(entry, MeanUpdateEntry)
    assert (entry.scale, entry.tensors.path) == (0.5, "mean_update/mean_update.safetensors")
    updates = load_file(job / "spec" / entry.tensors.path)
    assert all(
        torch.equal(tensor, load_file(job / "fit/mean_update.safetensors")[run]) for run, tensor in updates.items()
    )
    assert updates


def test_the_slim_verifier_runs_it(job: Path) -> None:
    engine = load_engine(job / "spec/routing.json")
    modules = [sublayer.layer for sublayer in engine.routed.slim_sublayers if sublayer.kind == "bridge"]
    updates = load_file(job / "spec/mean_update/mean_update.safetensors")
    assert [type(module) for module in modules] == [Constant] * len(updates)
    hidden = torch.zeros(1, 2, engine.routed.config.hidden_size)
    for module, update in zip(modules, updates.values(), strict=True):
        assert torch.equal(module(hidden)[0, 1], update)


def test_tables_and_drawing_have_it(job: Path) -> None:
    page = (job / "report.html").read_text()
    assert "mean updates in place of 1 runs" in page
    assert "mean update of the run below it" in page


def test_validate_finds_tensors_that_do_not_fit(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = job / "spec/routing.json"
    path = job / "spec/mean_update/mean_update.safetensors"
    before, document = path.read_bytes(), spec.read_text()
    save_file({"mlp_9": torch.zeros(2)}, path)
    assert main(["validate", str(spec)]) == 1
    assert "is not the tensor file the spec was written with" in capsys.readouterr().err
    found = json.loads(document)
    found["route"]["mean_update"]["tensors"]["sha256"] = file_sha256(path)
    spec.write_text(json.dumps(found))
    assert main(["validate", str(spec)]) == 1
    assert "is of other runs than the route skips; export the spec again" in capsys.readouterr().err
    found["route"]["mean_update"]["scale"] = 7
    spec.write_text(json.dumps(found))
    assert main(["validate", str(spec)]) == 1
    assert "route.mean_update.scale: Input should be less than or equal to 1" in capsys.readouterr().err
    path.write_bytes(before)
    spec.write_text(document)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"mean_update": {}},
            "bridges and mean_update both run in place of skipped sublayers; add --model.bridges fal",
        ),
        ({"nowhere": {}}, "'nowhere' is no part of a route that this release knows"),
        ({"mean_update": {"scale": 3}}, "options of the part mean_update: scale: Input should be less than or equal"),
        ({"bridges": {}}, "bridges is a part that viasd fit has options of its own for; leave it out of parts"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    job: Path, parts: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", "--config", str(job / "fit.yaml"), "--out", str(tmp_path), "--data.folders", f"[{job}/traces]"]
    assert (
        main(
            [*command, "--model.verifier", str(job / "verifier"), "--model.parts", json.dumps(parts), "--model.bridges"]
        )
        == 1
    )
    assert words in " ".join(capsys.readouterr().err.split())
