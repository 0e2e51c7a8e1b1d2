"""The library: built once, in the user's cache, and what is missing where it cannot be."""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from uniprune.errors import InputError
from uniprune.runtime import native
from uniprune.runtime.native import library

CHECK = Path(__file__).with_name("check_kernel.cpp")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "uniprune"
    native.library.cache_clear()


def compiler(folder, text):
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo some compiler 1; exit; fi\n{text}\n')
    path.chmod(0o755)
    return str(path)


def test_the_last_path_is_the_fastest_that_the_machine_has(compiled):
    assert compiled.paths[0] == "plain"
    if platform.machine() in ("aarch64", "arm64"):
        assert compiled.paths[-1] == "neon"
    else:
        assert compiled.paths == [path for path in native.PATHS if path in compiled.paths]


def test_without_a_compiler_a_sentence_says_so(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="needs a C\\+\\+ compiler once, and none of g\\+\\+, clang\\+\\+, c\\+\\+ is there"):
        native.library()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="CXX names 'no-such-compiler', which is not there"):
        native.library()


def test_a_cache_that_others_may_write_to_is_not_used(fresh, monkeypatch):
    fresh.mkdir(mode=0o700)
    assert native._folder() == fresh
    fresh.chmod(0o777)
    assert native._folder() != fresh
    fresh.rmdir()
    fresh.write_text("no folder")
    found = native._folder()
    assert found != fresh
    assert found.stat().st_mode & 0o077 == 0


def test_several_threads_build_it_once(fresh, monkeypatch, tmp_path):
    built = []

    def build(compiler, file):
        built.append(file)
        file.touch()

    monkeypatch.setattr(native, "_build", build)
    monkeypatch.setattr(native, "Library", lambda file: file)
    with ThreadPoolExecutor(8) as pool:
        assert len({*pool.map(lambda _: native.library(), range(32))}) == 1
    assert len(built) == 1


def test_what_a_compiler_complains_of_is_said_and_nothing_is_left(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler(tmp_path, 'echo "kernel.cpp:1: error: too old" >&2; exit 1'))
    with pytest.raises(InputError, match=r"does not compile .* kernel.cpp:1: error: too old; set CXX to another"):
        native.library()
    assert not list(fresh.iterdir())


def test_a_library_that_does_not_load_is_named(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler(tmp_path, 'for last; do :; done; echo nonsense > "$last"'))
    with pytest.raises(InputError, match=r"does not load .*; remove it"):
        native.library()


def test_it_is_built_once(fresh, monkeypatch, tmp_path, compiled):
    log = tmp_path / "log"
    real = shutil.which("g++") or shutil.which("clang++")
    monkeypatch.setenv("CXX", compiler(tmp_path, f'echo built >> {log}; exec {real} "$@" -O0'))
    for _ in range(2):
        assert native.library().paths[0] == "plain"
        native.library.cache_clear()
    assert log.read_text() == "built\n"
    assert len(list(fresh.iterdir())) == 1


def test_a_compiler_may_have_arguments(fresh, monkeypatch, tmp_path):
    """As build systems take ``CXX="ccache g++"``; others make another library."""
    real, log = shutil.which("g++") or shutil.which("clang++"), tmp_path / "log"
    monkeypatch.setenv("CXX", compiler(tmp_path, f'echo "$1" >> {log}; exec {real} "$@"') + " -O1")
    (tmp_path / "compiler").write_text(
        (tmp_path / "compiler").read_text().replace('[ "$1" = --version ]', '[ "$2" = --version ]')
    )
    assert library().paths
    assert log.read_text() == "-O1\n"
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    assert native._compiler() == [str(tmp_path / "compiler")]


def test_the_cache_of_another_source_or_compiler_is_another(fresh, monkeypatch, tmp_path):
    built = []
    monkeypatch.setattr(native, "_build", lambda compiler, file: built.append(file.name))
    monkeypatch.setattr(native, "Library", lambda file: file)
    for version, source in (("1", "a"), ("1", "b"), ("2", "a"), ("1", "a")):
        monkeypatch.setattr(native, "_version", lambda compiler, version=version: version)
        monkeypatch.setattr(native, "SOURCE", tmp_path / "source")
        (tmp_path / "source").write_text(source)
        native.library.cache_clear()
        native.library()
    assert len(set(built)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("machine", [None, "aarch64"])
def test_every_path_against_sums_in_double(tmp_path, machine):
    """In C++ alone, so that it also runs under an emulator: there NEON is tested on any machine that has one."""
    names = ("g++", "clang++") if machine is None else (f"{machine}-linux-gnu-g++",)
    found = next((one for name in names if (one := shutil.which(name))), None)
    emulator = [] if machine is None else [shutil.which(f"qemu-{machine}-static") or shutil.which(f"qemu-{machine}")]
    if found is None or None in emulator:
        pytest.skip("needs a compiler" if machine is None else f"needs {names[0]} and qemu-{machine}")
    static = ["-static"] if machine else []
    subprocess.run([found, "-O1", "-w", "-std=c++17", *static, str(CHECK), "-o", str(tmp_path / "check")], check=True)
    done = subprocess.run([*emulator, str(tmp_path / "check")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert ("neon" if machine else "plain") in done.stdout.split()
