"""The main job through the command line, on a tiny verifier: what a user types, and what it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.tiny import save_tiny, tiny_prompts
from viasd_calib.cli import main
from viasd_calib.evaluation.bench import load_bench
from viasd_calib.models import weights_sha256
from viasd_calib.slim import cost as measuring
from viasd_calib.slim.backends import fastest_dtype
from viasd_calib.spec import OffloadRef, load_spec, save_spec

FIT = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 6,
        "max_epochs": -1,
        "limit_val_batches": 2,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    },
    "model": {
        "target_cost": 0.8,
        "route_steps": 3,
        "adapter_rank": 2,
        "max_run": 4,
        "head_vocab": 18,
        "mlp_keep": 0.6,
        "keep_layers": [3],
    },
    "data": {"shares": {"fit": 0.4, "calibrate": 0.4, "test": 0.2}, "validation_share": 0.3, "max_batch_tokens": 256},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny verifier, a prompt file and configurations."""
    folder = tmp_path_factory.mktemp("job")
    save_tiny(folder / "verifier", eos=None)
    lines = [prompt.model_dump_json() for prompt in tiny_prompts(60, turns=2)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "fit.yaml").write_text(yaml.safe_dump(FIT))
    return folder


@pytest.fixture(scope="module")
def job(place: Path) -> Path:
    """The folder of a finished ``viasd run``, made command by command with its own shares of the splits."""
    shares = ["--shares", json.dumps(FIT["data"]["shares"])]  # type: ignore[index]
    common = ["--prompts", str(place / "prompts.jsonl"), *shares]
    verifier = str(place / "verifier")
    out = place / "out"
    commands = [
        ["capture", "--out", f"{out}/traces", "--verifier", verifier, *common, "--max_new_tokens", "24"],
        ["fit", "--config", str(place / "fit.yaml"), "--out", f"{out}/fit", "--model.verifier", verifier,
         "--data.folders", f"[{out}/traces]", "--trainer.default_root_dir", f"{out}/fit"],
        ["calibrate", "--fit", f"{out}/fit", "--out", f"{out}/calibrate", *common, "--max_loss", "0.9",
         "--max_new_tokens", "12"],
        ["export", "--calibrate", f"{out}/calibrate", "--out", f"{out}/spec/routing.json", "--audit", "off"],
        ["bench", "--spec", f"{out}/spec/routing.json", *common, "--split", "test", "--max-new-tokens", "16",
         "--methods", "autoregressive,speculative,three_tier", "--audit", "strict", "--json", f"{out}/bench.json"],
        ["report", "--spec", f"{out}/spec/routing.json", "--bench", f"{out}/bench.json", "--calibrate",
         f"{out}/calibrate", "--out", f"{out}/report.html", *common, "--max_new_tokens", "12"],
    ]  # fmt: skip
    for command in commands:
        assert main([*command, "--debug"]) == 0, command
    return out


def test_the_spec_is_valid(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(job / "spec/routing.json")]) == 0
    assert "valid" in capsys.readouterr().out
    spec = load_spec(job / "spec/routing.json")
    assert spec.route.adapter is not None
    assert spec.route.head_vocab is not None
    assert spec.route.head_vocab.size == 18
    assert spec.route.head_vocab.tensors.path == "head_vocab/head_vocab.safetensors"
    assert spec.route.mlp_keep is not None
    assert set(spec.route.mlp_keep.keep.values()) == {19}
    assert spec.route.narrowed.isdisjoint([3, *spec.route.mlp_skip])
    assert spec.route.mlp_keep.tensors.path == "mlp_keep/mlp_keep.safetensors"
    assert set(spec.route.relative_cost.measured) == {1, 4, 8}  # type: ignore[union-attr]


def test_a_wide_bound_is_certified(job: Path) -> None:
    """With a bound of 0.9 and two dozen prompts the most careful candidate must pass."""
    spec = load_spec(job / "spec/routing.json")
    assert spec.certificate is not None
    assert spec.certificate.bound == 0.9
    assert spec.decoding.audit == "off"
    hashes = set(spec.certificate.split_sha256.values())
    assert len(hashes) == 3


