"""Statistics that are no flat tensors: GaLore's projections with Adafactor, and lists of matrices as SOAP's."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optstate.checkpoint import CheckpointError
from optstate.checkpoint.document.contradictions import inconsistencies
from tests.cli.test_hostile import answer, refusal
from tests.support.foreign_files import check_document, fields, identical, param, read, saved


def galore_adafactor(beta1: float | None, reverse: bool) -> dict[str, Any]:
    """What galore-torch's Adafactor keeps after three steps, by its formulas in fp64 and rounded at the end.

    A gradient is projected onto its largest singular vectors on the side that is short (`reverse`: the long one); the
    means of its square over rows and columns follow with weights 1 - t**-0.8, and the average of updates with beta1.
    """
    generator = torch.Generator().manual_seed(0)
    state: dict[int, Any] = {}
    for place, shape in enumerate([(24, 16), (16, 24), (24,)]):
        row = col = square = first = torch.zeros((), dtype=torch.float64)
        basis = None
        for step in range(1, 4):
            gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
            weight = 1 - step**-0.8
            if len(shape) == 2:
                u, _, v = torch.linalg.svd(gradient, full_matrices=False)
                right = (shape[0] >= shape[1]) != reverse
                basis = (v[:4] if right else u[:, :4]) if basis is None else basis
                gradient = gradient @ basis.T if right else basis.T @ gradient
                row = weight * row + (1 - weight) * (gradient**2 + 1e-30).mean(-1)
                col = weight * col + (1 - weight) * (gradient**2 + 1e-30).mean(-2)
                update = gradient / (row / row.mean()).sqrt()[:, None] / col.sqrt()
            else:
                square = weight * square + (1 - weight) * (gradient**2 + 1e-30)
                update = gradient / square.sqrt()
            first = (beta1 or 0) * first + (1 - (beta1 or 0)) * 0.01 * update / max(
                1, float(update.square().mean()) ** 0.5
            )
        kept: dict[str, Any] = {"step": 3}
        if basis is not None:
            kept["projector"] = GaLoreProjector(4, basis.float(), "reverse_std" if reverse else "std")
        if beta1 is not None:
            kept["exp_avg"] = first.float()
        if basis is not None:
            kept |= {"exp_avg_sq_row": row.float(), "exp_avg_sq_col": col.float()}
        else:
            kept["exp_avg_sq"] = square.float()
        state[place] = {**kept, "RMS": torch.tensor(1.0)}
    common = {"lr": 0.01, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": beta1}
    common |= {"weight_decay": 0.0, "scale_parameter": False, "relative_step": False, "warmup_init": False}
    low = {"rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", **common, "dim": 2, "params": [0, 1]}
    return {"state": state, "param_groups": [low, {**common, "params": [2]}]}


class GaLoreProjector:
    """The attributes of galore-torch's class."""

    def __init__(self, rank: int, basis: Tensor, proj_type: str) -> None:
        self.rank, self.verbose, self.update_proj_gap, self.scale = rank, False, 200, 0.25
        self.ortho_matrix, self.proj_type = basis, proj_type


