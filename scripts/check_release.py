"""Check what a release would give: the built wheel in an empty environment, its licenses, known flaws, its SBOM.

    python scripts/check_release.py                  # pinned versions; sbom.json and licenses.md in build/release
    python scripts/check_release.py --ends           # also the oldest and the newest versions that pyproject allows

Each environment is new, in a temporary folder. torch stays at the pinned version: an older one from an index is a
CUDA build of several gigabytes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parent.parent
TOOLS = ("build", "pip-audit", "pip-licenses", "cyclonedx-bom")
ENDS = ("transformers", "peft", "trl", "accelerate", "datasets", "pydantic", "click", "rich", "safetensors")
"""Libraries whose oldest and newest allowed versions are tried."""

PERMISSIVE = re.compile(
    r"MIT|BSD|Apache|ISC|PSF|Python|MPL|Mozilla|Zlib|CC0|0BSD|Unlicense|HPND|Academic Free", re.IGNORECASE
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ends", action="store_true", help="also try the oldest and the newest allowed versions")
    parser.add_argument("-o", "--output", type=Path, default=PROJECT / "build/release")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="peftchat-release-") as folder:
        work = Path(folder)
        tools = make_environment(work / "tools", TOOLS)
        wheel = build_wheel(tools, options.output)
        check_content(wheel)
        model = make_model(work)
        python = make_environment(work / "pinned", [str(wheel)], "--constraint", PROJECT / "constraints.txt")
        run_commands(python, work / "pinned-run", model)
        list_licenses(tools, python, options.output)
        write_sbom(tools, python, options.output)
        audit(tools, python)
        if options.ends:
            for name, requirements in (("oldest", oldest_versions()), ("newest", ENDS)):
                python = make_environment(work / name, [torch_pin(), *requirements, str(wheel)])
                print(f"{name}:", ", ".join(installed(python, ENDS)))
                run_commands(python, work / f"{name}-run", model)
    print(f"All checks passed; files are in {options.output}")


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def make_environment(folder: Path, requirements: Sequence[str], *arguments: object) -> Path:
    """Return the interpreter of a new environment with these requirements."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin/python"
    run(python, "-m", "pip", "install", "--quiet", *arguments, *requirements)
    return python


def build_wheel(tools: Path, output: Path) -> Path:
    for old in output.glob("*.whl"):
        old.unlink()
    # Built from the files that git knows, as from a clone.
    with tempfile.TemporaryDirectory() as folder:
        run("git", "-C", PROJECT, "checkout-index", "--all", f"--prefix={folder}/")
        run(tools, "-m", "build", "--outdir", output, folder)
    (wheel,) = output.glob("*.whl")
    print(f"built {wheel.name}, {wheel.stat().st_size:,} bytes")
    return wheel


def check_content(wheel: Path) -> None:
    """The wheel holds the package and the recipes, and nothing else of the project."""
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    recipes = {Path(name).name for name in names if "/share/peftchat/recipes/" in name}
    assert recipes == {path.name for path in (PROJECT / "recipes").glob("*.yaml")}, recipes
    foreign = [name for name in names if not name.startswith(("peftchat/", "peftchat-"))]
    assert not foreign, foreign


def make_model(work: Path) -> Path:
    """A tiny random model, made by the project's own environment: the empty one sees only its folder."""
    sys.path.insert(0, str(PROJECT))
    from tests.support.data import write_small_talk
    from tests.support.models import small_model

    write_small_talk(work / "talk.jsonl", 40)
    return Path(shutil.copytree(small_model(tied=True), work / "model"))


