"""`optstate estimate`: exit codes, one line for what is wrong, columns for programs, JSON, what would fit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from optstate_cli import app
from typer.testing import CliRunner

import optstate
from optstate.recipes import AdamW8bit
from tests.support.models import loss_of, mlp

pytestmark = pytest.mark.slow

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def run(*arguments: Any, code: int = 0) -> str:
    """Standard output of the command, or the one line on stderr where it ends with 2 or 3."""
    result = CliRunner().invoke(app, ["estimate", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    if code < 2:
        assert result.stderr == ""
        return result.stdout
    assert result.stdout == ""
    assert result.stderr.startswith("optstate: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def as_json(*arguments: Any, code: int = 0) -> dict[str, Any]:
    tree = json.loads(run(*arguments, "--json", code=code))
    assert isinstance(tree, dict)
    return tree


def figures(text: str) -> dict[tuple[str, str], list[str]]:
    """The table for programs: recipe and what -> value, GiB and basis."""
    lines = [line.split("\t") for line in text.splitlines()]
    start = lines.index(["RECIPE", "WHAT", "VALUE", "GIB", "BASIS"])
    return {(recipe, what): rest for recipe, what, *rest in (line for line in lines[start + 1 :] if len(line) == 5)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    safetensors.torch.save_file({"a.weight": torch.zeros(100, 50), "a.bias": torch.zeros(100)}, path)
    return path


class TestAnswers:
    def test_columns(self, tiny: Path) -> None:
        text = run(tiny, "--compare", "lomo,adamw", "-s", 32, "--gpu", "24GiB", "--explain")
        facts = [line.split("\t", 1) for line in text.split("\n\n")[0].splitlines()]
        assert [name for name, _ in facts[:4]] == ["model", "from", "run", "gpu"]
        assert "transformers" in dict(facts)["version"]
        assert sum(name == "not included" for name, _ in facts) == 6
        found = figures(text)
        assert found["adamw", "weights_bytes"][2] == "exact"
        parts = [int(row[0]) for (recipe, what), row in found.items() if recipe == "adamw" and "at_peak." in what]
        assert sum(parts) == int(found["adamw", "peak_bytes"][0])
        assert found["lomo", "state_bytes"] == ["0", "0.000000", "exact"]
        assert found["lomo", "fused_backward"][0] == "true"
        assert found["adamw", "peak_phase"] == [found["adamw", "peak_phase"][0], "-", "traced"]
        assert found["adamw", "verdict"] == ["fits", "-", "assumed"]
        assert {row[2] for row in found.values()} <= {"exact", "traced", "assumed", "-"}
        alive = text.split("\n\n")[-1].splitlines()
        assert alive[0] == "RECIPE\tBYTES\tKIND\tSHAPE\tDTYPE\tTENSOR"
        assert f"adamw\t{512 * 64 * 2}\tweights\t512x64\tbfloat16\tlm_head.weight" in alive

    def test_columns_are_the_same_without_a_trace(self, tiny: Path, weights: Path) -> None:
        traced, untraced = figures(run(tiny, "-s", 16)), figures(run(weights))
        names = [what for _, what in traced if "at_peak." not in what]
        assert [what for _, what in untraced] == names
        assert untraced["adalomo", "peak_bytes"] == ["-", "-", "-"]
        assert untraced["adalomo", "state_bytes"] == [str(4 * (100 + 50 + 100)), "0.000001", "exact"]
        assert untraced["adalomo", "verdict"] == ["-", "-", "-"]

    def test_a_person_gets_a_table(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("optstate_cli.estimate.sys.stdout.isatty", lambda: True, raising=False)
        from optstate_cli.estimate import _print

        found = optstate.estimate(tiny, recipe="adamw", seq_len=16, gpu="200MB")
        lines: list[str] = []
        monkeypatch.setattr("optstate_cli.estimate.typer.echo", lambda text="", **_: lines.append(text))
        _print(found, None, (), False)
        assert lines[0] == str(found)
        assert lines[1].startswith("would fit: nothing that was tried")

    def test_json(self, tiny: Path) -> None:
        tree = as_json(tiny, "--recipe", "adamw", "--recipe", "lomo", "-s", 16, "-b", 2, "--dtype", "fp32")
        assert tree["schema"] == "optstate.estimate/1"
        assert [one["recipe"] for one in tree["recipes"]] == ["adamw", "lomo"]
        assert tree["recipes"][0]["weights_bytes"] == 4 * tree["parameters"]
        assert tree["recipes"][0]["state_bytes"] == 8 * tree["parameters"]
        assert tree["setting"]["batch_size"] == 2
        assert tree["recipes"][0]["verdict"] is None
        assert "alive" not in tree["recipes"][0]
        assert as_json(tiny, "-s", 16, "--explain")["recipes"][0]["alive"][0]["bytes"] > 0

    def test_options_reach_the_estimate(self, tiny: Path) -> None:
        options = ["--weights", "split16", "--grad-accum", 2, "--checkpointing", "--attn", "eager", "--clip", "norm"]
        tree = as_json(tiny, "--recipe", "adalomo", "-s", 16, *options, "--no-fused-backward", "--exact")
        setting = tree["setting"]
        assert (setting["weights"], setting["grad_accum"], setting["checkpointing"]) == ("Split(bits=16)", 2, True)
        assert (setting["attention"], setting["clip"]) == ("eager", "norm")
        (one,) = tree["recipes"]
        assert not one["fused_backward"]
        assert one["state_bytes"] > 2 * tree["parameters"]
        assert one["gradients_bytes"] == 2 * tree["parameters"]

    def test_devices(self, weights: Path) -> None:
        tree = as_json(weights, "--recipe", "adamw", "--world-size", 2, "--shard", "zero1")
        assert tree["recipes"][0]["state_bytes"] == 8 * (100 * 50 + 100) // 2
        assert tree["setting"]["world_size"] == 2

    def test_a_model_of_ones_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = (
            "import torch\nfrom torch import nn\n"
            "class Mean(nn.Linear):\n    def forward(self, x): return super().forward(x).square().mean()\n"
            "def make(): return Mean(64, 64)\n"
            "def batch(batch_size, seq_len): return torch.zeros(batch_size, seq_len, 64)\n"
            "def fails(): raise OSError('no disk\\nat all')\n"
        )
        (tmp_path / "a_model_of_ones_own.py").write_text(source)
        monkeypatch.chdir(tmp_path)
        name = "a_model_of_ones_own"
        tree = as_json(f"{name}:make", "--input", f"{name}:batch", "--recipe", "adamw", "-b", 3, "-s", 10)
        assert tree["parameters"] == 64 * 65
        assert tree["recipes"][0]["peak_bytes"] > tree["recipes"][0]["known_bytes"]
        assert as_json(f"{name}:make")["recipes"][0]["peak_bytes"] is None
        assert "no disk" in run(f"{name}:fails", code=3)

    def test_resuming_needs_what_the_checkpoint_holds(self, tmp_path: Path) -> None:
        model = mlp(width=600)
        optimizer = AdamW8bit(model.named_parameters())
        loss_of(model, 0).backward()
        optimizer.step()
        optstate.save(optimizer, tmp_path / "opt.safetensors")
        tree = as_json(tmp_path / "opt.safetensors")
        (one,) = tree["recipes"]
        assert (one["recipe"], one["state_bytes"]) == ("adamw8bit", optimizer.state_nbytes())
        assert as_json(tmp_path / "opt.safetensors", "--recipe", "lomo")["recipes"][0]["state_bytes"] == 0

    def test_a_file_that_names_no_recipe(self, tmp_path: Path) -> None:
        model = mlp(width=600)
        optimizer = AdamW8bit(model.named_parameters())
        loss_of(model, 0).backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
        assumed = "the file names no recipe of optstate: adalomo is assumed, so give its own with --recipe"
        tree = as_json(tmp_path / "opt.pt")
        assert tree["recipes"][0]["recipe"] == "adalomo"
        assert assumed in tree["notes"]
        tree = as_json(tmp_path / "opt.pt", "--recipe", "adamw8bit")
        assert tree["recipes"][0]["state_bytes"] == optimizer.state_nbytes()
        assert assumed not in tree["notes"]

    def test_a_picture(self, weights: Path, tmp_path: Path) -> None:
        run(weights, "--plot", tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        assert "nowhere" in run(weights, "--plot", tmp_path / "nowhere" / "a.png", code=2)
        assert "--plot" in run(weights, "--plot", tmp_path / "a.nothing", code=2)


class TestFitting:
    def test_it_does_not_fit_and_what_would(self, tmp_path: Path) -> None:
        """Of two layers, so that one can be computed anew while the other's activations are gone."""
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 2}))
        asked = (tmp_path, "--recipe", "adamw", "-s", 512, "-b", 512)
        least, most = as_json(*asked)["recipes"][0]["device_bytes"]
        checkpointed = as_json(*asked, "--checkpointing")["recipes"][0]["device_bytes"][1]
        assert checkpointed < least - 1
        assert as_json(*asked, "--gpu", f"{most / 1e6:.6f}MB")["recipes"][0]["verdict"] == "fits"
        assert as_json(*asked, "--gpu", f"{least / 1e6:.6f}MB", code=1)["recipes"][0]["verdict"] == "tight"
        text = run(*asked, "--gpu", f"{(least - 1) / 1e6:.6f}MB", code=1)
        assert figures(text)["adamw", "verdict"][0] == "no"
        facts = [line.split("\t", 1) for line in text.split("\n\n")[0].splitlines()]
        would = [value for name, value in facts if name == "would fit"]
        assert would[0] == "adamw with activation checkpointing: --recipe adamw --checkpointing"
        assert would[1].startswith("adamw with a batch of ")

    def test_unknown_is_not_said_to_fit(self, weights: Path) -> None:
        params = 100 * 50 + 100
        memory = (
            300_000_000 + 4 * params + 4 * 100 * 50 + 3000
        )  # the context, weights, one gradient and AdaLomo's state
        both = as_json(weights, "--compare", "adalomo,adamw", "--gpu", f"{memory / 1e6:.6f}MB", code=1)
        assert [one["verdict"] for one in both["recipes"]] == ["unknown", "no"]
        alone = as_json(weights, "--recipe", "adamw", "--gpu", f"{memory / 1e6:.6f}MB", code=1)
        assert alone["would_fit"] == both["would_fit"] == []
        told = run(weights, "--gpu", "24GiB", code=1)
        assert "would fit\tunknown, as long as activations are: the trace says why" in told.splitlines()

    def test_one_of_several_is_enough(self, tiny: Path) -> None:
        asked = (tiny, "--compare", "lomo,adamw", "-s", 512, "-b", 512)
        lomo, adamw = (one["device_bytes"] for one in as_json(*asked)["recipes"])
        assert lomo[1] < adamw[1]
        both = as_json(*asked, "--gpu", f"{(adamw[1] - 1) / 1e6:.6f}MB")
        assert [one["verdict"] for one in both["recipes"]] == ["fits", "tight"]

    def test_solving(self, tiny: Path) -> None:
        asked = (tiny, "--recipe", "adalomo", "-s", 256, "--gpu", "1.2GB")
        (solved,) = as_json(*asked, "-b", 20, "--solve", "batch")["solved"]
        assert solved["value"] > 1
        for more, verdict in ((0, "fits"), (1, "tight")):
            again = as_json(*asked, "-b", solved["value"] + more, code=more)
            assert again["recipes"][0]["verdict"] == verdict
        assert "not even of 1" in run(tiny, "-s", 64, "--gpu", "0.9GB", "--solve", "batch", code=1)

    def test_what_was_solved_is_told(self, tiny: Path) -> None:
        text = run(tiny, "-b", 4, "-s", 500, "--gpu", "1.05GB", "--solve", "seq")
        assert re.search(r"^solved\tadalomo: the largest sequence that fits is \d+, ", text, re.M)


