import itertools
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file

from fv_distill.export import read_original_checkpoint

NAMES = ["patch_embedding.weight", "blocks.0.self_attn.q.weight", "head.modulation"]
PREFIXES = ["_fsdp_wrapped_module.", "module.", "model."]
# Every subset of the prefixes in every order.
STACKS = ["".join(stack) for count in range(4) for stack in itertools.permutations(PREFIXES, count)]


def weights(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((2, 3), value + index) for index, name in enumerate(NAMES)}


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def assert_weights(actual, value):
    expected = weights(value)
    assert set(actual) == set(NAMES)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("entry", [None, "generator", "generator_ema", "model"])
@pytest.mark.parametrize("prefix", STACKS)
def test_every_nesting_and_stack_of_prefixes(tmp_path, entry, prefix):
    tensors = prefixed(prefix, weights(1.0))
    torch.save(tensors if entry is None else {entry: tensors, "step": 7}, tmp_path / "a.pt")
    read = read_original_checkpoint(tmp_path / "a.pt")
    assert_weights(read.weights, 1.0)
    assert read.others == ()
    # The same flat, as safetensors has it.
    save_file(prefixed("" if entry is None else f"{entry}.", tensors), tmp_path / "a.safetensors")
    assert_weights(read_original_checkpoint(tmp_path / "a.safetensors").weights, 1.0)


def test_wrappers_inside_names(tmp_path):
    tensors = weights(1.0)
    tensors["_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module._orig_mod.self_attn.q.weight"] = tensors.pop(
        NAMES[1]
    )
    torch.save({"generator": prefixed("model.", tensors)}, tmp_path / "a.pth")
    read = read_original_checkpoint(tmp_path / "a.pth").weights
    assert set(read) == set(NAMES)
    assert torch.equal(read[NAMES[1]], weights(1.0)[NAMES[1]])


@pytest.fixture
def training_checkpoint(tmp_path):
    """What a Self-Forcing run saves, with optimizer state and counters."""
    entries = {
        "generator": prefixed("model.", weights(1.0)),
        "critic": prefixed("model.", weights(2.0)),
        "generator_ema": prefixed("model._fsdp_wrapped_module.", weights(3.0)),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2), "step": 4}}, "param_groups": [{"lr": 1e-4}]},
        "step": 600,
    }
    torch.save(entries, tmp_path / "run.pt")
    return tmp_path / "run.pt"


def test_averaged_weights_are_preferred_and_it_is_told(training_checkpoint):
    read = read_original_checkpoint(training_checkpoint)
    assert_weights(read.weights, 3.0)
    assert read.entry == "generator_ema"
    assert read.others == ("generator", "critic", "optimizer")


@pytest.mark.parametrize(
    ("key", "value"), [("generator", 1.0), ("critic", 2.0), ("generator_ema", 3.0), ("critic.model", 2.0)]
)
def test_key_chooses(training_checkpoint, key, value):
    read = read_original_checkpoint(training_checkpoint, key=key)
    assert_weights(read.weights, value)
    assert read.entry == key


def test_keys_of_deeper_nesting(tmp_path):
    torch.save({"module": {"state": {"net": weights(1.0)}, "generator": weights(2.0)}}, tmp_path / "a.pt")
    assert_weights(read_original_checkpoint(tmp_path / "a.pt", key="state.net").weights, 1.0)
    assert_weights(read_original_checkpoint(tmp_path / "a.pt", key="module.state.net").weights, 1.0)
    assert_weights(read_original_checkpoint(tmp_path / "a.pt").weights, 2.0)


def test_a_training_checkpoints_model_is_an_entry(tmp_path):
    torch.save({"model": weights(1.0), "optimizer": {"exp_avg": torch.ones(1)}}, tmp_path / "a.pt")
    read = read_original_checkpoint(tmp_path / "a.pt")
    assert_weights(read.weights, 1.0)
    assert (read.entry, read.others) == ("model", ("optimizer",))


def test_an_unknown_key_lists_the_entries(training_checkpoint):
    with pytest.raises(ValueError, match=r"no entry 'student'; it has generator, critic, generator_ema, optimizer$"):
        read_original_checkpoint(training_checkpoint, key="student")


def test_the_same_name_with_and_without_prefix(tmp_path):
    torch.save({**weights(1.0), **prefixed("module.", weights(2.0))}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"holds patch_embedding\.weight twice"):
        read_original_checkpoint(tmp_path / "a.pt")


