"""`optstate inspect` and `optstate check`: text, JSON, what they find in broken files, a start without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors
import safetensors.torch
import torch
from optstate_cli import app
from torch import Tensor, nn
from typer.testing import CliRunner

import optstate
from adalomo import AdaLomo
from optstate.checkpoint.document.document import KEY
from optstate.recipes import AdamW, AdamW4bit, AdamW8bit
from tests.support.models import EveryShape, loss_of, mlp
from tests.support.paths import DATA


def run(*arguments: Any, code: int = 0) -> str:
    """Standard output of the command, which must end with this exit code and, if it is 0 or 1, say nothing else."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    if code < 2:
        assert result.stderr == ""
    return result.stdout if code < 2 else result.stderr


def as_json(*arguments: Any, code: int = 0) -> dict[str, Any]:
    tree = json.loads(run(*arguments, "--json", code=code))
    assert isinstance(tree, dict)
    return tree


def table(text: str, first: str) -> list[dict[str, str]]:
    """The rows under the heading line that begins with `first`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{first}\t"))
    names = lines[start].split("\t")
    rows = []
    for line in lines[start + 1 :]:
        if not line:
            break
        rows.append(dict(zip(names, line.split("\t"), strict=True)))
    return rows


def trained(build: Callable[[nn.Module], Any], dtype: torch.dtype = torch.float32) -> Any:
    model = mlp(dtype, 600)
    optimizer = build(model)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.fixture(scope="module")
def eight_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "opt.safetensors"
    model_groups = lambda m: AdamW8bit(optstate.declare_roles(m), lr=1e-3)  # noqa: E731
    optstate.save(trained(model_groups), path)
    return path


@pytest.fixture(scope="module")
def factored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "opt.safetensors"
    optstate.save(trained(lambda m: AdaLomo(m.named_parameters())), path)
    return path


class TestInspect:
    def test_text(self, eight_bit: Path) -> None:
        text = run("inspect", eight_bit)
        facts = dict(line.split("\t", 1) for line in text.split("\n\n")[0].splitlines())
        assert facts["kind"] == "optstate (says the file)"
        assert facts["recipe"] == "adamw8bit"
        assert facts["chain"] == "scale_by_adam > add_decayed_weights"
        assert facts["step"] == "3"
        assert facts["parameters"] == "6, 9004 elements with state"
        assert facts["fp32 AdamW"].startswith("72032 bytes: this is ")
        groups = table(text, "GROUP")
        assert [row["ROLE"] for row in groups] == ["norm", "bias", "matrix"]
        assert groups[0]["HYPER-PARAMETERS"] == "betas=(0.9, 0.999) eps=1e-08 lr=0.001 weight_decay=0.01"
        slots = {(row["SLOT"], row["STORE"]): row for row in table(text, "SLOT")}
        codes = slots["exp_avg", "Block8()"]
        # 4800 codes of a byte and 19 maxima of four: the matrix of 600 x 8.
        assert (codes["TENSORS"], codes["ELEMENTS"], codes["BYTES"]) == ("2", "4800", str(4800 + 19 * 4))
        assert codes["DTYPE"] == "uint8+float32"
        assert codes["B/PARAM"] == f"{(4800 + 76) / 4800:.4f}"
        assert slots["exp_avg_sq", "Full()"]["B/PARAM"] == "4.0000"
        recipes = {row["RECIPE"]: row for row in table(text, "RECIPE")}
        assert (recipes["adamw"]["BYTES"], recipes["adamw"]["SHARE OF FP32 ADAMW"]) == ("72032", "100.0 %")
        assert recipes["lomo"] == {"RECIPE": "lomo", "BYTES": "0", "B/PARAM": "0.0000", "SHARE OF FP32 ADAMW": "0.0 %"}

    def test_json_has_every_key_and_adds_up(self, eight_bit: Path) -> None:
        tree = as_json("inspect", eight_bit, "--tensors")
        assert tree["schema"] == "optstate.inspect/1"
        required = {"kind", "recipe", "step", "parameters", "state_bytes", "slots", "groups", "issues", "tensors"}
        assert required <= set(tree)
        read = safetensors.torch.load_file(eight_bit)
        total = sum(tensor.numel() * tensor.element_size() for tensor in read.values())
        assert (tree["kind"], tree["recipe"], tree["step"], tree["parameters"]) == ("optstate", "adamw8bit", 3, 6)
        assert tree["state_bytes"] == total
        assert tree["issues"] == []
        for slot in tree["slots"]:
            assert set(slot) >= {"slot", "store", "dtype", "tensors", "elements", "bytes"}
        assert sum(slot["bytes"] for slot in tree["slots"]) == total
        assert {tensor["name"] for tensor in tree["tensors"]} == set(read)
        for tensor in tree["tensors"]:
            assert set(tensor) >= {"parameter", "slot", "field", "dtype", "shape", "bytes"}
            own = read[tensor["name"]]
            assert tensor["shape"] == list(own.shape)
            assert tensor["dtype"] == str(own.dtype).removeprefix("torch.")
        assert tree["groups"][2]["hyper"]["betas"] == [0.9, 0.999]
        assert "tensors" not in as_json("inspect", eight_bit)

    def test_other_recipes_cost_what_their_plans_say(self, eight_bit: Path, factored: Path) -> None:
        """What is kept now is the price of the recipe that keeps it."""
        for path in (eight_bit, factored):
            tree = as_json("inspect", path)
            prices = {row["recipe"]: row["bytes"] for row in tree["recipes"]}
            assert prices[tree["recipe"]] == tree["state_bytes"]
            model = mlp(torch.float32, 600)
            for name, nbytes in prices.items():
                assert nbytes == optstate.recipes.get(name)(model.parameters()).plan().nbytes, name

    def test_stats_are_torchs(self, factored: Path) -> None:
        tree = as_json("inspect", factored, "--stats")
        read = safetensors.torch.load_file(factored)
        for tensor in tree["tensors"]:
            own, stats = read[tensor["name"]].double(), tensor["stats"]
            assert stats["minimum"] == own.min().item()
            assert stats["maximum"] == own.max().item()
            assert stats["mean"] == pytest.approx(own.mean().item(), rel=1e-12)
            assert (stats["zeros"], stats["nan"], stats["infinite"]) == (int((own == 0).sum()), 0, 0)

    def test_stats_of_what_is_not_finite_and_longer_than_a_piece(self, tmp_path: Path) -> None:
        inf, nan = float("inf"), float("nan")
        long = torch.arange(600_001, dtype=torch.float32)
        long[[0, 300_000, 600_000]] = torch.tensor([nan, inf, -inf])
        tensor_bytes = {
            "long": long,
            "nan": torch.full((3,), nan),
            "none": torch.zeros(0),
            "b": torch.tensor([True, False]),
        }
        safetensors.torch.save_file(tensor_bytes, tmp_path / "a")
        found = {t["name"]: t["stats"] for t in as_json("inspect", tmp_path / "a", "--stats")["tensors"]}
        finite = long[long.isfinite()].double()
        assert found["long"]["mean"] == pytest.approx(finite.mean().item(), rel=1e-12)
        assert (found["long"]["minimum"], found["long"]["maximum"]) == (1.0, 599_999.0)
        assert (found["long"]["nan"], found["long"]["infinite"]) == (1, 2)
        assert (found["nan"]["mean"], found["nan"]["nan"]) == (None, 3)
        assert (found["none"]["minimum"], found["none"]["zeros"]) == (None, 0)
        assert (found["b"]["mean"], found["b"]["zeros"]) == (0.5, 1)

    def test_stats_of_a_tensor_that_is_not_contiguous(self, tmp_path: Path) -> None:
        """Read in parts of bounded size, each byte once, whatever the order of its dimensions."""
        from optstate.checkpoint.files import tensor_bytes
        from optstate.checkpoint.files.tensor_place import Stored

        base = torch.randn(40, 30, 20, generator=torch.Generator().manual_seed(0))
        (tmp_path / "a").write_bytes(b"abc" + bytes(base.untyped_storage().tolist()))
        views = [
            base.permute(2, 0, 1),
            base[3:, ::2],
            base[:, 1, 2],
            base[5],
            base[0, 0, 0],
            base[:0],
            base[..., ::7].mT,
        ]
        for piece in (1 << 19, 64):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tensor_bytes, "PIECE", piece)
                for view in [*views, base[0].expand(3, 30, 20)]:
                    place = 3 + 4 * view.storage_offset()
                    stored = Stored(str(tmp_path / "a"), place, "F32", tuple(view.shape), view.stride())
                    assert torch.equal(tensor_bytes.load_tensor(stored), view)
                    found = tensor_bytes.measure_tensor(stored)
                    parts = list(tensor_bytes.iterate_pieces(stored))
                    assert max((part.numel() for part in parts), default=0) <= piece
                    assert torch.equal(torch.cat(parts).sort().values, view.double().flatten().sort().values)
                    if view.numel():
                        assert (found.minimum, found.maximum) == (view.min().item(), view.max().item())
                        assert found.mean == pytest.approx(view.double().mean().item(), rel=1e-9)

    def test_filter_and_sort_are_about_the_list(self, eight_bit: Path) -> None:
        text = run("inspect", eight_bit, "--filter", "0.weight", "--sort", "bytes")
        names = [(row["NAME"], row["SLOT"]) for row in table(text, "NAME")]
        assert names == [
            ("0.weight", "exp_avg.codes"),
            ("0.weight", "exp_avg_sq.codes"),
            ("0.weight", "exp_avg.absmax"),
            ("0.weight", "exp_avg_sq.absmax"),
        ]
        assert table(text, "SLOT") == table(run("inspect", eight_bit), "SLOT")
        globbed = as_json("inspect", eight_bit, "--filter", "*/exp_avg_sq*")["tensors"]
        assert {tensor["slot"] for tensor in globbed} == {"exp_avg_sq"}
        by_name = [t["name"] for t in as_json("inspect", eight_bit, "--sort", "name")["tensors"]]
        assert by_name == sorted(by_name)
        assert as_json("inspect", eight_bit, "--filter", "nothing")["tensors"] == []
        run("inspect", eight_bit, "--sort", "colour", code=2)

    def test_frozen_parameters_and_uneven_steps(self, tmp_path: Path) -> None:
        model = EveryShape()
        optimizer = AdamW(model.named_parameters())
        model(0).backward()
        optimizer.step()
        optstate.save(optimizer, tmp_path / "a")
        tree = as_json("inspect", tmp_path / "a")
        assert (tree["frozen"], tree["step"], tree["steps"]) == (1, 1, [0, 1])
        assert tree["without_state"] == ["frozen"]
        assert "without state\t1: frozen\n" in run("inspect", tmp_path / "a")
        assert [issue["where"] for issue in tree["issues"]] == ["step"]
        checked = as_json("check", tmp_path / "a")
        assert checked["ok"] is True
        assert [(issue["severity"], issue["where"]) for issue in checked["issues"]] == [("warning", "step")]
        assert "'unused': 0" in checked["issues"][0]["what"]

    def test_a_chain_without_a_recipe(self, tmp_path: Path) -> None:
        chain = optstate.updates.momentum()
        optstate.save(optstate.Optimizer(mlp().named_parameters(), chain), tmp_path / "a")
        assert as_json("inspect", tmp_path / "a")["recipe"] is None
        assert "a chain of its own" in run("inspect", tmp_path / "a")

    def test_lerobots_layout(self, tmp_path: Path) -> None:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loss_of(model, 0).backward()
        optimizer.step()
        state = optimizer.state_dict()
        tensor_bytes = {
            f"state/{i}/{slot}": value for i, slots in state["state"].items() for slot, value in slots.items()
        }
        safetensors.torch.save_file(tensor_bytes, tmp_path / "optimizer_state.safetensors")
        file = tmp_path / "optimizer_state.safetensors"
        alone = as_json("inspect", file)
        assert alone["groups"][0]["hyper"] == {}
        assert "no optimizer_param_groups.json beside it" in alone["notes"][0]
        (tmp_path / "optimizer_param_groups.json").write_text(json.dumps(state["param_groups"]))
        for path in (file, tmp_path):
            tree = as_json("inspect", path)
            assert (tree["kind"], tree["certainty"], tree["recipe"]) == ("lerobot", "layout", "adamw")
            assert tree["looks_like"] == "AdamW"
            assert (tree["step"], tree["parameters"]) == (1, 6)
            assert tree["groups"][0]["hyper"]["lr"] == 1e-3
            assert {slot["slot"]: slot["tensors"] for slot in tree["slots"]} == {"exp_avg": 6, "exp_avg_sq": 6}
            assert {slot["store"] for slot in tree["slots"]} == {"Full()"}
            assert as_json("check", path)["ok"] is True
        (tmp_path / "optimizer_param_groups.json").write_text("[[")
        assert "param groups beside the file cannot be read" in run("inspect", file, code=3)

    def test_any_other_file_is_not_taken_for_state(self) -> None:
        tree = as_json("inspect", DATA / "common.safetensors")
        assert (tree["kind"], tree["certainty"], tree["recipe"]) == ("safetensors", "unknown", None)
        assert (tree["step"], tree["parameters"]) == (None, None)
        assert "not an optimizer's file" in tree["notes"][0]

    def test_a_sharded_set(self, tmp_path: Path) -> None:
        for i in (1, 2):
            safetensors.torch.save_file({f"w{i}": torch.zeros(i)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
        weight_map = {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 12}, "weight_map": weight_map}))
        assert as_json("inspect", tmp_path)["state_bytes"] == 12
        assert as_json("check", index)["ok"] is True

    def test_through_a_pipe(self, eight_bit: Path, tmp_path: Path) -> None:
        """What follows the header is not needed, and a pipe has no end to compare with."""
        content = eight_bit.read_bytes()
        header = content[: 8 + int.from_bytes(content[:8], "little")]
        of_file = as_json("inspect", eight_bit, "--tensors")
        for data in (content, header):
            result = CliRunner().invoke(app, ["inspect", "-", "--tensors", "--json"], input=data)
            assert result.exit_code == 0, result.output
            assert json.loads(result.stdout) == {**of_file, "path": "-"}
        safetensors.torch.save_file({"w": torch.zeros(3)}, tmp_path / "a")
        result = CliRunner().invoke(app, ["inspect", "-", "--json"], input=(tmp_path / "a").read_bytes())
        assert (json.loads(result.stdout)["kind"], json.loads(result.stdout)["state_bytes"]) == ("safetensors", 12)

    def test_what_cannot_come_through_a_pipe(self, eight_bit: Path, tmp_path: Path) -> None:
        torch.save({"state": {}}, tmp_path / "a")
        content = eight_bit.read_bytes()
        refused = "-: --stats reads the data, and of a pipe only the header is read; give a file"
        give_a_file = "only a safetensors file can be inspected through a pipe: give a file"
        torch_file = f"-: a file written by torch.save, not a safetensors file; {give_a_file}"
        for data, arguments, code, message in [
            (content, ["--stats"], 4, refused),
            ((tmp_path / "a").read_bytes(), [], 3, torch_file),
            (b"", [], 3, f"-: an empty file, not a safetensors file; {give_a_file}"),
            (b"\x09", [], 3, "-: not a safetensors file: 1 bytes are too short for the header's length"),
            (content[:200], [], 3, "-: the file ends within its header"),
            (b"\xff" * 8 + b"{" * 600, [], 3, None),
        ]:
            result = CliRunner().invoke(app, ["inspect", "-", *arguments], input=data)
            assert (result.exit_code, result.stdout) == (code, "")
            assert message is None or result.stderr == f"optstate: {message}\n"

    @pytest.mark.parametrize("arguments", [(), ("--json",), ("--tensors",), ("--stats", "--json")])
    def test_hostile_names_reach_no_terminal(self, arguments: tuple[str, ...], tmp_path: Path) -> None:
        hostile = "\x1b[31mred\n\t\r\u202e\x9b"
        model = nn.ParameterDict({hostile: nn.Parameter(torch.ones(2))})
        optstate.save(
            AdamW([{"params": list(model.named_parameters()), "name": hostile, "role": hostile}]), tmp_path / "a"
        )
        safetensors.torch.save_file({hostile: torch.zeros(1)}, tmp_path / "b", {hostile: hostile})
        for path in (tmp_path / "a", tmp_path / "b"):
            text = run("inspect", path, *arguments)
            text += CliRunner().invoke(app, ["check", str(path)]).output
            assert all(c.isprintable() or c in "\n\t" for c in text)
            assert "\u202e" not in text
        assert "\\x1b[31mred\\n" in run("inspect", tmp_path / "b", "--tensors")

    def test_no_colour_outside_a_terminal(self, eight_bit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert "\x1b" not in run("inspect", eight_bit)


def on_a_terminal(stream: str, arguments: list[str], **environment: str) -> str:
    """What a command writes to its standard output or its standard error, which is a terminal."""
    import os
    import pty

    main, other = pty.openpty()
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: other}
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "150", **environment}
    with subprocess.Popen([sys.executable, *arguments], env=environment, **streams) as process:
        os.close(other)
        output = b""
        try:
            while part := os.read(main, 65536):
                output += part
        except OSError:  # the end, on Linux
            pass
        assert process.wait() == 0
    os.close(main)
    return output.decode()


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_gets_tables_and_colour_only_where_wanted(eight_bit: Path, environment: dict[str, str]) -> None:
    text = on_a_terminal("stdout", command("inspect", eight_bit), **environment)
    assert "Block8()" in text
    assert "\t" not in text
    assert ("\x1b[3" in text) is False  # no colours at all; bold headings at most
    assert "TERM" not in environment or "\x1b" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "term", "shown"), [(0.06, "xterm", True), (0.0, "xterm", False), (0.06, "dumb", False)]
)
def test_a_bar_on_a_terminal_where_it_takes_long(seconds: float, term: str, shown: bool) -> None:
    code = (
        "import time; from optstate_cli import output; output.PATIENCE = 0.1\n"
        f"for _ in output.progress(range(10), 'tensors'): time.sleep({seconds})"
    )
    assert ("tensors" in on_a_terminal("stderr", ["-c", code], TERM=term)) is shown
    quiet = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert quiet.stdout == quiet.stderr == b""


def command(*arguments: Any) -> list[str]:
    return ["-c", "from optstate_cli import app; app()", *map(str, arguments)]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_looking_into_a_file_does_not_import_torch(suffix: str, eight_bit: Path, tmp_path: Path) -> None:
    path = eight_bit
    if suffix == "pt":
        path = tmp_path / "opt.pt"
        torch.save(trained(lambda m: torch.optim.AdamW(m.parameters())).state_dict(), path)
    code = (
        "import sys, time; t = time.perf_counter(); from optstate_cli import app\n"
        f"try: app(['inspect', {str(path)!r}, '--tensors', '--json'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print([m for m in ('torch', 'numpy', 'safetensors') if m in sys.modules], time.perf_counter() - t)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules, _, seconds = done.stdout.splitlines()[-1].rpartition(" ")
    print(f"inspect took {float(seconds):.3f} s with its imports")
    assert modules == "[]"


def test_a_closed_pipe_ends_quietly(eight_bit: Path) -> None:
    with subprocess.Popen(
        [sys.executable, *command("inspect", eight_bit, "--tensors")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


class TestCheck:
    def changed(self, source: Path, folder: Path, change: Callable[[dict[str, Tensor], Any], Any]) -> Path:
        """A copy with other tensors or another document, written by the library."""
        with safetensors.safe_open(source, "pt") as file:
            metadata = file.metadata()
        tensor_bytes, document = safetensors.torch.load_file(source), json.loads(metadata[KEY])
        change(tensor_bytes, document)
        safetensors.torch.save_file(tensor_bytes, folder / "changed", {KEY: json.dumps(document)})
        return folder / "changed"

    def test_sound_files(self, eight_bit: Path, factored: Path) -> None:
        for path in (eight_bit, factored):
            assert as_json("check", path) == {"schema": "optstate.check/1", "path": str(path), "ok": True, "issues": []}
            assert run("check", path) == "no issues\n"

    BROKEN: ClassVar[dict[str, tuple[str, Callable[[dict[str, Tensor], Any], Any], str, str]]] = {
        "absmax count": (
            "eight_bit",
            lambda t, d: t.update({"0.weight/exp_avg.absmax": torch.ones(18)}),
            "0.weight/exp_avg",
            "absmax has shape [18], Block8() of 600x8 has [19]",
        ),
        "codes without absmax": (
            "eight_bit",
            lambda t, d: (
                t.pop("0.weight/exp_avg.absmax"),
                next(p for p in d["parameters"] if p["name"] == "0.weight")["slots"]["exp_avg"]["fields"].pop("absmax"),
            ),
            "0.weight/exp_avg",
            "Block8() without absmax",
        ),
        "missing": (
            "eight_bit",
            lambda t, d: t.pop("0.weight/exp_avg.codes"),
            "0.weight/exp_avg",
            "the tensor '0.weight/exp_avg.codes' is missing",
        ),
        "stray": ("eight_bit", lambda t, d: t.update(x=torch.zeros(1)), "x", "belongs to no statistic in the document"),
        "dtype": (
            "factored",
            lambda t, d: t.update({"0.weight/exp_avg_sq.row": t["0.weight/exp_avg_sq.row"].half()}),
            "0.weight/exp_avg_sq",
            "row has dtype F16, Factored() has F32 or F64",
        ),
        "negative absmax": (
            "eight_bit",
            lambda t, d: t["0.weight/exp_avg.absmax"][3].neg_(),
            "0.weight/exp_avg.absmax",
            "1 of 19 numbers are negative",
        ),
        "negative second moment": (
            "eight_bit",
            lambda t, d: t["0.bias/exp_avg_sq"][:2].fill_(-1.5),
            "0.bias/exp_avg_sq",
            "2 of 600 numbers are negative, the least is -1.5",
        ),
        "nan": (
            "eight_bit",
            lambda t, d: t["0.bias/exp_avg"][0].fill_(float("nan")),
            "0.bias/exp_avg",
            "1 of 600 numbers are NaN",
        ),
        "infinite": (
            "factored",
            lambda t, d: t["0.bias/exp_avg_sq"][0].fill_(float("inf")),
            "0.bias/exp_avg_sq",
            "infinite",
        ),
        "means differ": (
            "factored",
            lambda t, d: t["0.weight/exp_avg_sq.row"].mul_(1.01),
            "0.weight/exp_avg_sq",
            "the means differ: ",
        ),
    }

    def test_four_bits_with_maxima_by_row_and_column(self, tmp_path: Path) -> None:
        optstate.save(trained(lambda m: AdamW4bit(m.named_parameters(), rank1=True)), tmp_path / "a")
        assert as_json("check", tmp_path / "a")["issues"] == []
        path = self.changed(tmp_path / "a", tmp_path, lambda t, d: t["0.weight/exp_avg_sq.row"][2].neg_())
        assert [issue["where"] for issue in as_json("check", path, code=1)["issues"]] == ["0.weight/exp_avg_sq.row"]

    def test_codebooks(self, eight_bit: Path, tmp_path: Path) -> None:
        """Values that are not those of the id, that are not in the file, or that fp32 does not have."""
        with safetensors.safe_open(eight_bit, "pt") as file:
            first, second = json.loads(file.metadata()[KEY])["codebooks"]
        for change, where, what in [
            (lambda t, d: d["codebooks"][first].__setitem__(7, d["codebooks"][first][8]), first, "of another map"),
            (lambda t, d: d["codebooks"].pop(second), second, "is used, but its values are not in the file"),
            (lambda t, d: d["codebooks"][first].__setitem__(255, 1e300), first, "255 of them fp32 numbers"),
        ]:
            issues = as_json("check", self.changed(eight_bit, tmp_path, change), code=1)["issues"]
            assert [issue["where"] for issue in issues] == [f"codebook {where}"]
            assert what in issues[0]["what"]

    @pytest.mark.parametrize("name", BROKEN)
    def test_what_is_broken_is_the_one_thing_found(self, name: str, tmp_path: Path, request: Any) -> None:
        source, change, where, what = self.BROKEN[name]
        path = self.changed(request.getfixturevalue(source), tmp_path, change)
        tree = as_json("check", path, code=1)
        assert tree["ok"] is False
        assert [(issue["severity"], issue["where"]) for issue in tree["issues"]] == [("error", where)]
        assert what in tree["issues"][0]["what"]
        assert table(run("check", path, code=1), "SEVERITY")[0]["WHERE"] == where

    def test_a_first_moment_may_be_negative(self, eight_bit: Path, tmp_path: Path) -> None:
        path = self.changed(eight_bit, tmp_path, lambda t, d: t["0.bias/exp_avg"].fill_(-1))
        assert as_json("check", path)["ok"] is True

    def test_an_unreadable_document_is_invalid_input(self, eight_bit: Path, tmp_path: Path) -> None:
        path = self.changed(eight_bit, tmp_path, lambda t, d: d.update(format_version=2))
        for name in ("check", "inspect"):
            message = run(name, path, code=3)
            reason = "it has format version 2, this optstate reads up to 1: upgrade optstate"
            assert message == f"optstate: {path}: metadata 'optstate': {reason}\n"

    def test_a_broken_structure_is_a_finding_and_no_file_is_invalid_input(
        self, eight_bit: Path, tmp_path: Path
    ) -> None:
        cut = tmp_path / "cut"
        cut.write_bytes(eight_bit.read_bytes()[:-3])
        assert "truncated" in as_json("check", cut, code=1)["issues"][0]["what"]
        assert "truncated" in run("inspect", cut, code=3)
        torch.save({"state": {}}, tmp_path / "opt.pt")
        shutil.copy(tmp_path / "opt.pt", tmp_path / "renamed.safetensors")
        (tmp_path / "empty").mkdir()
        for path in (tmp_path / "renamed.safetensors", tmp_path / "absent", tmp_path / "empty"):
            message = run("check", path, code=3)
            assert message.startswith(f"optstate: {path}: ")
            assert message.count("\n") == 1

    def test_other_formats_by_the_names_of_their_statistics(self, tmp_path: Path) -> None:
        tensor_bytes = {"state/0/exp_avg": -torch.ones(2), "state/0/exp_avg_sq": -torch.ones(2)}
        safetensors.torch.save_file(tensor_bytes, tmp_path / "a")
        issues = as_json("check", tmp_path / "a", code=1)["issues"]
        assert [issue["where"] for issue in issues] == ["#0/exp_avg_sq"]
        tensor_bytes = {"optim.exp_avg": -torch.ones(2), "optim.exp_avg_sq": -torch.ones(2)}
        safetensors.torch.save_file(tensor_bytes, tmp_path / "b")
        issues = as_json("check", tmp_path / "b", code=1)["issues"]
        assert [issue["where"] for issue in issues] == ["optim.exp_avg_sq"]
