"""The kernels/ arrangement (docs/design.md): our folder never stands in for the PyPI package `kernels`, and
is in the wheel.

transformers probes find_spec("kernels") and imports from what it finds. Ours has no __init__.py and is
imported as nemo_embed_core.kernels through a symlink; each test guards one way of losing that.
"""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nemo_embed_core"
LINKED = ("kernels", "launch")  # through symlinks, without an __init__.py


def _python(code: str, cwd: Path, *path: Path) -> str:
    """What `code` prints in a fresh Python started in cwd with `path` as PYTHONPATH."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path))} if path else {}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("name", ["kernels", "csrc", "launch"])
def test_folder_is_reached_through_a_committed_symlink(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink(), (
        f"{link} must be a symlink to ../{name}; on Windows: git config core.symlinks true"
    )
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert not (ROOT / name / "__init__.py").exists(), (
        "with an __init__.py it shadows the PyPI package of that name"
    )


def test_our_folder_is_no_module_in_the_repository_root() -> None:
    found = _python("import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)", ROOT)
    assert not found.startswith(str(ROOT)), found


def test_an_installed_kernels_package_wins_over_our_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'the real one'\n")
    code = "import kernels, nemo_embed_core.kernels as ours; print(kernels.name, *ours.__path__)"
    assert _python(code, ROOT, ROOT, tmp_path) == f"the real one {PACKAGE / 'kernels'}"


@pytest.mark.slow
def test_transformers_works_in_the_repository_root() -> None:
    code = (
        "from transformers import LlamaConfig, LlamaModel; "
        "from transformers.utils import is_kernels_available;"
        "LlamaModel(LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, "
        "num_hidden_layers=1,"
        "vocab_size=8)); import importlib.metadata as m;"
        "print(is_kernels_available() and not [d for d in m.distributions() if d.name == 'kernels'])"
    )
    assert _python(code, ROOT) == "False"


def _setup_packages() -> set[str]:
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "packages":
            return set(ast.literal_eval(node.value))
    raise AssertionError("setup.py has no packages=[...]")


def test_setup_lists_every_package() -> None:
    folders = {path.parent for name in ("**", *LINKED) for path in PACKAGE.glob(f"{name}/*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert _setup_packages() == names and "nemo_embed_core.kernels" in names


def test_every_package_but_linked_ones_has_an_init() -> None:
    for name in _setup_packages() - {f"nemo_embed_core.{name}" for name in LINKED}:
        assert (ROOT / name.replace(".", "/") / "__init__.py").is_file(), name


def test_kernels_import_nothing_but_torch_and_triton() -> None:
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                allowed = top in {"torch", "triton"} or name.startswith("nemo_embed_core.kernels")
                assert allowed or top in sys.stdlib_module_names, f"{path.name}:{node.lineno}: {name}"


def test_launchers_carry_no_name_of_the_standard_library() -> None:
    """`python launch/x.py` puts launch/ first on sys.path: launch/select.py would break `import torch`."""
    names = {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert names and not names & sys.stdlib_module_names
    assert not names & {"torch", "numpy", "datasets", "mteb", "transformers", "tokenizers", "triton"}


def _cli(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemo_embed_core.cli", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_runs_the_launchers_under_its_own_name() -> None:
    result = _cli("evaluate", "--help")
    assert result.returncode == 0 and "usage: nemo-embed evaluate " in result.stdout, (
        result.stdout + result.stderr
    )
    assert "--ignore_identical_ids" in result.stdout
    result = _cli("mine", "--threshold", "3")  # its exit code and its one paragraph
    assert result.returncode == 2 and "threshold=3" in result.stderr and "Traceback" not in result.stderr
    for argv in ([], ["demo"], ["tain"]):
        result = _cli(*argv)
        assert result.returncode == 2 and "give one of prepare, train, mine, merge, evaluate" in result.stderr


def test_wheel_carries_kernels_and_csrc_and_imports_outside_the_repository(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml"):
        copy(ROOT / name, source)
    for name in ("nemo_embed_core", "kernels", "csrc", "launch"):
        copytree(ROOT / name, source / name, symlinks=True, ignore=ignore_patterns("__pycache__"))
    # No build isolation: the environment's setuptools, and so no network in a test.
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(tmp_path / "unpacked")
    for folder, patterns in (
        ("kernels", ("*.py",)),
        ("launch", ("*.py",)),
        ("csrc", ("*.cu", "*.cuh", "*.h", "*.cpp")),
    ):
        for path in (path for pattern in patterns for path in (ROOT / folder).glob(pattern)):
            assert f"nemo_embed_core/{folder}/{path.name}" in names
    assert not [name for name in names if name.startswith(("kernels/", "csrc/", "tests/", "launch/"))]
    assert "nemo_embed_core/py.typed" in names
    help_of_train = "import sys, nemo_embed_core.cli as c; sys.argv[1:] = ['train', '--help']; c.main()"
    assert "--global_batch_size" in _python(help_of_train, tmp_path, tmp_path / "unpacked")
    code = "from nemo_embed_core.kernels import info_nce as m, swiglu; print(m.__file__)"
    assert _python(code, tmp_path, tmp_path / "unpacked").startswith(str(tmp_path / "unpacked"))
