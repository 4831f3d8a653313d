"""The index of a set of safetensors files: good sets, and each that is refused, with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from optstate.checkpoint.files.safetensors_check import structural_issues
from optstate.checkpoint.files.safetensors_index import read_index
from tests.support.paths import DATA
from tests.support.safetensors_cases import INDEX, INDICES, LFS, assert_like_the_library, findings, refusal


def test_every_hostile_index_has_an_expectation() -> None:
    assert {path.name for path in (DATA / "hostile_index").iterdir()} == set(INDICES)


@pytest.mark.parametrize("name", INDICES)
def test_a_hostile_index(name: str) -> None:
    folder = DATA / "hostile_index" / name
    for path in folder, folder / INDEX:
        assert INDICES[name] in refusal(path, read_index)
    assert any(INDICES[name] in finding for finding in findings(folder))


def sharded(folder: Path, weight_map: object, **more: object) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map, **more}))
    return folder


@pytest.mark.parametrize(
    ("shard", "reason"),
    [
        ("../s.safetensors", "outside the folder of the index"),
        ("a/../../s.safetensors", "outside the folder of the index"),
        ("https://example.org/s.safetensors", "a URL"),
        ("file:///etc/passwd", "a URL"),
        ("C:\\s.safetensors", "an absolute path"),
        ("C:s.safetensors", "an absolute path"),
        ("\\\\host\\share\\s.safetensors", "an absolute path"),
        ("a\\b.safetensors", "which has a backslash"),
        ("", "which is no file name"),
        ("a\0b", "which is no file name"),
        (".", "out of the folder"),
        (["s.safetensors"], "does not give a file name"),
        (None, "does not give a file name"),
    ],
)
def test_a_shard_that_may_not_be_opened(shard: object, reason: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "s.safetensors")
    assert reason in refusal(sharded(tmp_path / "set", {"a": shard}), read_index)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"weight_map": ["s.safetensors"]}', "weight_map is not an object"),
        ('{"weight_map": {}, "weight_map": {}}', "'weight_map' occurs twice"),
        ('{"weight_map": {}, "metadata": 3}', "metadata is not an object"),
        ('{"weight_map": {}, "metadata": {"total_size": "5"}}', "total_size is '5'"),
        ('{"weight_map": {}, "metadata": {"total_size": true}}', "total_size is True"),
        ("[1]", "the index is not valid JSON"),
        ('{"weight_map": {"a": ' + "[" * 5000, "the index is not valid JSON"),
        ("", "the index is not valid JSON"),
        (b"\xff", "the index is not UTF-8"),
    ],
)
def test_an_index_that_says_nonsense(content: str | bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert reason in refusal(tmp_path, read_index)


def test_a_shard_that_is_a_link_out_of_the_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    folder = sharded(tmp_path / "set", {"a": "s.safetensors"})
    (folder / "s.safetensors").symlink_to("../outside.safetensors")
    assert "shard 's.safetensors': a symbolic link out of the folder" in refusal(folder, read_index)
    save_file({"a": torch.ones(2)}, folder / "inside.safetensors")
    (folder / "s.safetensors").unlink()
    (folder / "s.safetensors").symlink_to("inside.safetensors")
    assert list(read_index(folder).shards) == ["s.safetensors"]


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "1f")
    sharded(snapshot, {"a": "s.safetensors"})
    (snapshot / INDEX).rename(blobs / "2e")
    (snapshot / INDEX).symlink_to("../../blobs/2e")
    (snapshot / "s.safetensors").symlink_to("../../blobs/1f")
    assert [entry.name for entry in read_index(snapshot).shards["s.safetensors"].tensors] == ["a"]
    save_file({"a": torch.ones(2)}, tmp_path / "elsewhere")
    (snapshot / "s.safetensors").unlink()
    (snapshot / "s.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "a symbolic link out of the folder" in refusal(snapshot, read_index)


def test_a_good_set(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "one.safetensors")
    (tmp_path / "below").mkdir()
    save_file({"c": torch.ones(4)}, tmp_path / "below" / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "below/two.safetensors"}
    sharded(tmp_path, weight_map, metadata={"total_size": 36, "nested": {"x": [1]}})
    index = read_index(tmp_path)
    assert index == read_index(tmp_path / INDEX)
    assert (index.weight_map, index.metadata) == (weight_map, {"total_size": 36, "nested": {"x": [1]}})
    for header in index.shards.values():
        assert_like_the_library(header)
    assert structural_issues(tmp_path) == structural_issues(tmp_path / INDEX) == []

    sharded(tmp_path, {"a": "one.safetensors"}, metadata={"total_size": 5})
    read_index(tmp_path)
    assert [(issue.severity, issue.what) for issue in structural_issues(tmp_path)] == [
        ("warning", "holds tensor 'b', which the index does not name"),
        ("warning", "metadata.total_size is 5, the shards hold 20 bytes"),
    ]


def test_a_defect_of_a_shard_names_the_shard(tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").write_bytes(save({"a": torch.ones(2)})[:-1])
    sharded(tmp_path, {"a": "s.safetensors", "b": "t.safetensors"})
    (tmp_path / "t.safetensors").write_bytes(LFS)
    assert "shard 's.safetensors', data: truncated" in refusal(tmp_path, read_index)
    errors = [(issue.where, issue.what) for issue in structural_issues(tmp_path)]
    assert errors[0] == ("shard 's.safetensors', data", "truncated: 1 of 8 bytes are missing at the end of the file")
    assert errors[1][0] == "shard 't.safetensors'"
    assert "a git-LFS pointer" in errors[1][1]
    assert "git lfs pull" in errors[1][1]


def test_a_folder_without_one_index(tmp_path: Path) -> None:
    assert "a folder with no *.safetensors.index.json" in refusal(tmp_path, read_index)
    for name in "ab":
        (tmp_path / f"{name}.safetensors.index.json").touch()
    assert "a folder with 2 *.safetensors.index.json: a.safetensors.index.json, b" in refusal(tmp_path, read_index)
