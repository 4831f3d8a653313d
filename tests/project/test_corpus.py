"""The text the examples and the quality benchmark train on."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"


def test_a_text_set_aside_is_seen_by_nothing_else(tmp_path: Path) -> None:
    """Training text, text to choose by and text to report on are three parts that do not touch."""
    module = runpy.run_path(str(EXAMPLES / "corpus.py"))
    corpus = module["Corpus"](torch.arange(100), torch.arange(100, 120), "numbers", "whole")
    selection, validation = corpus.set_aside()
    assert torch.equal(selection.train, torch.arange(80))
    assert torch.equal(validation.train, selection.train)
    assert torch.equal(selection.valid, torch.arange(80, 100))
    assert torch.equal(validation.valid, torch.arange(100, 120))
    assert len({corpus.fingerprint, selection.fingerprint, validation.fingerprint}) == 3
