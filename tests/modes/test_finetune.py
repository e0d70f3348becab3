"""`--init_from`: a new run begins with another run's weights, says what it takes, and refuses what does not fit."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import flip_weights, opened, same_bits
from jobs import assert_same_run, starting, wait_for_step
from jobs import losses as losses_of
from linear import init, squares
from meshes import mesh_of
from ml_collections import ConfigDict
from tiny import tiny_config

from cfd.convert import adm
from cfd.convert.adm_network import Network
from cfd.devices import parallel
from cfd.fields import NETWORK
from cfd.loading import load, load_ema
from cfd.losses import eps_loss
from cfd.modes import finetune, settings, train
from cfd.modes.finetune import Source, Start, from_weights
from cfd.modes.fit import fit
from cfd.modes.settings import optimizer_of
from cfd.modes.train_step import initial_state
from cfd.networks.model import module
from cfd.runs import checkpoint, workdir


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))


def random_params(config: Any, seed: int = 0) -> Any:
    """Parameters of the network of a config, without its initialisation, most of which is 0."""
    net = module(dict(config.model), config.data.image_size)
    size = config.data.image_size
    shapes = jax.eval_shape(
        net.init, jax.random.key(0), jnp.zeros((1, size, size, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes["params"])


def make_run(folder: Path, config: Any, names: Any = tuple("0123456789"), *steps: int, kind: str = "diffusion") -> Path:
    """The folder of a run whose EMA at step s is `random_params(config, s)`."""
    content = workdir.describe(kind, config.to_dict(), names)
    workdir.write_config(folder, content)
    with opened(folder, keep=9) as manager:
        for step in steps or (3,):
            state = {"ema": random_params(config, step)}
            checkpoint.save(manager, step, state, data_state={}, config_json=workdir.read_config(folder))
    return folder


def import_run(folder: Path, config: Any, params: Any) -> Path:
    """The folder of a run that `cfd.convert adm` would write for the network of a config."""
    fields = {name: config.model[name] for name in (*NETWORK, "out_channels")}
    schedule = config.model.time.removeprefix("adm_")
    adm._write_run(folder, Network("diffusion", fields, config.data.image_size, "new", schedule), params, 1)
    return folder


def losses(config: Any, params: Any) -> tuple[float, float]:
    """The mean losses of ε(z, c) and of ε(z, ∅) on the first images, with the same noise for any parameters."""
    data = settings.open_split(config, "train")
    images = np.stack([data[i][0] for i in range(256)])
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1 if images.dtype == np.uint8 else jnp.asarray(images)
    net = module(dict(config.model), 8)

    @jax.jit
    def mean(params: Any, labels: Any) -> Any:
        def eps_fn(z: Any, logsnr: Any, labels: Any) -> Any:
            return net.apply({"params": params}, z, logsnr, labels)

        keys = jax.random.split(jax.random.key(0), 8)
        return jnp.mean(jax.lax.map(lambda key: eps_loss(key, eps_fn, x, labels, p_uncond=0.0), keys))

    labels = jnp.asarray(data.labels[:256])
    return float(mean(params, labels)), float(mean(params, jnp.full_like(labels, -1)))


def test_an_imported_conditional_network_learns_the_null_label(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Label dropout trains ε(z, ∅), and ε(z, c) stays as good as the loss allows.

    Training lowers J = (1 - p) L_c + p L_∅, therefore L_c rises by at most p / (1 - p) of what L_∅ falls by.
    """
    p = 0.1
    fields: Any = dict(model__time="adm_cosine", train__batch_size=32, train__checkpoint_every_steps=1000)
    fields |= dict(train__ema_decay=0.9, train__learning_rate=2e-3, train__log_every_steps=1000)
    conditional = tiny_config(**fields, train__p_uncond=0.0, train__num_steps=120)
    train.train(conditional, str(tmp_path / "conditional"))
    source = import_run(tmp_path / "adm", conditional, load(tmp_path / "conditional").params)
    with pytest.raises(ValueError, match="unconditional"):
        load(source).eps_fn(jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.array([-1]))
    capsys.readouterr()

    jointly = tiny_config(**fields, train__p_uncond=p, train__num_steps=120)
    train.train(jointly, str(tmp_path / "joint"), init_from=str(source))
    said = capsys.readouterr().out
    assert f"Beginning with the EMA weights of {source}, step 0." in said
    assert "Its λ range was [-19.8359, 10.095]; that of this run is [-20, 20]." in said
    assert "10 of 10 classes take their weights from the source by their number, because an imported" in said

    cond, uncond = losses(jointly, load(source).params)
    new_cond, new_uncond = losses(jointly, load(tmp_path / "joint").params)
    print(f"conditional {cond:.4f} -> {new_cond:.4f}, unconditional {uncond:.4f} -> {new_uncond:.4f}")
    assert new_uncond < 0.9 * uncond and uncond - new_uncond > cond - new_cond
    assert new_cond < cond + p / (1 - p) * (uncond - new_uncond)


