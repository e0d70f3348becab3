"""`--mode=train_classifier`: the noisy classifier belongs to the run in whose folder it is."""

from pathlib import Path

import pytest
from tiny import tiny_config

from cfd.modes import train_classifier
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
    # The two networks may be trained with different settings.
    monkeypatch.setattr(train_classifier, "fit", lambda *_, **__: None)
    config = tiny_config(classifier_train__learning_rate=1.0, train__p_uncond=0.5)
    train_classifier.train_classifier(config, str(tmp_path))
