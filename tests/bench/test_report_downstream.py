"""The page's section about probes after pretraining."""

import json
from pathlib import Path

import report_downstream


def run(seed: int, gain: float) -> dict:
    def both(random: float) -> dict[str, float]:
        return {"pretrained": random + gain, "random": random}

    change = {"changed_f1": both(0.3), "all_changed_f1": {"pretrained": 0.25, "random": 0.25}}
    scene = {"accuracy": both(0.5), "knn20_accuracy": both(0.4)}
    return {"seed": seed, "scene": scene, "segmentation": {"miou": both(0.45)}, "change": change}


def test_every_seed_is_shown_and_the_smallest_gain(tmp_path: Path) -> None:
    machine = {"device": "a CPU", "commit": "abc1234", "date": "2026-11-27 05:00 UTC"}
    record = {"machine": machine, "recipe": "tiny", "epochs": 20, "images": 1680, "runs": [run(0, 0.2), run(1, 0.125)]}
    (tmp_path / "one.json").write_text(json.dumps(record))
    text = "\n".join(report_downstream.downstream_page(tmp_path))
    assert "| Scenes, linear probe: accuracy | 0.700 0.625 | 0.500 0.500 | +0.125 |" in text
    assert "F1 of 0.250" in text
    assert "abc1234, 2026-11-27" in text


def test_nothing_measured_gives_nothing(tmp_path: Path) -> None:
    assert report_downstream.downstream_page(tmp_path) == []