class TestWrongUse:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--recipe", "adamlomo"], "did you mean 'adalomo'?"),
            (["--compare", ","], "optstate recipes"),
            (["--gpu", "rtx4091"], "RTX 4090"),
            (["--gpu", "-1GiB"], "24GiB"),
            (["--dtype", "int8"], "bf16"),
            (["--weights", "split4"], "split8"),
            (["--weights", "split8", "--dtype", "fp16"], "fp16"),
            (["--attn", "flash"], "sdpa"),
            (["--shard", "zero3"], "fsdp"),
            (["--shard", "fsdp"], "--world-size"),
            (["--shard", "zero2", "--world-size", "2"], "--no-fused-backward"),
            (["--clip", "value"], "norm"),
            (["-b", "0"], "batch_size"),
            (["-s", "-5"], "seq_len"),
            (["--grad-accum", "0"], "grad_accum"),
            (["--world-size", "0"], "world_size"),
            (["--solve", "batch"], "--gpu"),
            (["--solve", "layers", "--gpu", "24GiB"], "batch or seq"),
        ],
    )
    def test_it_is_told_in_one_line(self, arguments: list[str], message: str, tiny: Path) -> None:
        assert message in run(tiny, *arguments, code=2)

    def test_what_is_no_number_is_left_to_the_parser(self, tiny: Path) -> None:
        result = CliRunner().invoke(app, ["estimate", str(tiny), "-b", "many"])
        assert result.exit_code == 2
        assert "integer" in result.stderr

    def test_unknown_models(self) -> None:
        assert "did you mean 'llama-7b'" in run("llama-7", code=2)
        assert run("a\x1b[31m/b", code=2).isprintable() is False  # but for the newline at its end
        assert "\x1b" not in run("a\x1b[31m/b", code=2)


