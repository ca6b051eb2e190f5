"""Rules of the house that no tool checks: what the package may not call, what stands where, and that commands
exist."""

import ast
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    p
    for folder in ("nemo_embed_core", "kernels", "launch", "benchmarks")
    for p in (ROOT / folder).rglob("*.py")
)
LAUNCHERS = sorted((ROOT / "launch").glob("*.py"))

# ------------------------------------------------------------------------------------------ security

# torch.distributed.checkpoint: its metadata is a pickle that loading executes.
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_MODULES = PICKLES | {"torch.distributed.checkpoint"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "os.system", "os.popen", "torch.load", "torch.save", "torch.serialization.load"),
    *(
        "yaml.load",
        "yaml.load_all",
        "yaml.full_load",
        "yaml.unsafe_load",
        "pd.read_pickle",
        "pandas.read_pickle",
    ),
}


def _forbidden(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or "", *(f"{node.module}.{name}" for name in modules)]
            for module in modules:
                if any(module == name or module.startswith(f"{name}.") for name in FORBIDDEN_MODULES) or (
                    isinstance(node, ast.ImportFrom) and module in FORBIDDEN_CALLS
                ):
                    yield node.lineno, f"import of {module}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield node.lineno, f"{name}()"
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("allow_pickle", "trust_remote_code", "shell") and not is_false:
                    yield node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "from torch import load",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "exec(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_a_planted_danger_is_found(source: str) -> None:
    assert list(_forbidden(source))


def test_the_package_neither_reads_pickles_nor_runs_text() -> None:
    assert not list(_forbidden("model.eval()\nnp.load(path, allow_pickle=False)\nyaml.safe_load(text)"))
    found = [
        (f"{p.relative_to(ROOT)}:{line}", what) for p in SOURCES for line, what in _forbidden(p.read_text())
    ]
    # The process that proves an export loads it as its users will: our own remote code, or what
    # --trust-remote-code names.
    trusted = "nemo_embed_core/export/reload.py:"
    assert [what for where, what in found if where.startswith(trusted)] == ["trust_remote_code=trusted"] * 3
    found = [item for item in found if not item[0].startswith(trusted)]
    assert not found, "\n".join(map(": ".join, found))


# ----------------------------------------------------------------------------------------- one owner of files

# Durability, locks, digests of files and the reading of JSON have one home each: nemo_embed_core/files.
FILE_CALLS = {
    "os.fsync",
    "os.fdatasync",
    "os.replace",
    "hashlib.file_digest",
    "fcntl.flock",
    "fcntl.lockf",
    "json.load",
}
JSON_HOOKS = {"object_hook", "object_pairs_hook", "parse_constant", "parse_float", "parse_int"}


def _homemade_file_work(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield from (
                (node.lineno, n) for a in node.names if (n := f"{node.module}.{a.name}") in FILE_CALLS
            )
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in FILE_CALLS:
            yield node.lineno, name
        if hooks := JSON_HOOKS & {keyword.arg for keyword in node.keywords}:
            yield node.lineno, f"{name}({hooks.pop()}=...)"
        if name == "json.loads" and re.search(r"\.read(_text|_bytes)?\(", ast.unparse(node.args[0])):
            yield node.lineno, "json.loads of a file"


@pytest.mark.parametrize(
    "source",
    [
        "os.fsync(file.fileno())",
        "from os import fsync",
        "os.replace(temporary, path)",
        "hashlib.file_digest(file, 'sha256')",
        "fcntl.flock(descriptor, fcntl.LOCK_EX)",
        "json.load(file)",
        "json.loads(path.read_text(encoding='utf-8'))",
        "json.JSONDecoder(object_pairs_hook=pairs)",
    ],
)
def test_a_planted_second_owner_of_files_is_found(source: str) -> None:
    assert list(_homemade_file_work(source))


def test_files_are_made_durable_hashed_locked_and_read_as_json_in_one_place() -> None:
    assert not list(_homemade_file_work("json.loads(line)\nfsync(path)\nhashlib.sha256(text.encode())"))
    # They import nothing of ours and run where other versions of the libraries are installed.
    alone = [ROOT / "nemo_embed_core/export" / name for name in ("reload.py", "clients.py")]
    home = ROOT / "nemo_embed_core/files"
    ours = [p for p in SOURCES if "benchmarks" not in p.parts and home not in p.parents and p not in alone]
    found = [
        f"{p.relative_to(ROOT)}:{line}: {what}"
        for p in ours
        for line, what in _homemade_file_work(p.read_text())
    ]
    assert not found, "\n".join(found)


# ------------------------------------------------------------------------------------------ what stands where

TOP_LEVEL = {
    *(
        ".ci",
        ".dockerignore",
        ".gitignore",
        ".pre-commit-config.yaml",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Dockerfile",
        "LICENSE",
        "Makefile",
        "README.md",
        "SECURITY.md",
        "constraints.txt",
    ),
    *(
        "benchmarks",
        "configs",
        "csrc",
        "docs",
        "examples",
        "kernels",
        "launch",
        "mkdocs.yml",
        "nemo_embed_core",
        "pyproject.toml",
        "setup.py",
        "tests",
    ),
}


def _tracked() -> list[str]:
    result = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    return result.stdout.splitlines()


def test_top_level_is_as_fixed() -> None:
    assert {path.split("/")[0] for path in _tracked()} <= TOP_LEVEL
    assert not [name for name in sorted(TOP_LEVEL) if not (ROOT / name).exists()]


def test_no_catch_all_folder_and_no_binary_weights_are_tracked() -> None:
    for path in _tracked():
        assert not {"utils", "common", "helpers", "misc"} & set(path.split("/")[:-1]), path
        assert not path.endswith((".pt", ".pth", ".bin", ".pkl", ".npy", ".safetensors", ".ckpt")), path


def test_errors_are_not_swallowed_and_ignores_have_a_code() -> None:
    for path in SOURCES:
        source = path.read_text()
        assert not re.search(r"#\s*type:\s*ignore(?!\[)|#\s*noqa(?!:)", source), path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ExceptHandler):
                catches_all = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                is_empty = all(isinstance(s, ast.Pass | ast.Continue) for s in node.body)
                assert not (catches_all and is_empty), f"{path}:{node.lineno}"


