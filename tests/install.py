"""Builds the wheel and the sdist, and uses each from an environment of its own.

``make test-install``. Installs torch twice, so it is not part of the test suite.
``make release`` keeps the archives in ``dist``, has twine look at them, and writes the
version's part of CHANGELOG.md beside them.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

from lc3.version import __version__

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    {
        str(path.relative_to(ROOT))
        for folder in ("lc3", "lc3/hooks")
        for path in (ROOT / folder).rglob("*.py")
    }
)
USE = """
import torch, lc3
from lc3.hooks import ddp
x = torch.randn(1000)
frame, residual = lc3.encode(x, 1.5)
assert torch.equal(lc3.decode(frame, 1000) + residual, x)
print(f"lc3 {lc3.__version__} from {lc3.__file__}: {ddp.attach.__name__} is there")
"""


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command that must succeed."""
    subprocess.run([str(part) for part in command], cwd=cwd, check=True, timeout=900)


def check_contents(wheel: Path, sdist: Path) -> None:
    """Every module is in both archives, once, and nothing of the checkout besides."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if ".dist-info/" not in name]
    expected = sorted([*MODULES, "lc3/py.typed"])
    assert sorted(inside) == expected, f"wheel holds {sorted(inside)}"
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    for module in MODULES:
        source = module.replace("lc3/hooks/", "hooks/")
        assert names.count(source) == 1, f"sdist holds {source} not once: {names}"


def notes(changelog: str, version: str) -> str:
    """Return what the changelog says of a version.

    Raises:
        SystemExit: nothing.
    """
    found = re.search(
        rf"^## \[{re.escape(version)}\].*?\n(.*?)(?=^## \[|\Z)", changelog, re.M | re.S
    )
    if found is None or not found[1].strip():
        raise SystemExit(f"CHANGELOG.md has no section [{version}]; write one")
    return f"# lc3 {version}\n\n{found[1].strip()}\n"


def keep(archives: Sequence[Path], out: Path) -> None:
    """Check archives as PyPI does, and keep them with their notes."""
    run(sys.executable, "-m", "twine", "check", "--strict", *archives, cwd=ROOT)
    out.mkdir(exist_ok=True)
    for archive in archives:
        shutil.copy(archive, out)
    text = notes((ROOT / "CHANGELOG.md").read_text(), __version__)
    (out / "NOTES.md").write_text(text)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def main() -> None:
    """Build, look inside, install each archive into an empty environment, use it."""
    parser = argparse.ArgumentParser(prog="tests.install", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder to keep a release in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
        (wheel,) = folder.glob("*.whl")
        (sdist,) = folder.glob("*.tar.gz")
        check_contents(wheel, sdist)
        for archive in (wheel, sdist):
            home = folder / f"empty-{archive.suffix[1:]}"
            venv.create(home, with_pip=True)
            pip = (home / "bin/python", "-m", "pip", "--disable-pip-version-check")
            constraints = ROOT / "constraints.txt"
            run(*pip, "install", "-qq", "-c", constraints, archive, cwd=folder)
            run(home / "bin/python", "-W", "error", "-c", USE, cwd=folder)
            print(f"{archive.name}: installed and used")
        if options.out:
            keep([wheel, sdist], options.out.resolve())


if __name__ == "__main__":
    main()
