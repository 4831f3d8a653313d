"""Small files with large numbers, or many of something: time and memory follow what is really there.

As a program it prints the figures: `python -m tests.checkpoint.test_bounds`.
"""

from __future__ import annotations

import io
import json
import pickle
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import pytest
import typer.main
from optstate_cli import app

from optstate.checkpoint.document.document import DocumentError
from optstate.checkpoint.document.document_json import from_json
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.dtypes import MAX_COUNT, MOST_DIMENSIONS
from optstate.checkpoint.files.opened_file import reading
from optstate.checkpoint.files.safetensors_check import structural_issues
from optstate.checkpoint.files.safetensors_header import read_header
from optstate.checkpoint.files.safetensors_index import read_index
from optstate.checkpoint.operations.summarize import summarize
from optstate.memory.errors import SourceError
from optstate.memory.sources.config import of_config_file
from tests.support.fuzzing import damaged_json, safetensors_of

pytestmark = pytest.mark.slow

COMMAND = typer.main.get_command(app)
SECONDS = 2.0
"""Of the processor's time. A machine that is shared, and slow for that, may take a few times as long."""

PATIENCE = 4
MEMORY = 200 << 20


def document(groups: int, per_group: int = 1, shape: tuple[int, ...] = (1,), **changes: Any) -> str:
    names = [f"p{i}" for i in range(groups * per_group)]
    tree = {
        "format_version": 1,
        "recipe": "adamw",
        "groups": [
            {"hyper": {"lr": 0.1}, "parameters": names[g * per_group : (g + 1) * per_group]} for g in range(groups)
        ],
        "parameters": [
            {
                "name": name,
                "shape": list(shape),
                "dtype": "float32",
                "group": i // per_group,
                "step": 3,
                "chain": "scale_by_adam",
                "weights": "Plain()",
                "slots": {"exp_avg": {"store": "Full()", "signed": True, "fields": {"": f"{name}/exp_avg"}}},
            }
            for i, name in enumerate(names)
        ],
        "clip_grad_norm": None,
        "source": {"tool": "optstate"},
        "history": [],
    }
    return json.dumps({**tree, **changes})


def native(path: Path, text: str, count: int, shape: tuple[int, ...] = (1,)) -> Path:
    entries = {
        f"p{i}/exp_avg": {"dtype": "F32", "shape": list(shape), "data_offsets": [4 * i, 4 * i + 4]}
        for i in range(count)
    }
    path.write_bytes(safetensors_of(json.dumps({"__metadata__": {"optstate": text}, **entries}), bytes(4 * count)))
    return path


def weights(path: Path, count: int) -> Path:
    entries = {
        f"model.layers.{i}.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
        for i in range(count)
    }
    safetensors_header = json.dumps(entries, separators=(",", ":"))
    path.write_bytes(safetensors_of(safetensors_header, bytes(4 * count)))
    return path


def many_groups(folder: Path) -> Path:
    return native(folder / "groups.safetensors", document(8_000), 8_000)


def many_dimensions(folder: Path) -> Path:
    shape = (1,) * 16_000
    return native(folder / "dimensions.safetensors", document(1, shape=shape), 1, shape)


def dimensions_of_a_parameter(folder: Path) -> Path:
    return native(folder / "parameter.safetensors", document(1, shape=(1,) * 16_000), 1)


def long_history(folder: Path) -> Path:
    history = [{"tool": "optstate", "rows": [[i]] * 3} for i in range(20_000)]
    return native(folder / "history.safetensors", document(1, history=history), 1)


def many_tensors(folder: Path) -> Path:
    return weights(folder / "tensors.safetensors", 50_000)


def many_in_a_set(folder: Path) -> Path:
    weights(folder / "a.safetensors", 50_000)
    weight_map = {f"model.layers.{i}.weight": "a.safetensors" for i in range(50_000)}
    path = folder / "set.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def long_key(folder: Path) -> Path:
    """A folder of torch.distributed.checkpoint with a name of a hundred thousand parts."""
    metadata = sys.modules.get("torch.distributed.checkpoint.metadata")
    if metadata is None:
        import torch.distributed.checkpoint.metadata as metadata
    (folder / "dcp").mkdir()
    said = metadata.Metadata({"state." + "a." * 100_000 + "exp_avg": metadata.BytesStorageMetadata()})
    said.storage_data = {}
    (folder / "dcp" / ".metadata").write_bytes(pickle.dumps(said, 2))
    return folder / "dcp"


MADE: dict[str, Callable[[Path], Path]] = {
    make.__name__.replace("_", " "): make
    for make in (
        many_groups,
        many_dimensions,
        dimensions_of_a_parameter,
        long_history,
        many_tensors,
        many_in_a_set,
        long_key,
    )
}


