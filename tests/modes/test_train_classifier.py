"""`--mode=train_classifier`: the noisy classifier belongs to the run in whose folder it is."""

from pathlib import Path

import pytest
from tiny import tiny_config

from cfd.fields import BEFORE
from cfd.modes import settings, train_classifier
from cfd.runs import workdir


def test_a_classifier_of_other_images_or_classes_than_its_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tuple("0123456789")
    workdir.write_config(tmp_path, workdir.describe("diffusion", tiny_config().to_dict(), names))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"was trained with data.image_size = 8, not 4"):
        train_classifier.train_classifier(tiny_config(data__image_size=4), str(tmp_path))
    assert not (tmp_path / "classifier").exists()
    other = workdir.describe("diffusion", tiny_config().to_dict(), ("zero", *names[1:]))
    workdir.write_config(tmp_path / "other", other)
    with pytest.raises(ValueError, match=r"class 0 is 'zero' in the run .* and '0' in data.split 'train'"):
        train_classifier.train_classifier(tiny_config(), str(tmp_path / "other"))
    # The two networks may be trained with different settings, and a run without a step with any classifier.
    train_classifier.check_same_fields(tiny_config(classifier__base_channels=64), str(tmp_path / "other"))
    monkeypatch.setattr(train_classifier, "fit", lambda *_, **__: None)
    config = tiny_config(classifier_train__learning_rate=1.0, train__p_uncond=0.5)
    train_classifier.train_classifier(config, str(tmp_path))


def test_a_classifier_that_contradicts_the_config_of_its_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    content = workdir.describe("diffusion", tiny_config().to_dict(), tuple("0123456789"))
    workdir.write_config(run, content)
    (run / "checkpoints" / "1").mkdir(parents=True)
    other = tiny_config(classifier__base_channels=64, classifier__dropout=0.5)
    with pytest.raises(
        ValueError, match=r"classifier\.base_channels: 32 there, 64 here; classifier\.dropout: 0\.0 there"
    ):
        train_classifier.train_classifier(other, str(run))
    with pytest.raises(ValueError, match=r"is trained on λ in \[-20, 5\], which does not cover the run's \[-20, 20\]"):
        train_classifier.train_classifier(tiny_config(process__logsnr_max=5.0), str(run))
    assert not (run / "classifier").exists()
    # The remedies: the config of the run, or a classifier from another folder, which can also be resumed.
    begun = []
    monkeypatch.setattr(
        train_classifier, "fit", lambda _, folder, *args, **__: begun.append((folder, args[2]["config"]))
    )
    train_classifier.train_classifier(settings.config_of_run(str(run)), str(run))
    train_classifier.train_classifier(other, str(elsewhere))
    assert [folder for folder, _ in begun] == [f"{run}/classifier", f"{elsewhere}/classifier"]
    workdir.write_config(run / "classifier", workdir.describe("classifier", begun[1][1], content["class_names"]))
    (run / "classifier" / "checkpoints" / "1").mkdir(parents=True)
    train_classifier.train_classifier(other, str(run))
    # A run of an earlier version lacks younger fields, and an import has no classifier.
    whole = {name: group for name, group in content["config"].items() if name != "classifier"}
    fields = content["config"]["classifier"].items()
    stated = {name: value for name, value in fields if value != BEFORE[f"classifier.{name}"]}
    for number, older in enumerate((whole, whole | {"classifier": stated})):
        path = tmp_path / f"older_{number}"
        workdir.write_config(path, content | {"config": older})
        (path / "checkpoints" / "1").mkdir(parents=True)
        train_classifier.check_same_fields(tiny_config(), str(path))