# A file of the repository as texts name it: launch/train.py, configs/train-8b.yaml, docs/design.md.
_FILE = re.compile(
    r"(?<![\w/.-])((?:benchmarks|configs|csrc|docs|kernels|launch|nemo_embed_core|tests)/[\w./-]*\.\w+)"
)
_MODULE = re.compile(r"-m (benchmarks\.\w+)")


def test_files_named_in_texts_and_recipes_exist() -> None:
    texts = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("configs/*.yaml"),
        *ROOT.glob("launch/*"),
        ROOT / "Makefile",
    ]
    missing = []
    for path in (p for p in texts if p.is_file()):
        text = path.read_text()
        names = _FILE.findall(text) + [m.replace(".", "/") + ".py" for m in _MODULE.findall(text)]
        missing += [
            f"{path.relative_to(ROOT)}: {name}" for name in names if not (ROOT / name.rstrip(".")).exists()
        ]
    assert not missing, "\n".join(missing)


def test_benchmarks_that_make_runs_exist() -> None:
    (names,) = re.findall(r"^BENCHMARKS \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert not [name for name in names.split() if not (ROOT / "benchmarks" / f"{name}.py").is_file()]


def test_the_text_of_every_mutant_stands_in_its_file() -> None:
    gone = [f"{m.file}: {m.name}" for m in MUTANTS if m.old not in (ROOT / m.file).read_text()]
    assert not gone, "what make mutants would plant is not there any more"


def test_the_table_of_faults_is_what_the_tests_mark() -> None:
    text = (ROOT / "docs/checkpoint-format.md").read_text()
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", text, re.M)
    table = {(int(n), name) for n, _, names in rows for name in names.split(", ")}
    marked = set()
    files = {ROOT / "tests" / name for _, names, _ in rows for name in names.split(", ")}
    for path in files:
        for node in ast.parse(path.read_text()).body:
            marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", ())]
            numbers = [int(n) for n in re.findall(r"pytest\.mark\.fault\((\d+)\)", " ".join(marks))]
            marked |= {(n, getattr(node, "name", "")) for n in numbers}
    assert table == marked and {n for n, _ in table} == set(range(1, 26))
    written = {p for p in (ROOT / "tests").rglob("test_*.py") if "mark.fault(" in p.read_text()}
    assert written - {Path(__file__)} == files


# -------------------------------------------------------------------------------------- recipes and launchers


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_help_is_instant_and_imports_no_torch(path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'mteb', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'exit code {code}, imported {heavy}' if code or heavy else 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    # Of CPU: the machine may be busy.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 3, f"{seconds:.1f} s"


_WORK = "from nemo_embed_core.errors import user_errors\nwith user_errors():\n    "
_OTHER_PIPE = "import os; reader, writer = os.pipe(); os.close(reader); os.write(writer, b'x')"


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["launch/merge.py", "--help"], 0, r""),
        (["-m", "nemo_embed_core.cli", "--help"], 0, r""),
        (["-c", _WORK + "for i in range(9999): print(i)"], 128 + 13,
         r"stopped: the reader of stdout has ended\n"),
        (["-c", _WORK + "print(1, flush=True)"], 128 + 13, r"stopped: .*\n"),
        (["-c", _WORK + "raise SystemExit(print(1))"], 0, r""),
        (["-c", f"import sys; sys.stdout = sys.stderr\n{_WORK}{_OTHER_PIPE}"], 1,
         r"Traceback.*BrokenPipeError.*\n"),
    ],
)  # fmt: skip
def test_a_reader_that_has_ended_ends_the_work_without_a_traceback(
    arguments: list[str], code: int, said: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    env = {
        **os.environ,
        "PYTHONUNBUFFERED": "",
    }  # as in a user's shell: prints are written when the buffer is full
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=env, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.returncode == code
    assert re.fullmatch(said, result.stderr, re.DOTALL), result.stderr


_FAKE_SLURM = {
    "srun": "trap 'sleep 0.5; echo saved; exit 143' TERM; echo \"step $*\"; echo $$ > pid; "
    "for i in {1..400}; do sleep 0.05; done",
    "scancel": 'echo "scancel $*"; kill -TERM "$(cat pid)"',
    "scontrol": 'echo "scontrol $*"',
}


def test_slurm_job_passes_sigterm_to_the_ranks_waits_for_the_save_and_queues_again(tmp_path: Path) -> None:
    for name, body in _FAKE_SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-7]"}
    env |= {"SLURM_JOB_NUM_NODES": "8", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96"}
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "--output_dir", "runs/x y"]
    job = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.terminate()  # what --signal=B:TERM@120 does
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 143
    events = ["SIGTERM", "scancel --signal=TERM 7.0", "saved", "scontrol requeue 7"]
    assert [output.find(event) for event in events] == sorted(output.find(event) for event in events), output
    assert all(
        event in output for event in (*events, "--nnodes 8 --nproc-per-node 8", "--output_dir runs/x y")
    ), output


