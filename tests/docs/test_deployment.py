"""Files for containers and schedulers: what they name exists, and what they rely on holds."""

import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from peftchat.interruption import Interrupted
from tests.support.cli import PROJECT

SCRIPTS = sorted((PROJECT / "scripts/slurm").glob("*.sbatch"))
DOCKERFILE = (PROJECT / "docker/Dockerfile").read_text(encoding="utf-8")


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


def test_what_the_image_copies_is_there_and_is_sent() -> None:
    sent = [line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for line in instructions("COPY") for source in line.split()[:-1]]
    assert {"peftchat", "recipes", "constraints.txt", "pyproject.toml"} <= set(copied) == set(sent)
    assert all((PROJECT / source).exists() for source in copied)


def test_the_image_does_not_run_as_root_and_names_its_command() -> None:
    assert instructions("USER") == ["1000:1000"]
    assert instructions("ENTRYPOINT") == ['["peftchat"]']
    assert '"doctor", "--quick"' in instructions("HEALTHCHECK")[0]


def test_the_services_build_the_image() -> None:
    compose = yaml.safe_load((PROJECT / "docker/compose.yaml").read_text(encoding="utf-8"))
    for service in compose["services"].values():
        build = service["build"]
        assert (PROJECT / "docker" / build["context"] / build["dockerfile"]).resolve() == PROJECT / "docker/Dockerfile"
        assert build.get("args", {}).keys() <= {line.split("=")[0] for line in instructions("ARG")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_job_is_queued_again_by_the_statuses_of_a_stop(script: Path) -> None:
    text = script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    statuses = set(map(int, re.findall(r'"\$status" -eq (\d+)', text)))
    assert statuses == {Interrupted(number).status for number in (signal.SIGUSR1, signal.SIGTERM)}
    assert "--resume" in text and "scontrol requeue" in text
