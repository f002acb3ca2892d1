"""Interrupted, refused and failed merges leave nothing that loads and is wrong."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peftchat.errors import UserError, VerificationError
from peftchat.merging import MergeOptions, merge_run
from tests.support.adapters import VOCABULARY, load, make_base, tensors_of, train_by_noise
from tests.support.cli import PROJECT, peftchat, start


@pytest.fixture
def run(tmp_path: Path) -> Path:
    base = make_base(tmp_path / "base", "llama")
    train_by_noise(base, tmp_path / "run", LoraConfig(r=4, target_modules="all-linear"))
    return tmp_path / "run"


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def damage_base(run: Path, how: str) -> None:
    shards = sorted((run.parent / "base").glob("*.safetensors"))
    if how == "missing shard":
        shards[2].unlink()
    elif how == "truncated shard":
        os.truncate(shards[2], shards[2].stat().st_size - 10)
    elif how == "truncated header":
        os.truncate(shards[2], 20)
    elif how == "no weights":
        for file in (run.parent / "base").glob("*.safetensors*"):
            file.unlink()
    elif how == "no config":
        (run.parent / "base" / "config.json").unlink()
    elif how == "no base":
        shutil.rmtree(run.parent / "base")
    elif how == "quantized base":
        config = run.parent / "base" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"bits": 4}}))
    elif how == "other base, shapes":
        shutil.rmtree(run.parent / "base")
        make_base(run.parent / "base", "llama", hidden_size=32)
    elif how == "other base, architecture":
        shutil.rmtree(run.parent / "base")
        make_base(run.parent / "base", "gpt2")


def damage_adapter(run: Path, how: str) -> None:
    file = run / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    if how == "empty tensors":
        save_file({name: torch.zeros(0) for name in tensors}, file)
    elif how == "missing key":
        save_file({name: value for name, value in tensors.items() if name != first}, file)
    elif how == "extra key":
        save_file({**tensors, first.replace("layers.0", "layers.7"): tensors[first].clone()}, file)
    elif how == "truncated adapter":
        os.truncate(file, file.stat().st_size - 10)
    elif how == "no adapter":
        file.unlink()
    elif how == "pickled adapter":
        file.rename(file.with_name("adapter_model.bin"))
    elif how == "no adapter config":
        (run / "adapter_config.json").unlink()
    elif how == "broken adapter config":
        (run / "adapter_config.json").write_text("{")


BASE_PROBLEMS = {
    "missing shard": "missing",
    "truncated shard": "damaged",
    "truncated header": "damaged",
    "no weights": "no safetensors",
    "no config": "config",
    "no base": "base model",
    "quantized base": "quantized",
    "other base, shapes": "does not fit",
    "other base, architecture": "does not fit",
}
ADAPTER_PROBLEMS = {
    "empty tensors": "no elements",
    "missing key": "missing",
    "extra key": "no place",
    "truncated adapter": "damaged",
    "no adapter": "missing",
    "pickled adapter": "pickled",
    "no adapter config": "adapter_config",
    "broken adapter config": "cannot be read",
}


@pytest.mark.parametrize("how", [*BASE_PROBLEMS, *ADAPTER_PROBLEMS])
def test_bad_input_is_one_error_and_nothing_written(how: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    damage_base(run, how)
    damage_adapter(run, how)
    before = sorted(run.iterdir())
    with pytest.raises(UserError, match={**BASE_PROBLEMS, **ADAPTER_PROBLEMS}[how]):
        merge_run(run, MergeOptions())
    assert sorted(run.iterdir()) == before


def test_an_adapter_for_a_smaller_vocabulary_grows_the_base_and_one_for_other_rows_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    train_by_noise(base, tmp_path / "run", config, rows=VOCABULARY + 4)
    assert merge_run(tmp_path / "run", MergeOptions()).report.vocabulary == VOCABULARY + 4
    larger = make_base(tmp_path / "larger", "llama", vocab_size=VOCABULARY + 8)
    shutil.rmtree(base)
    larger.rename(base)
    with pytest.raises(UserError, match="does not fit"):
        merge_run(tmp_path / "run", MergeOptions(output=tmp_path / "out"))


def test_an_existing_folder_is_kept_unless_asked(run: Path) -> None:
    first = merge_run(run, MergeOptions(verify=False))
    before = files(first.folder)
    with pytest.raises(UserError, match="already there"):
        merge_run(run, MergeOptions(scale=0.5))
    assert files(first.folder) == before
    merge_run(run, MergeOptions(scale=0.5, overwrite=True))
    assert files(first.folder) != before
    assert sorted(file.name for file in run.glob("merged*")) == ["merged"]


def test_a_wrong_result_is_marked_and_does_not_load(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spoil a written weight between writing and proof: the proof must see it."""
    from peftchat.merging import merge

    honest = merge.check_written

    def spoil(folder: Path, plan: object) -> None:
        honest(folder, plan)  # type: ignore[arg-type]
        shard = next(file for file in folder.glob("*.safetensors") if "down_proj" in str(load_file(file).keys()))
        tensors = load_file(shard)
        name = next(name for name in tensors if "down_proj" in name)
        save_file({**tensors, name: tensors[name] * 1.02}, shard, metadata={"format": "pt"})

    monkeypatch.setattr(merge, "check_written", spoil)
    with pytest.raises(VerificationError, match="does not compute"):
        merge_run(run, MergeOptions())
    assert [folder.name for folder in run.glob("merged*")] == ["merged.failed"]
    assert json.loads((run / "merged.failed" / "merge_report.json").read_text())["verification"]["passed"] is False
    with pytest.raises((OSError, ValueError)):
        load(run / "merged.failed")