def test_bench_json_keeps_the_contract(job: Path) -> None:
    result: dict[str, Any] = json.loads((job / "bench.json").read_text())
    assert set(result) == {
        "provenance", "hardware", "settings", "n_prompts", "methods", "offload", "by_task", "by_context",
    }  # fmt: skip
    assert result["offload"] is None
    wanted = {
        "tokens", "seconds", "tokens_per_second", "speedup_vs_autoregressive", "speedup_vs_speculative",
        "identical_to_autoregressive", "divergence", "rejection_rate", "full_passes_per_token",
        "slim_passes_per_token", "draft_steps_per_token", "acceptance_length", "tier_shares", "differences",
        "decode_tokens_per_second", "decode_speedup_vs_autoregressive", "decode_speedup_vs_speculative",
        "fastest_baseline", "speedup_vs_fastest_baseline",
    }  # fmt: skip
    assert sum(band["n_prompts"] for band in result["by_context"].values()) == result["n_prompts"]
    for methods in (result["methods"], *(task["methods"] for task in result["by_task"].values())):
        assert set(methods) == {"autoregressive", "speculative", "three_tier"}
        for row in methods.values():
            assert set(row) == wanted
            assert row["identical_to_autoregressive"] == 1.0  # fp32, audit strict
            assert row["divergence"] == 0.0
    assert (
        sum(row["methods"]["three_tier"]["tokens"] for row in result["by_task"].values())
        == (result["methods"]["three_tier"]["tokens"])
    )


def test_the_report_is_one_file(job: Path) -> None:
    page = (job / "report.html").read_text()
    for picture in ("route", "speed-against-loss", "gates", "tiers", "round", "break-even", "predicted"):
        assert f'<section id="{picture}">' in page
    assert page.count("<figure") >= 5
    assert "w1" in page or "w2" in page  # the text coloured by tier
    assert 'src="http' not in page