def run_commands(python: Path, folder: Path, model: Path) -> None:
    """Run the commands of a first day, in a folder that has nothing of the project."""
    folder.mkdir()
    peftchat = python.parent / "peftchat"
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def do(*arguments: object) -> str:
        return run(peftchat, *arguments, cwd=folder, env=environment).stdout

    names = [one["name"] for one in json.loads(do("recipes", "--json"))]
    assert names, "no recipe came with the wheel"
    do("init", "--method", "lora", "--model", model, "--data", model.parent / "talk.jsonl", "-o", "my.yaml")
    settings = ["--set", "data.max_length=128", "--set", "output_dir=run"]
    assert json.loads(do("plan", "my.yaml", "--json", *settings))["fits"]
    do("train", "my.yaml", *settings, "--set", "training.max_steps=2")
    do("merge", "run")
    assert (folder / "run/merged/model.safetensors").is_file()
    # A shipped recipe by its path, where no such folder is; only its model and data are others.
    do(
        "train", "recipes/lora_1gpu.yaml", "--set", f"model.name={model}", "--set", "data.max_length=128", "--set",
        f"data.train=[{{path: {model.parent / 'talk.jsonl'}}}]", "--set", "training.max_steps=1", "--set",
        "output_dir=shipped", "--set", "training.gradient_accumulation_steps=1",
    )  # fmt: skip
    print("recipes, init, plan, train, merge work in", python.parent.parent.name)


def list_licenses(tools: Path, python: Path, output: Path) -> None:
    done = run(tools.parent / "pip-licenses", f"--python={python}", "--format=json", "--from=mixed", "--with-urls")
    rows = sorted(json.loads(done.stdout), key=lambda row: row["Name"].lower())
    lines = ["| package | version | license |", "| --- | --- | --- |"]
    lines += [f"| {row['Name']} | {row['Version']} | {' '.join(row['License'].split())[:80]} |" for row in rows]
    (output / "licenses.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    others = [f"{row['Name']}: {row['License'][:80]}" for row in rows if not PERMISSIVE.search(row["License"])]
    print(f"licenses of {len(rows)} packages; to look at: {'; '.join(others) or 'none'}")


def write_sbom(tools: Path, python: Path, output: Path) -> None:
    run(tools.parent / "cyclonedx-py", "environment", python, "--output-file", output / "sbom.json")
    components = json.loads((output / "sbom.json").read_text())["components"]
    assert any(component["name"] == "torch" for component in components)
    print(f"SBOM of {len(components)} components (CycloneDX)")


def audit(tools: Path, python: Path) -> None:
    """Known flaws by pip-audit. An index without flaws' records answers 'could not be audited'."""
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    done = subprocess.run(
        [str(tools.parent / "pip-audit"), "--path", site, "--format", "json"], capture_output=True, text=True
    )
    if not done.stdout.strip():
        sys.exit(f"pip-audit ended with status {done.returncode}:\n{done.stderr}")
    found = json.loads(done.stdout)["dependencies"]
    unread = [one["name"] for one in found if "skip_reason" in one]
    flawed = [f"{one['name']} {one['version']}: {flaw['id']}" for one in found for flaw in one.get("vulns", [])]
    if len(unread) == len(found):
        print("audit: this index has no records of flaws, so nothing was audited")
    else:
        print(f"audit of {len(found)} packages: {len(flawed)} known flaws; not audited: {len(unread)}")
    if flawed:
        sys.exit("\n".join(flawed))


def declared() -> Iterator[Requirement]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return map(Requirement, project["dependencies"])


def oldest_versions() -> list[str]:
    """`name==V` for each `name>=V` of the libraries in `ENDS`."""
    lowest = {one.name: next(part.version for part in one.specifier if part.operator == ">=") for one in declared()}
    return [f"{name}=={lowest[name]}.*" for name in ENDS]


def torch_pin() -> str:
    text = (PROJECT / "constraints.txt").read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line.startswith("torch=="))


def installed(python: Path, names: Sequence[str]) -> list[str]:
    code = f"import importlib.metadata as m; print(*[f'{{n}} {{m.version(n)}}' for n in {list(names)!r}], sep='\\n')"
    return run(python, "-c", code).stdout.splitlines()


if __name__ == "__main__":
    main()