# ------------------------------------------------------------------------------------------ the import layers


@pytest.mark.parametrize(
    "where, line",
    [
        ("config/data.py", "import nemo_embed_core.data.prompts"),  # upwards
        ("train/__init__.py", "from nemo_embed_core.mine import topk"),  # between siblings
        ("kernels/swiglu.py", "import nemo_embed_core.config"),  # out of the second root
    ],
)
def test_a_planted_upward_import_is_refused(tmp_path: Path, where: str, line: str) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("nemo_embed_core", "kernels", "csrc", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tool = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    if not Path(tool[0]).is_file():
        pytest.skip("import-linter is not installed")
    clean = subprocess.run(tool, cwd=tmp_path, capture_output=True, text=True)
    assert clean.returncode == 0, clean.stdout + clean.stderr
    with (tmp_path / "nemo_embed_core" / where).open("a") as file:
        file.write(f"\n{line}\n")
    planted = subprocess.run(tool, cwd=tmp_path, capture_output=True, text=True)
    assert planted.returncode == 1 and "BROKEN" in planted.stdout, planted.stdout + planted.stderr


# Around the package, from top to bottom: a file imports what stands below it; none is left out.
AROUND = (
    ("tests/test_*.py", "tests/*/test_*.py"),
    ("tests/conftest.py", "tests/*/conftest.py", "tests/mutants.py", "tests/same_behaviour.py"),
    ("tests/crash.py",),  # runs that are killed, on
    ("tests/forked.py",),  # a server of forks, warmed by
    ("tests/grids.py", "tests/pipelines.py"),  # of
    ("tests/tiny.py", "tests/toy_*.py", "tests/fuzz.py"),  # toys
    ("tests/recipes.py",),  # what configs and pages say, for
    ("tests/kernels/checks.py", "tests/kernels/compile_sm90.py"),
    ("docs/*.py", "benchmarks/*.py"),
    ("benchmarks/step_runs.py",),  # pieces of step.py, on
    ("benchmarks/step_libraries.py",),
    ("benchmarks/step_peers.py",),
    ("benchmarks/step_ours.py", "benchmarks/step_parts.py", "benchmarks/step_report.py"),
    ("benchmarks/step_data.py",),
    (
        "benchmarks/ceilings.py",
        "benchmarks/intervals.py",
        "benchmarks/synthesis_server.py",
        "benchmarks/__init__.py",
        "docs/pages.py",
    ),  # below the others of their folder
    ("launch/*.py", "setup.py", ".ci/*.py"),
    ("nemo_embed_core/*.py", "kernels/*.py"),  # among themselves: import-linter's
    # Truths to compare with, and what runs elsewhere: they import nothing of ours.
    ("tests/oracle.py", "tests/golden.py", "tests/mine/reference.py", "tests/export/flash_stand_in.py"),
)
PACKAGE = len(AROUND) - 2


def _layer(path: str) -> int:
    fitting = [i for i, globs in enumerate(AROUND) if any(fnmatch(path, glob) for glob in globs)]
    assert fitting, f"{path}: give it a layer of AROUND"
    return fitting[-1]


def _imported_files(path: str, source: str, files: set[str]) -> set[str]:
    """Of `files`; a helper of the tests is imported by its bare name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in (name.replace(".", "/") for name in modules):
            found |= {f"{module}.py", f"{module}/__init__.py", f"tests/{module}.py"} & files
    return found - {path}


def _wrong_imports(path: str, source: str, files: set[str]) -> list[str]:
    layer = _layer(path)
    found = sorted(_imported_files(path, source, files))
    return [f"{path} imports {other}" for other in found if not layer < _layer(other) + (layer == PACKAGE)]


@pytest.mark.parametrize(
    "path, line",
    [
        ("tests/tiny.py", "from forked import Server"),  # upwards
        ("tests/oracle.py", "from nemo_embed_core.config import TrainConfig"),  # what it is to judge
        ("benchmarks/step.py", "from benchmarks import kernels"),  # between siblings
        ("launch/train.py", "import benchmarks.step"),
        ("nemo_embed_core/errors.py", "from launch import merge"),
        ("kernels/rope.py", "import tiny"),
    ],
)
def test_a_planted_import_around_the_package_is_refused(path: str, line: str) -> None:
    assert _wrong_imports(path, line, set(_tracked()))


def test_imports_around_the_package_point_one_way() -> None:
    files = {path for path in _tracked() if path.endswith(".py") and (ROOT / path).exists()}
    assert not [wrong for path in files for wrong in _wrong_imports(path, (ROOT / path).read_text(), files)]


# ---------------------------------------------------------------------------------- sizes, no line twice

PACKAGE_FILES = [p for p in SOURCES if ROOT / "benchmarks" not in p.parents and not p.is_symlink()]
LARGE = {"nemo_embed_core/parallel/liveness.py": "notes, watchdog and errors are one protocol over one store"}
OF_AN_OP = "a custom op's schema is its signature, and the public function names the same arguments"
TWICE = {  # file: first line
    "kernels/filter_scores.py: queries_QD: torch.Tensor,": OF_AN_OP,
    "kernels/rope.py: qkv_TE: torch.Tensor,": OF_AN_OP,
}


def test_files_stay_small() -> None:
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in PACKAGE_FILES}
    assert {name for name, count in lines.items() if count > 400} == LARGE.keys() and len(LARGE) <= 2, lines
    assert statistics.median(lines.values()) <= 130
    assert max(len(p.read_text().splitlines()) for p in LAUNCHERS) <= 60


def _twice(files: dict[str, str], length: int = 6) -> set[tuple[str, str]]:
    """(file, first line) of every run of equal lines that stands twice, but for spaces, comments, imports,
    brackets."""
    seen: dict[tuple[str, ...], tuple[str, int]] = {}
    found: set[tuple[str, str]] = set()
    for name, text in files.items():
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if len(line) > 3 and not line.startswith(("#", "import ", "from "))]
        reported = -1
        for i in range(len(lines) - length + 1):
            run = tuple(lines[i : i + length])
            if seen.setdefault(run, (name, i)) != (name, i):
                if i > reported:
                    found.add((name, lines[i]))
                reported = i + length
    return found


def test_six_lines_that_stand_twice_are_found() -> None:
    lines = "\n".join(f"value_{i} = {i}" for i in range(6))
    assert _twice({"a": lines, "b": f"def f():\n# why\n{lines}"}) == {("b", "value_0 = 0")}
    assert not _twice({"a": lines, "b": lines.replace("3", "4")})


def test_no_six_lines_stand_twice() -> None:
    files = (ROOT / path for path in _tracked() if path.endswith(".py"))
    found = _twice({str(p.relative_to(ROOT)): p.read_text() for p in files if p.exists()})
    assert {f"{name}: {line}" for name, line in found} == TWICE.keys()