def test_a_spec_names_the_weights_that_it_was_certified_on(
    place: Path, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_spec(job / "spec/routing.json").verifier.weights == weights_sha256(str(place / "verifier")) is not None
    other = save_tiny(tmp_path / "other", seed=5)
    command = [
        "export",
        "--calibrate",
        f"{job}/calibrate",
        "--out",
        str(tmp_path / "spec.json"),
        "--verifier",
        str(other),
    ]
    assert main(command) == 1
    assert f"was calibrated on {place / 'verifier'}, and {other} has other weights" in capsys.readouterr().err
    assert not (tmp_path / "spec.json").exists()


def test_a_certificate_is_not_exported_beside_another_policy(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--calibrate", f"{job}/calibrate", "--out", str(tmp_path / "spec.json"), "--audit", "off"]
    assert main([*command, "--dtype", "bfloat16"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "is of another policy, these differ: verifier" in said
    assert "the number format (bfloat16, certified float32)" in said
    assert not (tmp_path / "spec.json").exists()
    assert main(["validate", str(job / "spec/routing.json")]) == 0, "as it was calibrated it holds"
    assert "loss <= 0.9" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", ["autoregressive", "speculative", "three_tier"])
def test_generate_answers(job: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--spec", str(job / "spec/routing.json"), "--prompt", "w1 w2", "--max_new_tokens", "8"]
    assert main([*command, "--method", method, "--audit", "strict", "--show_tiers", "true", "--debug"]) == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 8
    assert "8 tokens" in told.err


def test_a_small_bound_is_not_certified(place: Path, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two dozen prompts cannot certify 2 %: it says so, and the spec is exported with audit strict."""
    common = ["--prompts", str(place / "prompts.jsonl"), "--shares", json.dumps(FIT["data"]["shares"])]  # type: ignore[index]
    folder = place / "careful"
    command = ["calibrate", "--fit", str(job / "fit"), "--out", str(folder), *common, "--max-loss", "0.02"]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "to certify a loss of 0.02 with confidence 0.95 takes 220 calibrate prompts at least" in told.err
    assert "--allow-uncertified true" in told.err
    assert not list(folder.glob("*")), "nothing was decoded"
    assert main([*command, "--allow-uncertified", "true"]) == 0
    assert "nothing certified" in " ".join(capsys.readouterr().out.split())
    assert main(["export", "--calibrate", str(folder), "--out", str(folder / "routing.json")]) == 0
    spec = load_spec(folder / "routing.json")
    assert spec.decoding.audit == "strict"
    assert spec.certificate is not None
    assert spec.certificate.bound is None
    lossy = ["export", "--calibrate", str(folder), "--out", str(folder / "lossy.json"), "--audit", "off"]
    capsys.readouterr()
    assert main(lossy) == 1
    assert "nothing is certified, so no spec can be exported with audit off; leave out" in capsys.readouterr().err
    assert not (folder / "lossy.json").exists()


def test_the_whole_job_loads_its_verifier_once_in_each_number_format_and_measures_its_cost_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = {"load": 0, "cost": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*args, **options)

        return call

    from_pretrained = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted("load", from_pretrained))
    monkeypatch.setattr(measuring, "relative_cost", counted("cost", measuring.relative_cost))
    out = place / "whole"
    options = {"max_new_tokens": 12}
    command = ["run", "--out", str(out), "--fit_config", str(place / "whole.yaml"), "--verifier",
               str(place / "verifier"), "--prompts", str(place / "prompts.jsonl"), "--sample_prompt", "w1 w2",
               "--capture_step", json.dumps(options), "--bench_step", json.dumps({"limit": 2, **options}),
               "--calibrate_step", json.dumps({"limit": 5, "max_loss": 0.6, **options})]  # fmt: skip
    (place / "whole.yaml").write_text(yaml.safe_dump({**FIT, "data": {"max_batch_tokens": 256}}))
    assert main([*command, "--debug"]) == 0
    fastest = fastest_dtype(torch.device("cpu"))  # in which traces are captured, the rest is float32
    assert calls == {"load": len({fastest, "float32"}), "cost": 1}
    spec = load_spec(out / "spec/routing.json")
    assert spec.evidence is not None
    assert spec.route.relative_cost is not None
    assert (out / "report.html").is_file()
    told = " ".join(capsys.readouterr().out.split())
    assert "Three-tier decoding ran at" in told
    assert "Its text is the full verifier's own (audit strict)." in told or "of tokens at most" in told

    shutil.rmtree(out / "calibrate")  # traces and fit are kept
    assert main([*command, "--dtype", "bfloat16", "--debug"]) == 0
    assert load_spec(out / "spec/routing.json").verifier.dtype == "bfloat16"

    read = out / "spec/offload.json"
    save_spec(load_spec(out / "spec/routing.json").model_copy(update={"offload": OffloadRef(kind="disk")}), read)
    capsys.readouterr()
    second = json.dumps({"spec": str(read), "limit": 2, "max_new_tokens": 6})
    assert main([*command, "--dtype", "bfloat16", "--offload_step", second, "--debug"]) == 0
    kept, streamed = capsys.readouterr().out.splitlines()[-2:]
    assert kept.startswith("all in memory: autoregressive ")
    assert streamed.startswith("layers read from disk: autoregressive ")
    assert load_bench(out / "bench_offload.json").offload is not None


def test_print_config_shows_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["capture", "--out", "x", "--limit", "3", "--print_config"])
    assert stopped.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["limit"] == 3


def test_config_file_is_read(place: Path, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = place / "generate.yaml"
    config.write_text(yaml.safe_dump({"spec": str(job / "spec/routing.json"), "prompt": "w3", "max_new_tokens": 4}))
    assert main(["generate", "--config", str(config)]) == 0
    assert capsys.readouterr().out.strip()