def test_a_run_begins_with_the_weights_that_it_is_given(tmp_path: Path) -> None:
    """A learning rate near 0 shows them: parameters and EMA are equal to them, and the optimizer is fresh."""
    config = tiny_config(train__learning_rate=1e-30, train__num_steps=1)
    given = {"w": np.full((64, 4), 0.5, np.float32), "b": np.arange(4, dtype=np.float32)}

    def start_from(fresh: Any) -> Any:
        place = lambda x, value: jax.make_array_from_callback(x.shape, x.sharding, lambda index: value[index])  # noqa: E731
        return jax.tree.map(place, fresh, given)

    dataset = settings.open_split(config, "train")
    content = workdir.describe("diffusion", config.to_dict(), dataset.class_names)
    training, optimizer = settings.training_of(config, config.train), optimizer_of(config.train)
    args: Any = (training, str(tmp_path), mesh_of(2, 4), dataset, content, init, squares, optimizer, None)
    fit(*args, start_from=start_from)
    template = jax.eval_shape(lambda key: initial_state(init, optimizer, key), jax.random.key(0))
    with opened(tmp_path) as manager:
        restored = checkpoint.restore(manager, parallel.with_shardings(mesh_of(1), template))
    assert restored is not None
    state = restored[1]
    assert same_bits(jax.tree.map(np.asarray, (state.params, state.ema)), (given, given)) and int(state.step) == 1


def started(config: Any, source: Path, names: tuple[str, ...], fresh: Any) -> Any:
    ema = load_ema(source, "diffusion")
    return from_weights(Start(Source(str(source), ema.step, ema.weights_hash), lambda: ema), config, names)(fresh)


