"""Machine code on disk is that of today's sources, types and Numba."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]

KERNELS = """\
from lc3.codec.compiled import kernel
from called import STEP, twice

@kernel()
def count(x):
    return twice(x) + STEP
"""
CALLED = """\
from lc3.codec.compiled import kernel

STEP = {step}

@kernel()
def twice(x):
    return x * {times}
"""
PRINT = "from kernels import count; print(count(10), count(0.25))"
# Another rank starts while the first has compiled and writes its code.
MEANWHILE = f"""\
import subprocess, sys
from numba.core.caching import IndexDataCacheFile
save = IndexDataCacheFile._save_data
def after_another(self, name, data):
    IndexDataCacheFile._save_data = save
    subprocess.run([sys.executable, "-c", {PRINT!r}], check=True)
    save(self, name, data)
IndexDataCacheFile._save_data = after_another
{PRINT}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "kernels.py").write_text(KERNELS)
    write(tmp_path)
    return tmp_path


def write(folder: Path, step: int = 1, times: int = 2) -> None:
    (folder / "called.py").write_text(CALLED.format(step=step, times=times))


def start(
    folder: Path, code: str = PRINT, **environment: str
) -> "subprocess.Popen[str]":
    paths = {"PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(folder / "cache")}
    paths |= environment
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **paths, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]") -> tuple[str, str]:
    said, wrong = process.communicate(timeout=200)
    assert process.returncode == 0, wrong
    return said, wrong


def code_files(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_ino for file in folder.rglob("*.nbc")}


def test_what_another_file_says_is_compiled_in(folder: Path) -> None:
    assert ended(start(folder)) == ("21 1.5\n", "")
    kept = code_files(folder)
    assert ended(start(folder)) == ("21 1.5\n", "")
    assert code_files(folder) == kept
    assert len(kept) == 4  # two kernels of two types
    write(folder, step=5)
    assert ended(start(folder)) == ("25 5.5\n", "")
    write(folder, step=5, times=3)
    assert ended(start(folder)) == ("35 5.75\n", "")


def test_a_rank_that_starts_beside_another_runs_no_old_code(folder: Path) -> None:
    assert ended(start(folder)) == ("21 1.5\n", "")
    (folder / "kernels.py").write_text(KERNELS.replace("+ STEP", "- STEP"))
    assert ended(start(folder, MEANWHILE)) == ("19 -0.5\n" * 2, "")
    assert ended(start(folder)) == ("19 -0.5\n", "")


def test_ranks_that_start_together_with_other_types(folder: Path) -> None:
    both = (f"from kernels import count; print(count({x}))" for x in (10, 0.25))
    ranks = [start(folder, code) for code in both for _ in range(2)]
    ranks = [start(folder, MEANWHILE), *ranks]
    said = [ended(rank)[0] for rank in ranks]
    assert set(said.pop(0).splitlines()) == {"21 1.5"}
    assert said == ["21\n", "21\n", "1.5\n", "1.5\n"]
    assert ended(start(folder)) == ("21 1.5\n", "")


def test_damaged_code_is_compiled_anew(folder: Path) -> None:
    ended(start(folder))
    for file in code_files(folder):
        file.write_bytes(b"")
    said, wrong = ended(start(folder))
    assert said == "21 1.5\n"
    assert "damaged" in wrong
    assert ended(start(folder)) == ("21 1.5\n", "")


def test_code_of_versions_before_does_not_pile_up(folder: Path) -> None:
    code = (
        "from kernels import count; from lc3.codec import compiled;"
        "compiled.FILES_KEPT = 3; count(10); count(0.25)"
    )
    for step in range(4):
        write(folder, step=step, times=step)
        ended(start(folder, code))
    assert len(code_files(folder)) == 2 * 3
    assert ended(start(folder)) == ("33 3.75\n", "")


def test_a_numba_with_other_files_keeps_its_own_way(folder: Path) -> None:
    other = "from numba.core import caching; o = caching.IndexDataCacheFile;"
    other += "o.write = o._save_data; del o._save_data; import lc3.codec.compiled;"
    other += "o._save_data = o.write;"
    assert ended(start(folder, f"{other} {PRINT}")) == ("21 1.5\n", "")
    assert len(list(folder.rglob("*.nbi"))) == 2


def test_lc3_in_an_archive_keeps_its_code_on_disk_too(folder: Path) -> None:
    archive = folder / "lc3.zip"
    with ZipFile(archive, "w") as made:
        for path in (ROOT / "lc3").rglob("*.py"):
            made.write(path, path.relative_to(ROOT))
        made.write(folder / "kernels.py", "kernels.py")
        made.write(folder / "called.py", "called.py")
    (folder / "kernels.py").unlink()
    (folder / "called.py").unlink()
    code = f"import lc3; assert 'lc3.zip' in lc3.__file__; {PRINT}"
    environment = {"PYTHONPATH": str(archive), "HOME": str(folder)}
    for _ in range(2):
        process = start(folder, code, **environment)
        assert ended(process)[0] == "21 1.5\n"


def test_a_process_older_than_its_files_keeps_no_code_under_their_name(
    folder: Path,
) -> None:
    upgraded = CALLED.format(step=1, times=3)
    late = "from kernels import count; import pathlib;"
    late += f"pathlib.Path('called.py').write_text({upgraded!r});"
    assert ended(start(folder, f"{late} {PRINT}")) == ("21 1.5\n", "")
    assert ended(start(folder)) == ("31 1.75\n", "")


def test_without_a_compiler_kernels_are_functions(folder: Path) -> None:
    code = f"import lc3; {PRINT}"
    process = start(folder, code, NUMBA_DISABLE_JIT="1")
    assert ended(process) == ("21 1.5\n", "")


@pytest.mark.parametrize("fails", ["save", "folder"])
def test_a_disk_that_takes_nothing_only_costs_time(folder: Path, fails: str) -> None:
    full = "raise OSError(28, 'No space left on device')"
    if fails == "save":
        code = f"def no(*_): {full}\nfrom numba.core import caching;"
        code += f"caching.IndexDataCacheFile._save_data = no; {PRINT}"
    else:  # between import and the first call
        code = "import kernels, pathlib, shutil; shutil.rmtree('cache');"
        code += f"pathlib.Path('cache').touch(); {PRINT}"
    said, wrong = ended(start(folder, code))
    assert said == "21 1.5\n"
    assert "could not be kept" in wrong
    assert "NUMBA_CACHE_DIR" in wrong