def peak() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def commanded(*arguments: Any) -> tuple[int, str, float, int]:
    """A command's exit code, what it complains of, its processor time and by how much memory grew beyond all before."""
    out, err = io.StringIO(), io.StringIO()
    began, before = time.process_time(), peak()
    with redirect_stdout(out), redirect_stderr(err):
        code = COMMAND.main([str(argument) for argument in arguments], "optstate", standalone_mode=False) or 0
    return code, err.getvalue(), time.process_time() - began, peak() - before


@pytest.fixture(scope="module", params=MADE)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the small files."""
    return MADE[request.param](tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("command", ["inspect", "check"])
def test_small_files_take_little_time(made: Path, command: str) -> None:
    code, complaint, seconds, grown = commanded(command, made, "--json")
    print(f"{command} of {made.name}: {seconds:.2f} s, {grown >> 20} MiB, exit code {code}")
    assert (code in (0, 1) and complaint == "") or (code == 3 and complaint.count("\n") == 1)
    assert seconds < SECONDS * PATIENCE
    assert grown < MEMORY


def best(action: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        began = time.process_time()
        action()
        times.append(time.process_time() - began)
    return min(times)


@pytest.mark.parametrize("what", ["groups", "tensors"])
def test_time_grows_as_the_file_does(what: str, tmp_path: Path) -> None:
    """Eight times as much takes about eight times as long; what was quadratic took 64 times."""
    if what == "groups":
        small, large = (document(count) for count in (500, 4_000))
        ratio = best(lambda: from_json(large)) / best(lambda: from_json(small))
    else:
        paths = [weights(tmp_path / f"{count}.safetensors", count) for count in (2_500, 20_000)]
        ratio = best(lambda: summarize(paths[1])) / best(lambda: summarize(paths[0]))
    assert ratio < 24


def test_a_header_is_taken_apart_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    from optstate.checkpoint.files import safetensors_header

    members = safetensors_header.members
    monkeypatch.setattr(
        safetensors_header, "members", lambda text, streamed: (parsed.append(text), members(text, streamed))[1]
    )
    path = native(tmp_path / "a.safetensors", document(1), 1)
    assert commanded("check", path)[:2] == (0, "")
    assert len(parsed) == 1
    (tmp_path / "set").mkdir()
    assert commanded("check", many_in_a_set(tmp_path / "set"))[:2] == (0, "")
    assert len(parsed) == 2


def test_what_is_kept_within_a_reading_has_the_same_findings(tmp_path: Path) -> None:
    """A warning is told to everyone who asks, not only to the first."""
    text = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}}'
    (tmp_path / "a.safetensors").write_bytes(safetensors_of(text, bytes(4)))
    with reading():
        safetensors_header = read_header(tmp_path / "a.safetensors")
        assert [issue.severity for issue in structural_issues(tmp_path / "a.safetensors")] == ["warning"]
        assert structural_issues(tmp_path / "a.safetensors") == structural_issues(tmp_path / "a.safetensors")
        assert read_header(tmp_path / "a.safetensors") == safetensors_header
    set_of = many_in_a_set(tmp_path)
    with reading():
        assert read_index(set_of) == read_index(set_of)


# --- headers as they are usually written, and all others ----------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_usual_headers_are_read_as_others_are(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that are decoded together and one by one, in other spaces, too: sound and damaged headers read alike."""
    random = Random(seed)
    entries, at = {}, 0
    for i in range(random.randrange(1, 6)):
        shape = [random.choice([0, 1, 2, 3]) for _ in range(random.randrange(4))]
        size = 4
        for n in shape:
            size *= n
        entries[random.choice(["a", "block-0.c", "é", "__m"]) + str(i)] = {
            "dtype": random.choice(["F32", "I32", "U32", "F64"]) if seed % 2 else "F32",
            "shape": shape,
            "data_offsets": [at, at + size + (random.random() < 0.1)],
        }
        at += size
    if seed % 3 == 0:
        entries["__metadata__"] = {"k": "v"}  # type: ignore[assignment]
    compact = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    spaced = json.dumps(entries, indent=1, ensure_ascii=False)
    found = []
    for text, stride in ((compact, 1 << 14), (compact, seed), (spaced, 1 << 14)):
        monkeypatch.setattr("optstate.checkpoint.files.strict_json.STRIDE", stride)
        path = tmp_path / "a.safetensors"
        path.write_bytes(safetensors_of(text, bytes(at)))
        try:
            safetensors_header = read_header(path)
            found.append(
                [
                    [e.name, e.dtype, e.shape, e.start - safetensors_header.data_start, e.nbytes]
                    for e in safetensors_header.tensors
                ]
            )
        except CheckpointError as error:
            found.append([error.reason])
    assert found[0] == found[1] == found[2]