@pytest.fixture
def projector_class(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("galore_torch.galore_projector")
    module.GaLoreProjector = GaLoreProjector  # type: ignore[attr-defined]
    monkeypatch.setattr(GaLoreProjector, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, "galore_torch", types.ModuleType("galore_torch"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("projector_class")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_galores_adafactor_keeps_means_of_projected_squares(beta1: float | None, reverse: bool, tmp_path: Path) -> None:
    tree = galore_adafactor(beta1, reverse)
    ours = read(tree, tmp_path)
    check_document(ours)
    assert (ours.kind, ours.document.source["optimizer"], ours.document.recipe) == ("galore", "GaLoreAdafactor", "")
    assert [p.shape for p in ours.document.parameters] == [(24, 16), (16, 24), (24,)]
    assert ours.document.steps == (3,)
    for place in (0, 1):
        own, theirs = param(ours, place), tree["state"][place]
        square = fields(ours, own.slots["exp_avg_sq"])
        basis = square["basis"] if beta1 is None else fields(ours, own.slots["exp_avg"])["basis"]
        assert identical(basis, theirs["projector"].ortho_matrix)
        assert identical(square["row"], theirs["exp_avg_sq_row"])
        assert identical(square["col"], theirs["exp_avg_sq_col"])
        if beta1 is not None:
            assert identical(fields(ours, own.slots["exp_avg"])[""], theirs["exp_avg"])
            assert own.slots["exp_avg"].beta == 0.9
        assert {record.store for record in own.slots.values()} == {"Projected(rank=4)"}
        assert own.extra["projector"]["update_proj_gap"] == 200
    assert identical(fields(ours, param(ours, 2).slots["exp_avg_sq"])[""], tree["state"][2]["exp_avg_sq"])
    assert inconsistencies(ours) == []


@pytest.mark.usefixtures("projector_class")
def test_galores_adafactor_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    for key, value, words in (
        ("exp_avg_sq_row", torch.ones(5), "exp_avg_sq_row and exp_avg_sq_col are of a matrix [5, 4]"),
        ("projector", GaLoreProjector(4, torch.ones(5, 16), "std"), "which does not fit the projector's basis"),
        ("exp_avg_sq_row", torch.ones(3, 3), "they must be of one matrix"),
        ("exp_avg_sq_col", None, "exp_avg_sq_col is missing"),
        ("exp_avg", torch.ones(3, 3), "exp_avg has shape [3, 3]"),
        ("projector", 3, "its projector is not one of GaLore's"),
    ):
        tree = galore_adafactor(0.9, False)
        tree["state"][0][key] = value
        with pytest.raises(CheckpointError) as caught:
            read(tree, tmp_path)
        assert words in str(caught.value)
        assert "parameter '#0'" in str(caught.value)


# --- lists of tensors ---------------------------------------------------------------------------------------------


def soap() -> dict[str, Any]:
    """As SOAP keeps its state: a matrix for every dimension, none for one that is too long, and none for vectors."""
    state: dict[int, Any] = {}
    generator = torch.Generator().manual_seed(0)
    for place, shape in enumerate([(6, 40), (6, 5), (7,)]):
        sides = [torch.randn(n, n, generator=generator) if n < 20 else [] for n in shape]
        state[place] = {
            **{key: torch.randn(shape, generator=generator) for key in ("exp_avg", "exp_avg_sq")},
            "GG": [[]] if len(shape) == 1 else sides,
            "Q": [[]] if len(shape) == 1 else [side @ side.T if isinstance(side, Tensor) else [] for side in sides],
            "shampoo_beta": 0.95,
            "in both": ((torch.ones(2), None), [torch.zeros(3)], "text"),
        }
    group = {"lr": 1e-3, "betas": (0.95, 0.95), "eps": 1e-8, "max_precondition_dim": 20, "step": 3, "params": [0, 1, 2]}
    return {"state": state, "param_groups": [group]}


def test_lists_of_tensors_are_statistics(tmp_path: Path) -> None:
    tree = soap()
    ours = read(tree, tmp_path)
    check_document(ours)
    assert inconsistencies(ours) == []
    assert [p.shape for p in ours.document.parameters] == [(6, 40), (6, 5), (7,)]
    assert ours.document.steps == (3,)
    for place, kept in tree["state"].items():
        own = param(ours, place)
        for key in ("GG", "Q"):
            expected = {str(i): side for i, side in enumerate(kept[key]) if isinstance(side, Tensor)}
            found = fields(ours, own.slots[key]) if expected else {}
            assert found.keys() == expected.keys()
            assert all(identical(found[i], side) for i, side in expected.items())
        assert fields(ours, own.slots["in_both"]).keys() == {"0_0", "1_0"}


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and identical(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b)


def test_lists_of_tensors_are_written_as_they_were(tmp_path: Path) -> None:
    tree = soap()
    saved(tree, tmp_path, "a.pt")
    for source, target in (("a.pt", "b.pt"), ("a.pt", "c.safetensors"), ("c.safetensors", "d.pt")):
        answer("convert", tmp_path / source, tmp_path / target)
    for name in ("b.pt", "d.pt"):
        again = torch.load(tmp_path / name, weights_only=True)
        assert alike(again["param_groups"], tree["param_groups"])
        for place, kept in tree["state"].items():
            assert again["state"][place].keys() == kept.keys()
            assert all(alike(value, again["state"][place][key]) for key, value in kept.items())
    # A file of our own whose list has no place for one of its tensors is not written as if it had none.
    content = (tmp_path / "c.safetensors").read_bytes()
    changed = re.sub(rb'(\\"GG\\": ?\[)null(, ?\[\]\])', rb"\1true\2", content, count=1)
    assert changed != content
    (tmp_path / "c.safetensors").write_bytes(changed)
    assert "GG of '#0' is in Unknown()" in refusal("convert", tmp_path / "c.safetensors", tmp_path / "e.pt", code=4)
    assert not (tmp_path / "e.pt").exists()
