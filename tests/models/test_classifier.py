from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from heatsink.models import classifier

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "emoji" / "classifier"


def test_a_saved_judge_reads_the_same(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = classifier.Classifier(3).eval()
    # What float16 holds, so that nothing is rounded.
    model.load_state_dict({n: v.half().to(v.dtype) for n, v in model.state_dict().items()})
    classifier.save(model, ["a", "b", "c"], tmp_path / "judge")
    loaded, names = classifier.load(tmp_path / "judge")
    assert names == ["a", "b", "c"]
    assert not loaded.training
    x = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        for found, wanted in zip(loaded(x), model(x), strict=True):
            assert torch.equal(found, wanted)


def test_the_bundled_judge_tells_pictures_apart() -> None:
    model, names = classifier.load(BUNDLED)
    assert len(set(names)) == len(names) == 42
    red = np.full((64, 64, 3), 255, np.uint8)
    red[16:48, 16:48] = (200, 20, 20)
    green = red[:, :, [1, 0, 2]]
    groups, styles = classifier.judge(model, np.stack([red, green]), "cpu")
    assert groups.shape == styles.shape == (2,)
    assert groups[0] != groups[1]