def test_classes_of_the_same_name_keep_their_weights_and_others_are_fresh(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    theirs, ours = ("ant", "bee", "cat"), ("bee", "dog", "ant", "eel")
    fields: Any = dict(data__source="folder", data__path="-", sample__classes=())
    source = make_run(tmp_path / "run", tiny_config(data__num_classes=3, **fields), theirs)
    config = tiny_config(data__num_classes=4, **fields)
    fresh = random_params(config, 7)
    divided = parallel.with_shardings(mesh_of(2, 4), jax.eval_shape(lambda: fresh))
    shardings = jax.tree.map(lambda x: x.sharding, divided)
    params = started(config, source, ours, jax.device_put(fresh, shardings))
    assert "2 of 4 classes take their weights from the source; new: dog, eel." in capsys.readouterr().out
    assert jax.tree.map(lambda x: x.sharding, params) == shardings

    weights = load(source).params
    table, old, new = (tree["embed"]["label"]["embedding"] for tree in (params, weights, fresh))
    np.testing.assert_array_equal(table, np.stack([old[1], new[1], old[0], new[3]]))
    for tree in (params, weights):
        del tree["embed"]["label"]
    assert same_bits(params, weights)


def test_an_imported_network_of_another_number_of_classes_gives_none_of_them(tmp_path: Path, capsys: Any) -> None:
    imported = tiny_config(model__time="adm_cosine")
    source = import_run(tmp_path / "adm", imported, random_params(imported))
    config = tiny_config(data__source="folder", data__num_classes=3, sample__classes=(), model__time="adm_cosine")
    fresh = random_params(config, 7)
    params = started(config, source, ("0", "1", "2"), fresh)
    assert "0 of 3 classes take their weights from the source; new: 0, 1, 2." in capsys.readouterr().out
    assert same_bits(params["embed"]["label"], fresh["embed"]["label"])
    assert same_bits(params["conv_in"], load(source).params["conv_in"])


def test_a_learned_variance_is_left_behind(tmp_path: Path) -> None:
    """Its outputs are the second half, whose weights a run that learns no variance does not have."""
    config = tiny_config(model__time="adm_cosine")
    params = random_params(config)
    kept = jax.tree.map(lambda x: jnp.concatenate([x, x + 1], axis=-1), params["conv_out"])
    config_kept: Any = ConfigDict(config.to_dict())
    config_kept.model.out_channels = 2
    source = import_run(tmp_path / "adm", config_kept, params | {"conv_out": kept})
    finetune.check(config, str(tmp_path / "new"), str(source))
    assert same_bits(started(config, source, tuple("0123456789"), random_params(config, 7)), params)


@pytest.fixture
def begins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(config, folder, source, has_trained=True) -> how `fit` was called; then the run has a checkpoint."""

    def begin(config: Any, folder: Path, init_from: Any = None, *, has_trained: bool = True) -> Any:
        called: dict[str, Any] = {}

        def fit(*arguments: Any, **options: Any) -> None:
            called.update(content=arguments[4], **options)
            workdir.write_config(folder, arguments[4])
            if has_trained:
                make_run_step(folder, config)

        monkeypatch.setattr(train, "fit", fit)
        train.train(config, str(folder), init_from=None if init_from is None else str(init_from))
        return called

    return begin


def make_run_step(folder: Path, config: Any) -> None:
    with opened(folder) as manager:
        content = workdir.read_config(folder)
        checkpoint.save(manager, 1, {"ema": random_params(config)}, data_state={}, config_json=content)


def test_the_same_command_resumes_even_if_the_source_is_gone(tmp_path: Path, begins: Any) -> None:
    config = tiny_config()
    source, new = make_run(tmp_path / "old", config, tuple("0123456789"), 3, 5), tmp_path / "new"
    first = begins(config, new, f"{source}:3", has_trained=False)
    recorded = dict(run=str(source), step=3, weights_hash=load(source, 3).weights_hash)
    assert first["content"]["init_from"] == recorded == workdir.read_config(new)["init_from"]
    # Killed before its first checkpoint, the run takes the same weights again, also without the flag.
    again = begins(config, new)
    assert again["content"] == first["content"] and again["start_from"] is not None

    with pytest.raises(ValueError, match=r"began from .*old, step 3, whose weights are not those of --init_from=.*:5"):
        begins(config, new, f"{source}:5")
    shutil.copytree(source, tmp_path / "copy")
    shutil.rmtree(source)
    for init_from in (f"{source}:3", source, None, f"{tmp_path / 'copy'}:3"):
        resumed = begins(config, new, init_from)
        assert resumed["content"] == first["content"]
        with pytest.raises(ValueError, match="not the folder of a run"):  # only if it must begin again
            resumed["start_from"](random_params(config))
    with pytest.raises(ValueError, match="leave --init_from out to resume") as error:
        begins(config, new, tmp_path / "copy")
    assert "give another --workdir" in str(error.value)


def test_a_source_that_has_changed_is_refused(tmp_path: Path, begins: Any) -> None:
    config = tiny_config()
    source, new = make_run(tmp_path / "old", config), tmp_path / "new"
    begins(config, new, source, has_trained=False)
    shutil.rmtree(source)
    with pytest.raises(ValueError, match="not the folder of a run"):
        begins(config, new)
    make_run(source, config)
    with opened(source) as manager:
        state, content = {"ema": random_params(config, 9)}, workdir.read_config(source)
        shutil.rmtree(source / "checkpoints" / "3")
        manager.orbax.reload()
        checkpoint.save(manager, 3, state, data_state={}, config_json=content)
    with pytest.raises(ValueError, match=r"step 3 of .*, from which this run began, has other weights now"):
        begins(config, new)


def test_a_run_that_began_with_random_weights_takes_no_others(tmp_path: Path, begins: Any) -> None:
    config = tiny_config()
    source = make_run(tmp_path / "old", config)
    assert begins(config, tmp_path / "new")["start_from"] is None
    with pytest.raises(ValueError, match=r"has begun with random weights, .*leave --init_from out to resume"):
        begins(config, tmp_path / "new", source)
    assert "init_from" not in begins(config, tmp_path / "new")["content"]


def test_another_learning_rate_is_a_new_run_from_the_weights_of_the_old_one(tmp_path: Path, begins: Any) -> None:
    """The refusal names the way, which works. It does not name it where it would not work."""
    old = tmp_path / "old"
    begins(tiny_config(), old)
    changed = tiny_config(train__learning_rate=0.5)
    with pytest.raises(ValueError, match=r"learning_rate: 0\.001 there, 0\.5 here") as error:
        begins(changed, old)
    found = re.search(r"(--init_from=\S+) with another --workdir trains its weights on", str(error.value))
    assert found is not None
    called = begins(changed, tmp_path / "new", found[1].removeprefix("--init_from="))
    assert called["content"]["init_from"]["run"] == str(old)
    with pytest.raises(ValueError, match="another run's") as error:
        begins(tiny_config(model__base_channels=64), old)
    assert "--init_from" not in str(error.value)


def test_the_config_of_an_imported_run_trains_it_on(tmp_path: Path, begins: Any) -> None:
    """The command of the README: its images, and label dropout."""
    imported = tiny_config(model__time="adm_cosine")
    source = import_run(tmp_path / "adm", imported, random_params(imported))
    config = settings.config_of_run(str(source))
    with pytest.raises(ValueError, match=r"data\.source is 'adm'.* Set data\.source to"):
        begins(config, tmp_path / "new", source)
    config.data.source, config.data.split, config.train.p_uncond, config.train.sample_every_steps = (
        "digits",
        "train",
        0.1,
        0,
    )
    called = begins(config, tmp_path / "new", source)
    assert called["content"]["init_from"]["run"] == str(source) and called["content"]["config"]["data"]["flip"] is False
    params = called["start_from"](random_params(imported, 7))
    assert same_bits(params, load(source).params)


def test_what_is_no_source_is_refused_before_the_data_is_opened(
    tmp_path: Path, begins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "open_split", lambda *_: pytest.fail("the data was opened"))
    config = tiny_config()
    run = make_run(tmp_path / "run", config)
    make_run(tmp_path / "guide", config, kind="classifier")
    damaged = make_run(tmp_path / "damaged", config)
    flip_weights(damaged / "checkpoints" / "3")
    workdir.write_config(tmp_path / "empty", workdir.read_config(run))
    for source, words in (
        (tmp_path / "nowhere", "is not the folder of a run"),
        (tmp_path / "guide", "holds a classifier run: --init_from takes the run of a diffusion model"),
        (f"{run}:7", r"has no step 7: --init_from=.*/run:STEP takes one of \[3\]"),
        (tmp_path / "empty", "has no checkpoint: train it first"),
        (damaged, "no undamaged checkpoint in .*damaged"),
        (tmp_path / "new", "is the run's own folder: give another --workdir"),
    ):
        with pytest.raises(ValueError, match=words):
            begins(config, tmp_path / "new", source)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "changes",
    [
        dict(model__time="adm_cosine", model__base_channels=64),
        dict(model__channel_mult=(1, 2), model__attention_resolutions=(4,)),
        dict(model__head_channels=0, model__num_heads=4, model__num_res_blocks=2),
        dict(model__attention_resolutions=(8,), data__image_size=8),
        dict(data__channels=3, data__source="folder"),
    ],
)
def test_another_network_is_refused_with_the_flags_that_give_the_sources(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = tmp_path / "run"
    workdir.write_config(source, workdir.describe("diffusion", tiny_config(**changes).to_dict(), tuple("0123456789")))
    (source / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ValueError, match="is another one than the config's") as error:
        finetune.check(tiny_config(), str(tmp_path / "new"), str(source))
    flags = re.findall(r'--config\.(\S+)="([^"]*)"', str(error.value))
    assert len(flags) == len({name for name, _ in flags}) >= 1
    values = {name: value if name == "model.time" else json.loads(tupled(value)) for name, value in flags}
    given = {name.replace(".", "__"): tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    finetune.check(tiny_config(**given), str(tmp_path / "new"), str(source))


def tupled(value: str) -> str:
    """A tuple as JSON."""
    return re.sub(r",?\)", "]", value.replace("(", "["))


def test_dropout_dtype_and_classes_are_free_and_attention_is_compared_by_level(tmp_path: Path) -> None:
    levels: dict[str, Any] = dict(model__channel_mult=(1, 2))
    source = make_run(tmp_path / "run", tiny_config(**levels, model__attention_resolutions=(4,)))
    new, free = str(tmp_path / "new"), dict(model__dropout=0.3, model__dtype="bfloat16", model__remat=True)
    for size, resolutions in ((8, (4,)), (16, (8,))):
        attended = dict(model__attention_resolutions=resolutions, classifier__attention_resolutions=())
        config = tiny_config(**levels, **free, **attended, data__image_size=size)
        finetune.check(config, new, str(source))
    attended = dict(model__attention_resolutions=(16,), classifier__attention_resolutions=())
    config = tiny_config(**levels, **attended, data__image_size=16)
    with pytest.raises(ValueError, match=r'--config\.model\.attention_resolutions="\(8,\)"'):
        finetune.check(config, new, str(source))


def test_a_source_is_a_folder_and_a_step(tmp_path: Path) -> None:
    (tmp_path / "a:7").mkdir()
    assert finetune.parse(str(tmp_path / "a")) == (str(tmp_path / "a"), None)
    assert finetune.parse(f"{tmp_path / 'b'}:7") == (str(tmp_path / "b"), 7)
    assert finetune.parse(str(tmp_path / "a:7")) == (str(tmp_path / "a:7"), None)
    assert finetune.parse(f"{tmp_path / 'a:7'}:5") == (str(tmp_path / "a:7"), 5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_begin_with_the_weights_of_one(tmp_path: Path) -> None:
    """Killed before its first checkpoint, the run begins with the same weights again."""
    with starting(tmp_path / "cache") as start:
        source = start(tmp_path / "source" / "run", train__num_steps=20)
        assert source.finish() == [0], source.report()
        fields: Any = dict(train__num_steps=30, train__learning_rate=1e-4, more=(f"--init_from={source.folder}",))
        whole = start(tmp_path / "whole" / "run", devices=2, of=1, **fields)
        assert whole.finish() == [0], whole.report()
        new = tmp_path / "new" / "run"
        job = start(new, processes=2, env={"JOB_STEP_SECONDS": "0.1"}, **fields)
        wait_for_step(job, 3)
        job.send(signal.SIGKILL)
        job.finish()
        assert not [p for p in (new / "checkpoints").iterdir() if p.name.isdecimal()]
        job = start(new, processes=2, **fields)
        assert job.finish() == [0, 0], job.report()
        assert job.text().count("Beginning with the EMA weights of") == 1 and "Beginning" not in job.text(1)
        assert_same_run(new, whole.folder)
        assert losses_of(new)[0] < losses_of(source.folder)[0]
