"""The example scripts do what they say, from the command line, on small inputs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from tests.support.forks import run_script, starter
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

BESIDE = Path(sys.executable).parent


def run(script: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """An example in a process of its own."""
    first = "tests.support.example_runs:validate_less" if script in ("train_lm.py", "demo.py") else ""
    return run_script(ROOT / "examples" / script, *args, first=first)


def run_on_two(script: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """An example in two processes."""
    return run_script(ROOT / "examples" / script, *args, world=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real text that a change of this project does not change: a part of Python's standard library."""
    path = tmp_path_factory.mktemp("corpus") / "sources.txt"
    library = Path(sysconfig.get_path("stdlib"))
    folders = [library / name for name in ("http", "json", "logging")]
    path.write_text("".join(p.read_text() for folder in folders for p in sorted(folder.rglob("*.py"))))
    return path


@pytest.fixture(scope="module")
def transformers_once() -> None:
    """Have what all examples with a trainer import, which takes seconds, imported for all of them."""
    starter().share("accelerate")
    starter().share("transformers.trainer")


@pytest.mark.usefixtures("transformers_once")
@pytest.mark.parametrize("script", ["hf_trainer.py", "accelerate_loop.py", "lightning_module.py", "trl_sft.py"])
def test_every_trainer_trains_a_small_llama(script: str) -> None:
    assert_learnt(run(script, "--steps", "12"))


@pytest.mark.usefixtures("transformers_once")
def test_accelerate_trains_a_small_llama_sharded_over_two_processes() -> None:
    done = run_on_two("accelerate_fsdp2.py", "--steps", "12")
    assert_learnt(done)
    assert "in this process of 2" in done.stdout


def assert_learnt(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    line = re.search(r"loss (\S+) -> (\S+) nats per byte in 12 steps", done.stdout)
    assert line is not None
    before, after = map(float, line.groups())
    assert after < before - 0.5


def test_compose_your_own_prints_a_plan_and_trains() -> None:
    done = run("compose_your_own.py")
    assert done.returncode == 0, done.stderr
    assert "scale_by_rms" in done.stdout
    assert "of state" in done.stdout


@pytest.mark.parametrize("recipe", ["lomo", "adafactor", "sgd", "lion"])
def test_every_recipe_trains_the_language_model(recipe: str, corpus: Path, tmp_path: Path) -> None:
    """AdaLomo and AdamW are trained by the demo."""
    out = tmp_path / "out.json"
    done = run("train_lm.py", "--recipe", recipe, "--steps", "4", "--corpus", corpus, "--json", out)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(out.read_text())
    assert numbers["recipe"] == recipe
    assert numbers["validation_loss_after"] < numbers["validation_loss_before"]


def test_a_stopped_run_continues_as_if_it_had_not_stopped(corpus: Path, tmp_path: Path) -> None:
    whole, second, half = tmp_path / "whole.json", tmp_path / "second.json", tmp_path / "half.pt"
    common = ["--steps", "4", "--corpus", corpus]
    for extra in (["--json", whole], ["--stop-at", "2", "--save", half], ["--resume", half, "--json", second]):
        done = run("train_lm.py", *common, *extra)
        assert done.returncode == 0, done.stderr
    losses = [json.loads(path.read_text())["losses"] for path in (whole, second)]
    assert losses[1][-2:] == losses[0][-2:]


def test_a_run_in_bf16_continues_as_if_it_had_not_stopped(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processors without instructions for bf16 take minutes for what the scripts do; two sequences are enough."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from corpus import read_corpus
    from lm import Run, Settings

    settings, text = Settings(dtype="bfloat16", steps=4, batch=2), read_corpus(corpus, 128)
    whole, resumed = Run(text, settings), Run(text, settings)
    for step in range(4):
        if step == 2:
            whole.save(tmp_path / "half.pt")
        whole.advance()
    resumed.load(tmp_path / "half.pt")
    resumed.advance()
    resumed.advance()
    assert resumed.losses == whole.losses
    assert {p.dtype for p in resumed.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recipe", "adalom"], "did you mean 'adalomo'"),
        (["--corpus", "/no/such/file"], "/no/such/file"),
        (["--dtype", "int8"], "int8"),
        (["--lr", "-1"], "lr=-1"),
        (["--steps", "0"], "above zero"),
        (["--resume", "/no/such/file.pt"], "/no/such/file.pt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args: list[str], message: str) -> None:
    done = run("train_lm.py", "--steps", "2", *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_demo_compares_and_resumes(corpus: Path, tmp_path: Path) -> None:
    done = run("demo.py", "--steps", "4", "--out", tmp_path, "--corpus", corpus)
    assert done.returncode == 0, done.stderr
    assert "differ from those of the uninterrupted run by at most 0\n" in done.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "summary.json").read_text())
    adamw, adalomo = (next(r for r in summary["runs"] if r["recipe"] == n) for n in ("adamw", "adalomo"))
    assert adalomo["state_bytes"] * 100 < adamw["state_bytes"]
    assert adalomo["gradients_bytes"] * 2 < adamw["gradients_bytes"]


def test_fsdp2_trains_on_two_processes_and_saves_what_one_reads(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "opt.safetensors"
    done = run_on_two("fsdp2.py", "--steps", "6", "--corpus", corpus, "--save", out)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in done.stdout.splitlines() if "loss" in line]
    assert losses[-1] < losses[0]
    inspected = subprocess.run([BESIDE / "optstate", "inspect", str(out)], capture_output=True, text=True)
    assert inspected.returncode == 0, inspected.stderr
    assert "Factored()" in inspected.stdout