def write_shards(directory, *, index=True):
    directory.mkdir()
    shards = {"part-1.safetensors": NAMES[:2], "part-2.safetensors": NAMES[2:]}
    for file, names in shards.items():
        save_file({name: weights(1.0)[name] for name in names}, directory / file)
    if index:
        weight_map = {name: file for file, names in shards.items() for name in names}
        (directory / "w.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_put_together(tmp_path, index):
    directory = write_shards(tmp_path / "wan", index=index)
    assert_weights(read_original_checkpoint(directory).weights, 1.0)
    if index:
        assert_weights(read_original_checkpoint(directory / "w.safetensors.index.json").weights, 1.0)


def test_an_index_leaves_other_files_alone(tmp_path):
    directory = write_shards(tmp_path / "wan")
    save_file(weights(9.0), directory / "other.safetensors")
    assert_weights(read_original_checkpoint(directory).weights, 1.0)
    (directory / "w.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"1 more keys of part-1\.safetensors are in another file too"):
        read_original_checkpoint(directory)


def test_a_missing_shard_is_named(tmp_path):
    directory = write_shards(tmp_path / "wan")
    (directory / "part-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"not there: part-2\.safetensors"):
        read_original_checkpoint(directory)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", ".."])
def test_an_index_can_not_name_files_elsewhere(tmp_path, name):
    directory = write_shards(tmp_path / "wan")
    save_file(weights(9.0), tmp_path / "secret.safetensors")
    (directory / "w.safetensors.index.json").write_text(json.dumps({"weight_map": {NAMES[0]: name}}))
    with pytest.raises((ValueError, FileNotFoundError), match="other directories|not there"):
        read_original_checkpoint(directory)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(tmp_path, text):
    directory = write_shards(tmp_path / "wan")
    (directory / "w.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"w\.safetensors\.index\.json is no index"):
        read_original_checkpoint(directory)


def test_several_indices_are_ambiguous(tmp_path):
    directory = write_shards(tmp_path / "wan")
    shutil.copy(directory / "w.safetensors.index.json", directory / "v.safetensors.index.json")
    with pytest.raises(ValueError, match=r"several indices, give one: v\.safe.*, w\.safe"):
        read_original_checkpoint(directory)


def test_a_directory_of_other_things_lists_them(tmp_path):
    """Wan 2.2 A14B has its two networks in directories of their own."""
    for name in ("high_noise_model", "low_noise_model"):
        write_shards(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="give one of what is in it: high_noise_model, low_noise_model$"):
        read_original_checkpoint(tmp_path)


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, zipped):
    content = {"generator": weights(1.0), "surprise": Touch(tmp_path / "ran")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="not loaded, since unpickling runs code") as caught:
        read_original_checkpoint(tmp_path / "a.pt", key="generator")
    # torch's own message says how to switch the protection off.
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "b.pt").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="not loaded"):
        read_original_checkpoint(tmp_path / "b.pt")
    assert not (tmp_path / "ran").exists()
    # The test can fail: the pickle does run code where it is trusted.
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_the_old_torch_format_is_read(tmp_path):
    torch.save({"generator": weights(1.0)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_weights(read_original_checkpoint(tmp_path / "a.pt").weights, 1.0)


def test_pickled_parameters_come_without_gradients_from_disk(tmp_path, monkeypatch):
    torch.save({name: torch.nn.Parameter(value) for name, value in weights(1.0).items()}, tmp_path / "a.pt")
    load, seen = torch.load, {}
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: seen.update(kwargs) or load(*args, **kwargs))
    read = read_original_checkpoint(tmp_path / "a.pt").weights
    assert not any(value.requires_grad for value in read.values())
    assert seen == {"map_location": "cpu", "weights_only": True, "mmap": True}


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, world, these are no weights", None])
def test_broken_files_are_named(tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        (save_file if name.endswith("safetensors") else torch.save)(weights(1.0), path)
        content = path.read_bytes()[:-40]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is broken"):
        read_original_checkpoint(path)


@pytest.mark.parametrize("content", [{"step": 3}, [1, 2], {}])
def test_files_without_tensors(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_original_checkpoint(tmp_path / "a.pt")


def test_other_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        read_original_checkpoint(tmp_path / "none.pt")
    (tmp_path / "a.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.ckpt is no \.pt, \.pth or \.safetensors file"):
        read_original_checkpoint(tmp_path / "a.ckpt")
