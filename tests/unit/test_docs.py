"""README and docs: the files that they name exist, and the table of folders is complete."""

import re

import pytest

from common.config.file import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
_PATH = re.compile(r"(?:actors|common|deploy|docs|learner|tests)/[\w./-]*")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    named = {code for code in re.findall(r"`([^`\n]+)`", text) if _PATH.fullmatch(code)}
    missing = [name for name in sorted(named) if not (REPOSITORY / name).exists()]
    missing += [to for to in re.findall(r"\]\(([^)#:]+)[^)]*\)", text) if not (page.parent / to).exists()]
    assert missing == []


def table_of_folders() -> dict[str, str]:
    """What the README says is in each folder."""
    rows = re.findall(r"^\| (`[a-z].*?/`) \| (.+) \|$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    return {folder: text for folders, text in rows for folder in re.findall(r"`([\w/]+)/`", folders)}


def test_the_folder_table_has_every_room_and_names_files_that_are_there():
    table = table_of_folders()
    packages = {f.parent.relative_to(REPOSITORY) for f in REPOSITORY.glob("*/**/__init__.py")}
    rooms = {str(p) for p in packages if p.parts[0] in ("actors", "common", "deploy", "learner")}
    assert rooms - table.keys() == {"actors/sampler/kernels"}  # named in its parent's row
    for folder, text in table.items():
        for file in re.findall(r"`([\w./-]+\.\w+|\w+/)`", text):
            places = [f for f in table if text == table[f]]  # a row may have several folders
            assert any((REPOSITORY / place / file).exists() for place in places), (folder, file)


@pytest.mark.parametrize(
    ("wanted", "folder", "file", "holds"),
    [
        ("KL", "learner", "objective.py", "def divergence"),
        ("mask rule", "common", "masks.py", "def allowed"),
        ("publishing weights", "learner", "publish.py", "Gathering ZeRO-3 shards"),
        ("charts", "deploy/dashboard", "charts.py", "CHARTS"),
        ("manifest", "deploy", "checkpoints.py", "manifest.json"),
        ("Kubernetes job", "deploy/kuberay", "base/rayjob.yaml", "kind: RayJob"),
    ],
)
def test_the_folder_table_leads_to(wanted, folder, file, holds):
    assert wanted in table_of_folders()[folder] and f"`{file}`" in table_of_folders()[folder]
    assert holds in (REPOSITORY / folder / file).read_text()
