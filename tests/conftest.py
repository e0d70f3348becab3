"""Eight virtual CPU devices, explicit broadcasting, and shapes checked at every call of the package."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read at import: no question about the kind of a bucket
os.environ["FSSPEC_GCS_TOKEN"] = "anon"  # likewise: no search for credentials

import jax
import pytest
import tensorstore
from etils.epath import backend as epath_backend
from gcs import FakeGcs
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

# Under nohup, and in the background of a script, these are ignored, also in the processes that tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("cfd", "beartype.beartype")

# Most tests spend their time in XLA:CPU's compiler. Without its fusion emitters, LLVM's optimizations and the division
# of a program into 32 parts, it takes an eighth of the time for a small U-Net. tiny.EMITTERS and tiny.DEFAULTS undo
# this for a program, `quick_tests_alone` for the package's own, and `XLA_FLAGS= pytest` for all.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
        "--xla_cpu_parallel_codegen_split_count=1"
    )
    jax.devices()  # XLA reads the variable
    del os.environ["XLA_FLAGS"]  # the processes that tests start are as those of users


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Equal programs are compiled once for all tests of a process, though each test jits its own functions.

    Programs that compile within 0.1 s are not kept: to read the smallest ones takes longer than to compile them.
    """
    values = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


# The package is imported late here and below, because modules that are imported before the hook are not checked.
@pytest.fixture(scope="session", autouse=True)
def quick_tests_alone() -> Iterator[None]:
    """The package's own programs are compiled as for users."""
    from tiny import EMITTERS

    from cfd.devices import xla

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "CPU_OPTIONS", EMITTERS | xla.CPU_OPTIONS)
        xla.compiler_options.cache_clear()
        yield
    xla.compiler_options.cache_clear()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcs]:
    """An empty bucket on loopback, to which all clients go, in this process and in those that it starts."""
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is in the extra `test`")
    with FakeGcs() as gcs:
        for name, value in gcs.environment.items():
            monkeypatch.setenv(name, value)
        # All keep one client for the whole process, which would go on asking the bucket of an earlier test.
        monkeypatch.setattr("cfd.runs.files._MEMORY", tensorstore.Context())
        epath_backend.fsspec_backend._get_filesystem.cache_clear()
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield gcs
        epath_backend.fsspec_backend._get_filesystem.cache_clear()
        gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of compiled programs, which the jobs of all tests of a process share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[[int, int], Path]:
    """The folders of runs that nothing interrupted: see `jobs.references`."""
    import jobs

    return jobs.references(tmp_path_factory, cache)


@pytest.fixture
def start(cache: Path) -> Iterator[Any]:
    """A `jobs.Start`, whose processes end with the test."""
    import jobs

    with jobs.starting(cache) as start:
        yield start


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run when they are asked for by `-m`. Every test allows gcsfs to send a large body at once."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning"))
    if config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with `pytest -m slow`"))