class TestUnreadable:
    def test_files(self, tmp_path: Path) -> None:
        cases = {
            "text.txt": b"hello",
            "broken.json": b'{"model_type": ',
            "list.json": b"[1]",
            "no_type.json": b'{"hidden_size": 4}',
            "missing.json": b'{"model_type": "llama", "hidden_size": 64}',
            "huge.json": json.dumps({**LLAMA, "hidden_size": 10**15}).encode(),
            "vision.json": b'{"model_type": "vit"}',
            "empty.safetensors": b"",
            "cut.safetensors": b"\xff\x00\x00\x00\x00\x00\x00\x00{",
        }
        for name, content in cases.items():
            (tmp_path / name).write_bytes(content)
            line = run(tmp_path / name, code=3)
            assert str(tmp_path / name) in line, line

    def test_debugging_shows_where_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "text.txt").write_text("hello")
        monkeypatch.setenv("OPTSTATE_DEBUG", "1")
        result = CliRunner().invoke(app, ["estimate", str(tmp_path / "text.txt")])
        assert isinstance(result.exception, ValueError)


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from optstate_cli import app\n"
        "result = CliRunner().invoke(app, ['estimate', '--help'])\n"
        "assert result.exit_code == 0 and '--checkpointing' in result.output, result.output\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