# --- numbers in documents and configs -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [MAX_COUNT + 1, 10**30, 10**400, -1])
@pytest.mark.parametrize("place", ["shape", "step", "group", "block"])
def test_counts_in_documents(place: str, number: int) -> None:
    tree = json.loads(document(1))
    if place == "block":
        tree["parameters"][0]["slots"]["exp_avg"]["block"] = number
    else:
        tree["parameters"][0][place] = [number] if place == "shape" else number
    with pytest.raises(DocumentError) as caught:
        from_json(json.dumps(tree))
    assert len(str(caught.value)) < 300


def test_dimensions_in_documents() -> None:
    assert len(from_json(document(1, shape=(1,) * MOST_DIMENSIONS)).parameters[0].shape or ()) == MOST_DIMENSIONS
    with pytest.raises(DocumentError, match="1001 dimensions: at most 1000 are read"):
        from_json(document(1, shape=(1,) * (MOST_DIMENSIONS + 1)))


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "num_labels": 3,
    "eos_token_id": [1, 2],
    "rope_theta": 1e6,
    "hidden_act": "silu",
}
NEO = {
    "model_type": "gpt_neo",
    "architectures": ["GPTNeoForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
}


def config(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(tree))
    return path


def test_labels_are_nothing_to_a_language_model(tmp_path: Path) -> None:
    began, before = time.process_time(), peak()
    plain = of_config_file(config(tmp_path, {**LLAMA, "num_labels": 2}), "float32")
    labelled = of_config_file(config(tmp_path, {**LLAMA, "num_labels": 10**9}), "float32")
    assert plain.parameters == labelled.parameters
    assert time.process_time() - began < 15  # with the import of transformers
    assert peak() - before < (1 << 30)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({**NEO, "attention_types": [[["global"], 10**9]]}, "attention_types has 1000000000"),
        ({**LLAMA, "num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers has 1000000000"),
        ({**LLAMA, "text_config": {"inner": {"num_hidden_layers": 10**6}}}, "num_hidden_layers is 1000000"),
        ({**LLAMA, "anything": 10**13}, "anything has 10000000000000"),
        ({**LLAMA, "num_hidden_layers": 10**400}, "it must be a whole number"),
    ],
)
def test_numbers_in_configs(tree: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        of_config_file(config(tmp_path, tree), "float32")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_model_of_too_many_modules_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optstate.memory.sources.causal_lm.MOST_MODULES", 20)
    with pytest.raises(SourceError, match="more than 20 modules"):
        of_config_file(config(tmp_path, LLAMA), "float32")


def configs(count: int, folder: Path) -> tuple[float, int, Counter[str]]:
    """The slowest of so many damaged configs, by how much memory grew, and what they came to."""
    of_config_file(config(folder, LLAMA), "float32")
    of_config_file(config(folder, NEO), "float32")
    slowest, before, outcomes = 0.0, peak(), Counter[str]()
    for number in range(count):
        random = Random(number)
        text = damaged_json(json.dumps(random.choice([LLAMA, NEO])), random)
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        began = time.process_time()
        try:
            of_config_file(folder / "config.json", "float32")
            outcomes["result"] += 1
        except SourceError as error:
            outcomes["refused" if str(error).isprintable() else f"not printable: {text}"] += 1
        slowest = max(slowest, time.process_time() - began)
    return slowest, peak() - before, outcomes


def test_damaged_configs(tmp_path: Path) -> None:
    slowest, grown, outcomes = configs(120, tmp_path)
    print(f"120 damaged configs: {outcomes}, slowest {slowest:.2f} s, {grown >> 20} MiB")
    assert outcomes.keys() == {"result", "refused"}
    assert min(outcomes.values()) > 20
    assert slowest < SECONDS * PATIENCE
    assert grown < MEMORY


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        for name, make in MADE.items():
            (Path(place) / name).mkdir()
            path = make(Path(place) / name)
            for command in ("inspect", "check"):
                code, _, seconds, grown = commanded(command, path, "--json")
                print(f"{command} of {name}: {seconds:.2f} s, {grown >> 20} MiB, exit code {code}", flush=True)
        slowest, grown, outcomes = configs(600, Path(place))
        print(f"600 damaged configs: {outcomes}, slowest {slowest:.2f} s, {grown >> 20} MiB", flush=True)


if __name__ == "__main__":
    main()
