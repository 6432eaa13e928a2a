"""A wheel built from the repository carries the templates and the tuned configs, and works without the checkout."""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "moegen", "templates", "tuned_configs")

# Started with -S, so that no .pth file (an editable install, say) adds the checkout to the path.
IMPORT_FROM = "import sys; sys.path[:0] = {path!r}; import runpy; "


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: a build writes beside them, and old build folders would leak into it."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run_module(installed: Path, module: str, *arguments: str) -> str:
    """Standard output of `python -m module arguments` with the wheel and the environment's packages alone."""
    path = [str(installed), *site.getsitepackages()]
    code = f"{IMPORT_FROM.format(path=path)}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=installed, env=environment)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expected_files() -> set[str]:
    """Every source file of the package and both data folders, by its name in the wheel."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "moegen").rglob("*.py")}
    found |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "moegen").rglob("*.yaml")}
    for folder, patterns in (("templates", ("*.jinja", "*.md")), ("tuned_configs", ("*.json", "*.md"))):
        found |= {
            f"moegen/{path.relative_to(ROOT).as_posix()}"
            for pattern in patterns
            for path in (ROOT / folder).rglob(pattern)
        }
    return found


def test_content(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        licences = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
    assert set(names) == expected_files()
    assert len(licences) == 1
    assert "moegen/templates/package/_dispatch.py.jinja" in names
    assert "moegen/tuned_configs/README.md" in names


def test_build_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    run_module(installed, "moegen", "build", "--model", "olmoe-1b-7b", "-o", str(tmp_path))
    package = tmp_path / "moe_olmoe_1b_7b"
    assert (package / "manifest.json").is_file()
    assert (package / "_dispatch.py").is_file()

    probe = tmp_path / "probe.py"
    probe.write_text(
        "import moegen\nfrom moegen.render import data_folder\n"
        "for path in (moegen.__file__, data_folder('templates'), data_folder('tuned_configs')):\n    print(path)\n"
    )
    shutil.copy(probe, installed / "probe.py")
    for line in run_module(installed, "probe").splitlines():
        assert Path(line).is_relative_to(installed), line


def test_same_package_as_from_the_checkout(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moegen import emit
    from moegen.models import model_spec
    from moegen.plan import make_plan
    from moegen.render import data_folder

    run_module(installed, "moegen", "build", "--model", "olmoe-1b-7b", "-o", str(tmp_path))
    package = tmp_path / "moe_olmoe_1b_7b"
    emitted = {path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*") if path.is_file()}
    monkeypatch.setattr(emit, "data_folder", data_folder)  # published records as well
    here = emit.package_files(make_plan(model_spec("olmoe-1b-7b")))
    assert emitted.keys() == here.keys()
    assert emitted == here
