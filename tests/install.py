"""Builds the wheel and the sdist, and uses each from an environment of its own.

``make test-install``. Installs torch twice, so it is not part of the test suite.
"""

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("lc3", "lc3/codec", "lc3/hooks")
    for path in (ROOT / folder).glob("*.py")
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


def main() -> None:
    """Build, look inside, install each archive into an empty environment, use it."""
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


if __name__ == "__main__":
    main()