def test_values_that_are_not_finite_fail(run: Path) -> None:
    file = run / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="not finite"):
        merge_run(run, MergeOptions())
    assert not (run / "merged").exists()


def test_a_full_disk_is_one_message_and_a_second_start_finishes(run: Path) -> None:
    result = peftchat("merge", run, "--no-verify", file_size_limit=30_000)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.count("Error:") == 1 and "cannot write" in result.stderr
    assert not (run / "merged").exists()
    merge_run(run, MergeOptions())


def test_a_small_disk(run: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        result = peftchat("merge", run, "-o", disk / "out", "--no-verify")
        assert result.returncode == 2 and "No space left" in result.stderr and "Traceback" not in result.stderr
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_target_that_is_not_a_folder(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="is a file, not a folder"):
        merge_run(run, MergeOptions(output=tmp_path / "file" / "out"))


def test_killed_at_any_moment_nothing_wrong_loads_and_a_second_start_gives_the_same_bytes(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", hidden_size=128, num_hidden_layers=6, shard="60KB")
    run, turns = tmp_path / "run", 20
    train_by_noise(base, run, LoraConfig(r=4, target_modules="all-linear"))
    wanted = files(merge_run(run, MergeOptions(output=tmp_path / "wanted", verify=False)).folder)
    assert len(wanted) > 20
    killing = start("-m", "tests.support.merge_kill", run, tmp_path, turns, cwd=PROJECT)
    stdout, stderr = killing.communicate()
    assert killing.wait() == 0, stderr
    assert int(stdout) >= turns // 2, "most merges were over before they were killed"
    for turn in range(turns):
        out = tmp_path / f"out{turn}"
        partial = tmp_path / f"out{turn}.partial"
        if not out.exists():
            # What loaders look for is either not there yet, or stands beside the finished shards.
            assert not (partial / "config.json").exists() or shards(files(partial)) == shards(wanted)
            merge_run(run, MergeOptions(output=out, verify=False))
        found = files(out)
        assert shards(found) == shards(wanted) and found.keys() == wanted.keys()
        assert not partial.exists()


def shards(content: dict[str, bytes]) -> dict[str, bytes]:
    return {name: value for name, value in content.items() if ".safetensors" in name}


def tensor_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if ".safetensors" in file.name}


def test_a_second_start_keeps_finished_shards_and_drops_changed_ones(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftchat.merging import merge

    def stop(folder: Path, plan: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(merge, "write_index", stop)
        with pytest.raises(KeyboardInterrupt):
            merge_run(run, MergeOptions())
    shards = sorted((run / "merged.partial").glob("*.safetensors"))
    shards[0].write_bytes(b"spoiled")
    result = merge_run(run, MergeOptions())
    assert result.report.resumed_shards == len(shards) - 1
    assert tensors_of(result.folder).keys() == tensors_of(run.parent / "base").keys()


def test_two_merges_do_not_share_a_folder(run: Path) -> None:
    partial = run / "merged.partial"
    partial.mkdir()
    (partial / "theirs").write_text("work of another process")
    with FileLock(partial / ".lock"), pytest.raises(UserError, match="another merge"):
        merge_run(run, MergeOptions())
    assert (partial / "theirs").exists()


def test_a_layer_that_peft_cannot_merge_leaves_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    model = get_peft_model(load(base), LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True))
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(UserError, match="cannot merge"):
        merge_run(tmp_path / "run", MergeOptions())
    assert not list((tmp_path / "run").glob("merged*"))


def test_another_plan_starts_from_scratch(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftchat.merging import merge

    with monkeypatch.context() as patched:
        patched.setattr(merge, "write_index", lambda folder, plan: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge_run(run, MergeOptions(scale=0.5))
    assert merge_run(run, MergeOptions()).report.resumed_shards == 0


@pytest.mark.parametrize("size", ["2KB", "64KB"])
def test_a_small_working_set_gives_the_same_bytes(size: str, run: Path) -> None:
    wanted = tensor_files(merge_run(run, MergeOptions(verify=False)).folder)
    result = merge_run(run, MergeOptions(output=run / "small", memory_budget=int(size[:-2]) << 10))
    for name, content in tensor_files(result.folder).items():
        assert json.loads(content) if name.endswith("json") else len(content) == len(wanted[name])
    for name, value in tensors_of(result.folder).items():
        torch.testing.assert_close(value, tensors_of(run / "merged")[name], atol=1e-6, rtol=1e-6)


def test_a_method_that_needs_whole_tensors_says_how_much(tmp_path: Path) -> None:
    import peft

    base = make_base(tmp_path / "base", "llama")
    train_by_noise(base, tmp_path / "run", peft.LoHaConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="in one piece"):
        merge_run(tmp_path / "run", MergeOptions(memory_budget=1024))


def test_full_runs_and_models_have_nothing_to_merge(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    with pytest.raises(UserError, match="nothing to merge"):
        merge_run(base, MergeOptions())
