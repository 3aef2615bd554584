"""What is built and released: metadata, workflows, the source distribution, and what the pages say about installing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import fewbit

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSIONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
# No package index has fewbit yet. The first release sets this to True, and the pages may say `pip install fewbit`.
RELEASED = False


def workflow(name: str) -> dict:
    path = ROOT / ".github" / "workflows" / name
    if not path.exists():
        pytest.skip("not in a source distribution")
    return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)


def test_the_version_has_one_copy():
    assert "version" not in PROJECT["project"]
    source = PROJECT["tool"]["scikit-build"]["metadata"]["version"]["input"]
    found = re.findall(r'^__version__ = "(.+)"$', (ROOT / source).read_text(encoding="utf-8"), re.M)
    assert found == [fewbit.__version__]


def test_python_versions_agree():
    listed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert listed == VERSIONS
    assert PROJECT["project"]["requires-python"] == f">={VERSIONS[0]}"
    built = re.findall(r"cp3(\d+)-\*", PROJECT["tool"]["cibuildwheel"]["build"])
    assert [f"3.{minor}" for minor in built] == VERSIONS
    assert workflow("ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == VERSIONS


def test_only_the_release_of_a_tag_may_publish():
    jobs = workflow("release.yml")["jobs"]
    assert [name for name, job in jobs.items() if "permissions" in job] == ["publish"]
    publish = jobs["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/')"
    assert sorted(publish["needs"]) == ["sdist", "wheels"]
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")


def test_packages_named_in_messages_are_extras():
    """`pip install PACKAGE …` in a message also names what an extra of this project installs."""
    extras = PROJECT["project"]["optional-dependencies"]
    known = {re.split(r"[^\w-]", item)[0].lower() for items in extras.values() for item in items}
    seen = set()
    for path in sorted((ROOT / "src").rglob("*.py")):
        for words in re.findall(
            r"pip install ([\w -]+?)(?=[\"'`)]|\\n|$)", path.read_text(encoding="utf-8"), re.M
        ):
            seen |= set(words.split())
    assert {"gguf", "sentencepiece", "lm_eval", "accelerate", "peft", "triton"} <= seen
    assert seen <= known, seen - known


@pytest.mark.skipif(RELEASED, reason="the package index has it")
def test_nothing_says_to_install_from_an_index_before_there_is_a_release():
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    files += [
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "examples").rglob("*.py"),
        *(ROOT / "src").rglob("*.j2"),
    ]
    for path in files:
        found = re.search(
            r"(pip|pipx|uv|uv tool|uv pip) (install|add)( [^\s`]+)*? ['\"]?fewbit(?![\w./-])",
            path.read_text(encoding="utf-8"),
        )
        assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


@pytest.mark.slow
def test_the_source_distribution_builds_and_is_tested(tmp_path):
    """Its files are the ones that the build and the tests need; the wheel built from it has the compiled module."""
    run = {"check": True, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-m", "build", "--sdist", "-o", str(tmp_path), str(ROOT)], **run)
    archive = tmp_path / f"fewbit-{fewbit.__version__}.tar.gz"
    assert archive.stat().st_size < 8 << 20
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path, filter="data")
    assert not [name for name in names if name.startswith((".", "benchmarks/data", "site", "out", "build"))]
    assert {
        "CMakeLists.txt",
        "csrc/module.cpp",
        "src/fewbit/py.typed",
        "tests/conftest.py",
        "docs/index.md",
    } <= names
    unpacked = tmp_path / f"fewbit-{fewbit.__version__}"
    subprocess.run([sys.executable, "-m", "build", "--wheel", "-o", str(tmp_path), str(unpacked)], **run)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "installed"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)], **run
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    code = "import fewbit, fewbit.native as n; assert n.available(), n.unsupported_reason(); print(fewbit.__file__)"
    shown = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, **run).stdout
    assert shown.startswith(str(target))
    some = ["tests/test_layers.py", "tests/test_packaging.py", "tests/gptq"]
    subprocess.run([sys.executable, "-m", "pytest", "-n", "0", *some], env=environment, cwd=unpacked, **run)
