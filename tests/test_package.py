"""The package as others get it: built the standard way, installed elsewhere, used without the checkout."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from mstar_mega import __version__, cli, settings
from mstar_mega.config import Config
from mstar_mega.settings.shipped import first_comment, shipped_names

REPO = Path(__file__).parents[1]
NAME = f"mstar_mega-{__version__}"
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
SMALL = (
    *("--config", "smoke", "--data.warmup_examples", "48", "--warmup.epochs", "1", "--data.validation_queries", "4"),
    *("--data.test_queries", "4", "--annotate.queries", "4", "--data.labelled_queries", "8", "--evolve.interval", "1"),
)


def call(command: Sequence[object], **options: object) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1800, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``python -m build`` makes it: the wheel from the sdist, not from the checkout."""
    folder = tmp_path_factory.mktemp("build")
    listed = call(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO).splitlines()
    for name in listed:
        source, target = REPO / name, folder / "clone" / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    call([sys.executable, "-c", BUILD, "build_sdist", folder], cwd=folder / "clone")
    with tarfile.open(folder / f"{NAME}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    call([sys.executable, "-c", BUILD, "build_wheel", folder], cwd=folder / NAME)
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.skipif(not (REPO / ".git").exists(), reason="needs the list of files that git keeps")
def test_the_wheel_from_the_sdist_has_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        there = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA"))
    listed = call(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO).splitlines()
    rooms = {"kernels/": "kernels/", "checkpoint_tools/": "checkpoint_tools/", "examples/configs/": "configs/"}
    wanted = {name for name in listed if name.startswith("mstar_mega/") and not (REPO / name).is_symlink()}
    wanted |= {
        f"mstar_mega/{ours}{name.removeprefix(room)}"
        for room, ours in rooms.items()
        for name in listed
        if name.startswith(room)
    }
    assert {"mstar_mega/kernels/top_p.py", "mstar_mega/configs/digits.yaml", "mstar_mega/report/template.html"} < there
    assert there == wanted
    assert "Requires-Python: >=3.10,<3.14" in metadata and "Operating System :: POSIX :: Linux" in metadata


@pytest.mark.skipif(not (REPO / ".git").exists(), reason="needs the list of files that git keeps")
def test_an_installed_wheel_does_everything_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment: the wheel's own files, and the libraries (not the package) of this one."""
    home, here = tmp_path / "env", tmp_path / "elsewhere"
    venv.create(home, with_pip=False, symlinks=True)
    here.mkdir()
    libraries = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    call([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", libraries, wheel])
    # Added by a plain line, so that the .pth files there, the checkout's among them, are not read.
    (libraries / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    python = home / "bin" / "python"
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}

    def mstar(*arguments: object) -> str:
        return call([python, "-m", "mstar_mega", *arguments], cwd=here, env=environment)

    found = call([python, "-c", "import mstar_mega; print(mstar_mega.__file__)"], cwd=here, env=environment)
    assert Path(found.strip()).is_relative_to(libraries)
    assert mstar("--version") == f"mstar {__version__}\n"
    assert "smoke.yaml" in mstar("init", "smoke") and (here / "smoke.yaml").is_file()
    said = mstar("evolve", *SMALL, "--run.dir", "run")
    assert "report:  run/report.html" in said and (here / "run" / "summary.json").is_file()
    assert "all parameters" in mstar("inspect", "run")
    mstar("convert", "megatron-to-hf", "--checkpoint", "run", "--out", "hf")
    assert (here / "hf" / "model.safetensors").is_file() or list((here / "hf").glob("*.safetensors"))
    (here / "run" / "report.html").unlink()
    assert mstar("report", "run").strip().endswith("report.html") and (here / "run" / "report.html").is_file()


# -- configs by name -------------------------------------------------------------------------------------------------


def test_a_shipped_config_goes_by_its_name_and_a_file_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = settings.parse(["--config", str(REPO / "examples/configs/digits.yaml")])
    assert settings.parse(["--config", "digits"]) == digits != Config()
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("seed: 7\n")  # a file of that name is the user's
    assert settings.parse(["--config", "digits"]).seed == 7
    for text, said in (
        ("digts", "did you mean 'digits'? If not, there are digits, easy_vqa"),
        ("examples/configs/smoke.yaml", "did you mean --config smoke?"),
        ("mine.yaml", "cannot read the settings file mine.yaml: No such file or directory"),
    ):
        with pytest.raises(ValueError, match="^") as raised:
            settings.parse(["--config", text])
        assert said in str(raised.value)


def test_init_copies_a_config_and_never_over_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "smoke"]) == 0
    assert "mstar evolve --config smoke.yaml" in capsys.readouterr().out
    assert settings.parse(["--config", "smoke.yaml"]) == settings.parse(["--config", "smoke"])
    Path("smoke.yaml").write_text("seed: 3\n")
    assert cli.main(["init", "smoke"]) == cli.main(["init", "smok"]) == 2
    said = capsys.readouterr().err
    assert "smoke.yaml is there already" in said and "there is no config 'smok'; did you mean 'smoke'?" in said
    assert Path("smoke.yaml").read_text() == "seed: 3\n"
    assert cli.main(["init", "digits", "mine.yaml"]) == 0 and Path("mine.yaml").is_file()


def test_every_shipped_config_says_what_it_is_for() -> None:
    assert {"digits", "smoke", "internvl2_2b"} <= set(shipped_names())
    for name in shipped_names():
        assert len(first_comment(name)) > 10, name


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["evole"], "there is no command 'evole': did you mean 'evolve'?"),
        (["generate", "{run}", "--question", "hi", "--temprature", "1"], "did you mean '--temperature'?"),
        (["report", "{run}/empty"], "is not the directory of a run"),
        (["init", "--help-me"], "mstar init --help"),
    ],
)
def test_what_is_mistyped_gets_a_suggestion(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.yaml").write_text(settings.dump(Config()))
    assert cli.main([argument.replace("{run}", str(tmp_path)) for argument in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_without_megatron_core_one_line_says_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(self: object, arguments: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'megatron.core'", name="megatron.core")

    monkeypatch.setattr("mstar_mega.commands.Command.run", missing)
    assert cli.main(["evolve"]) == 2
    assert "megatron-core is not installed" in (said := capsys.readouterr().err) and "Python 3.10 to 3.13" in said


@pytest.mark.parametrize("start", ["module", "bash"])
def test_a_users_mistake_on_several_ranks_is_one_line_and_exit_code_2(start: str, tmp_path: Path) -> None:
    launcher = REPO / "examples" / "pretrain_mstar.sh"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "TORCHRUN")}
    environment |= {"NPROC": "2", "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                    "VIRTUAL_ENV": str(Path(sys.executable).parents[1])}  # fmt: skip
    module = [sys.executable, "-m", "mstar_mega.launch", "--standalone", "--nproc-per-node", "2"]
    command = ["bash", str(launcher)] if start == "bash" else [*module, "-m", "mstar_mega", "evolve"]
    done = subprocess.run(
        [*command, "--sed", "1"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "mstar: error: unknown setting '--sed' on the command line; did you mean '--seed'?\n"


def test_a_mistake_is_told_where_rank_0_was_ended_before_it_could(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(
        "import os, sys, time\nfrom mstar_mega.cli import main\n"
        "if os.environ['RANK'] == '0':\n    time.sleep(300)\nsys.exit(main(['evolve', '--sed', '1']))\n"
    )
    launch = [sys.executable, "-m", "mstar_mega.launch", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "late.py")], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mstar: error: unknown setting '--sed' on the command line; did you mean '--seed'?\n"


def test_a_rank_that_breaks_down_is_still_reported(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import sys\nsys.exit(3)\n")
    command = [sys.executable, "-m", "mstar_mega.launch", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*command, str(tmp_path / "broken.py")], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 1 and "rank 0 on " in done.stderr and "failed with exit code 3" in done.stderr
